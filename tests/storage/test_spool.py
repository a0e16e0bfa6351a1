"""What waits on disk for its turn: bytes come back, nothing is left behind, and an exchange can be taken back."""

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from polyfed.base.errors import StorageError
from polyfed.core.message import State
from polyfed.storage.spool import PendingStates, Spool


class Kept(State):
    x: torch.Tensor
    n: int


def kept(n: int) -> Kept:
    return Kept(torch.full((3,), float(n)), n)


def test_bytes_come_back_in_any_order_and_as_often_as_asked(tmp_path: Path) -> None:
    """Catches an offset that moves with what is read or written in between, and an empty message."""
    spool = Spool(tmp_path)
    data = [b"one", b"", b"three" * 1000, b"4"]
    places = [spool.put([one]) for one in data[:3]]
    assert spool.get(places[0]) == data[0]
    places.append(spool.put([data[3][:1], data[3][1:]]))  # after a read
    for k in (3, 1, 0, 2, 3):
        assert spool.get(places[k]) == data[k]
    spool.close()


def test_the_file_has_no_name_and_goes_when_it_is_closed(tmp_path: Path) -> None:
    """Catches a temporary file that somebody has to sweep, and disk that is never given back."""
    descriptors = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set[str]()
    spool = Spool(tmp_path / "new")
    for _ in range(2):  # it can be used again
        place = spool.put([b"x" * 10_000])
        assert spool.get(place) == b"x" * 10_000
        assert list((tmp_path / "new").iterdir()) == []
        spool.close()
        spool.close()
    if sys.platform == "linux":
        assert set(os.listdir("/proc/self/fd")) == descriptors


def test_nothing_is_written_where_nothing_waits(tmp_path: Path) -> None:
    """Catches an empty folder, and a file held open, for each exchange of which every reply came in turn."""
    Spool(tmp_path / "new").close()
    assert not (tmp_path / "new").exists()


def test_a_killed_process_leaves_nothing_on_disk(tmp_path: Path) -> None:
    """Catches gigabytes of replies that pile up over kills."""
    program = (
        "import os, signal, sys; from pathlib import Path; from polyfed.storage.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1])); place = spool.put([b'x' * 1_000_000])\n"
        "assert len(spool.get(place)) == 10**6\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [True, False])
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool) -> None:
    """Catches a traceback of the system instead of what to do, and a message that does not name the disk."""

    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    where = tmp_path if folder else Path(tempfile.gettempdir())
    with pytest.raises(StorageError, match=rf"could not write below {where}: No space left on device; make room"):
        Spool(tmp_path if folder else None).put([b"one"])


def test_a_disk_that_fills_up_is_said(tmp_path: Path) -> None:
    """Catches a message that is cut off where the disk ended: the system writes what fits, and calls that a success."""
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from polyfed.base.errors import StorageError; from polyfed.storage.spool import Spool\n"
        "spool = Spool(Path(sys.argv[1])); place = spool.put([b'fits'])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try:\n    print(spool.put([b'x' * 3000]))\n"
        "except StorageError as error:\n    print(error, spool.get(place), spool.get(spool.put([b'again'])))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True)
    assert re.search(r"could not write below .*File too large; make room.*b'fits'.*b'again'", done.stdout)


class Halves:
    """A file that reads and writes half of what it is asked to, as the system does above 2 GB."""

    def __init__(self, file: Any) -> None:
        self.file, self.seek, self.close = file, file.seek, file.close

    def write(self, data: memoryview) -> int:
        return self.file.write(data[: max(1, len(data) // 2)])

    def readinto(self, data: memoryview) -> int:
        return self.file.readinto(data[: max(1, len(data) // 2)])


def test_what_is_written_and_read_in_steps_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message above 2 GB that loses its end."""
    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **how: Halves(make(**how)))
    spool = Spool(tmp_path)
    places = [spool.put([b"one", b"", memoryview(b"three" * 100)]), spool.put([b"4"])]
    assert [bytes(spool.get(place)) for place in places] == [b"one" + b"three" * 100, b"4"]
    spool.close()


@pytest.fixture(params=["memory", "disk"])
def pending(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """States that wait in memory, or on disk."""
    made = PendingStates((Kept,), None if request.param == "memory" else Spool(tmp_path))
    yield made
    made.clear()


def numbers(pending: PendingStates) -> dict[int, int]:
    return {client: pending.get(client).n for client in pending}


def test_states_come_back_in_order_of_client(pending: PendingStates) -> None:
    """Catches an order of commits that depends on who was fast, and a state that is another client's."""
    pending.begin()
    for client in (7, 2, 5):
        pending.put(client, kept(client))
    assert numbers(pending) == {2: 2, 5: 5, 7: 7}
    assert list(pending) == [2, 5, 7]
    assert 5 in pending
    assert 3 not in pending
    assert torch.equal(pending.get(7).x, torch.full((3,), 7.0))


def test_what_is_discarded_is_what_an_earlier_exchange_kept(pending: PendingStates) -> None:
    """Catches a lost second reply that takes the first one's state with it, or leaves its own."""
    pending.begin()
    for client in (1, 2):
        pending.put(client, kept(10 + client))
    pending.begin()
    for client in (2, 3):
        pending.put(client, kept(20 + client))
    pending.discard(2)
    pending.discard(3)
    assert numbers(pending) == {1: 11, 2: 12}
    pending.begin()
    pending.put(2, kept(32))
    pending.discard(2)
    assert numbers(pending) == {1: 11, 2: 12}


def test_a_round_that_is_over_leaves_nothing(pending: PendingStates) -> None:
    """Catches states of a void round that the next one commits."""
    pending.begin()
    pending.put(1, kept(1))
    pending.clear()
    assert list(pending) == []
    pending.begin()
    pending.put(2, kept(2))
    assert numbers(pending) == {2: 2}


def test_on_disk_no_state_is_in_memory(tmp_path: Path) -> None:
    """Catches a cohort's states that are held although `run.store = "disk"` promises that they are not."""
    pending = PendingStates((Kept,), Spool(tmp_path))
    pending.begin()
    state = kept(1)
    pending.put(1, state)
    assert pending.get(1) is not state
    assert pending.get(1) is not pending.get(1)
    pending.clear()
