"""The store of private states: nothing foreign is taken, nothing whole is lost."""

import hashlib
import json
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import running
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.base import files
from polyfed.base.errors import CheckpointError, StorageError
from polyfed.core.message import Nothing, State
from polyfed.storage import state_files
from polyfed.storage import state_store as store_module
from polyfed.storage.state_store import StatesOf, Store


class Kept(State):
    x: torch.Tensor
    n: int


class Other(State):
    y: torch.Tensor


def kept(n: int) -> Kept:
    return Kept(torch.full((3,), float(n)), n)


@pytest.fixture(params=["rows", "files"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where states go: into the index, or, all being large, into files of their own."""
    if request.param == "files":
        monkeypatch.setattr(store_module, "INLINE", 0)
    return request.param


@pytest.fixture(params=[True, False], ids=["memory", "disk"])
def resident(request: pytest.FixtureRequest) -> bool:
    return request.param


def written(folder: Path) -> dict[tuple[int, int], bool]:
    """Client and round of what is in the index, and whether it is in a file; there are no others."""
    found = {(client, round_): data is None for client, round_, _, data in running.rows(folder)}
    assert {f"client-{k}-round-{r}.safetensors" for (k, r), own in found.items() if own} == {
        path.name for path in folder.glob("??/*")
    }
    return found


def test_a_state_exists_once_its_client_has_trained(tmp_path: Path, resident: bool, where: str) -> None:
    """Catches states made for everybody: a million clients of which few are drawn."""
    store = Store(tmp_path / "states", (Kept,), resident=resident)
    assert store.get(3) is None
    store.put(4, Nothing(), 1)
    assert store.get(4) is None
    assert store.save() == {"count": 0, "digest": "0" * 64}
    assert not (tmp_path / "states").exists()
    store.put(3, kept(1), 1)
    got = store.get(3)
    assert isinstance(got, Kept)
    assert got.n == 1
    assert torch.equal(got.x, torch.ones(3))
    assert (tmp_path / "states").exists() is not resident
    assert store.save()["count"] == 1
    assert written(tmp_path / "states") == {(3, 1): where == "files"}


def test_the_size_decides_where_a_state_goes(tmp_path: Path) -> None:
    """Catches a million files of a kilobyte, and an index of blobs of ten megabytes."""
    store = Store(tmp_path, (Kept,), resident=False)
    elements = store_module.INLINE // 4
    store.put(1, Kept(torch.zeros(elements), 0), 1)
    store.put(2, Kept(torch.zeros(elements - 1000), 0), 1)
    store.save()
    assert written(tmp_path) == {(1, 1): True, (2, 1): False}
    assert len(store.get(1).x) == elements
    assert len(store.get(2).x) == elements - 1000


def test_what_a_checkpoint_left_stays_until_the_next(tmp_path: Path, resident: bool, where: str) -> None:
    """Catches a version that goes while the manifest on disk still means it, and one that stays for ever."""
    store = Store(tmp_path, (Kept,), resident=resident)
    store.put(3, kept(1), 1)
    store.put(5, kept(1), 1)
    first = store.save()
    store.prune(1)
    for round_ in (2, 3):
        store.put(3, kept(round_), round_)
    second = store.save()  # and the manifest is not written: the disk is full
    assert written(tmp_path).keys() == {(3, 1), (3, 3), (5, 1)}
    again = Store(tmp_path, (Kept,), resident=resident)
    again.restore(1, first)
    assert again.get(3).n == 1
    assert written(tmp_path).keys() == {(3, 1), (5, 1)}
    again.put(3, kept(3), 3)
    assert again.get(3).n == 3, "of two versions the later one"
    assert again.save() == second
    again.prune(3)
    assert written(tmp_path).keys() == {(3, 3), (5, 1)}


def test_a_store_goes_back_to_a_manifest(tmp_path: Path, resident: bool, where: str) -> None:
    """Catches states of rounds after the checkpoint that survive a resume."""
    store = Store(tmp_path, (Kept,), resident=resident)
    store.put(3, kept(1), 1)
    entry = store.save()
    store.prune(1)
    store.put(3, kept(2), 2)
    store.put(7, kept(2), 2)
    store.save()
    for again in (store, Store(tmp_path, (Kept,), resident=resident)):
        again.restore(1, json.loads(json.dumps(entry)))
        assert again.get(3).n == 1
        assert again.get(7) is None
        assert again.save() == entry
        assert written(tmp_path).keys() == {(3, 1)}
    store.restore()  # no checkpoint at all
    assert store.get(3) is None
    assert written(tmp_path) == {}


def test_a_checkpoint_that_was_written_but_not_tidied_up_is_tidied_up(tmp_path: Path, where: str) -> None:
    """Catches versions that a run killed just after its manifest leaves for ever."""
    store = Store(tmp_path, (Kept,), resident=False)
    store.put(3, kept(1), 1)
    store.put(5, kept(1), 1)
    store.save()
    store.prune(1)
    store.put(3, kept(2), 2)
    entry = store.save()
    assert len(written(tmp_path)) == 3
    again = Store(tmp_path, (Kept,), resident=False)
    again.restore(2, entry)
    assert written(tmp_path).keys() == {(3, 2), (5, 1)}
    assert again.save() == entry


@pytest.mark.parametrize("after", ["the file", "the row"])
def test_a_checkpoint_that_was_interrupted_is_made_again(
    tmp_path: Path, resident: bool, where: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a second write of a client's round that deletes its own file."""
    store = Store(tmp_path, (Kept,), resident=resident)
    clients = (3, 5)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def checkpoint(round_: int) -> dict[str, Any]:
        for client in clients:
            store.put(client, kept(round_), round_)
        return store.save()

    checkpoint(1)
    store.prune(1)
    with monkeypatch.context() as patch:
        if after == "the file":
            patch.setattr(store, "_drop", interrupted)
        else:  # of one of the two
            enter = store._enter
            patch.setattr(store, "_enter", lambda *of: (enter(*of), interrupted()))
        with pytest.raises(KeyboardInterrupt):
            checkpoint(2)
    entry = checkpoint(2)  # and the rest of the round, or all of it again
    store.prune(2)
    assert written(tmp_path).keys() == {(3, 2), (5, 2)}
    again = Store(tmp_path, (Kept,), resident=resident)
    again.restore(2, entry)
    assert [again.get(client).n for client in clients] == [2, 2]


def test_a_checkpoint_that_is_interrupted_writes_little_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a Ctrl-C that waits until all states are on the disk, and states that pile up in memory."""
    monkeypatch.setattr(store_module, "INLINE", 0)
    monkeypatch.setattr(store_module, "AHEAD", 4)
    store = Store(tmp_path, (Kept,), resident=True)
    for client in range(100):
        store.put(client, kept(1), 1)
    enter = store._enter

    def pressed(client: int, *of: Any) -> None:
        if client == 5:
            raise KeyboardInterrupt
        enter(client, *of)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_enter", pressed)
        with pytest.raises(KeyboardInterrupt):
            store.save()
    assert len(list(tmp_path.glob("??/*.safetensors"))) == 8
    store.save()
    assert len(list(tmp_path.glob("??/*.safetensors"))) == 100


def test_ctrl_c_while_tidying_up_spoils_nothing(
    tmp_path: Path, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a digest that is built on rows that are gone: the run saves once more before it ends."""
    store = Store(tmp_path, (Kept,), resident=resident)
    for client in (3, 5):
        store.put(client, kept(1), 1)
    store.save()
    store.prune(1)
    for client in (3, 5):
        store.put(client, kept(2), 2)
    entry, drop = store.save(), store._drop

    def interrupted(client: int, which: str, round_: int) -> None:
        drop(client, which, round_)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_drop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.prune(2)
    assert store.save() == entry
    store.prune(2)
    again = Store(tmp_path, (Kept,), resident=resident)
    again.restore(2, entry)
    assert (again.get(3).n, again.get(5).n) == (2, 2)
    assert written(tmp_path).keys() == {(3, 2), (5, 2)}


def test_what_a_round_leaves_is_nobody_elses_before_the_checkpoint(tmp_path: Path) -> None:
    """Catches a killed process half of whose writes survive: everything between two checkpoints is one transaction."""
    store = Store(tmp_path, (Kept,), resident=False)
    store.put(3, kept(1), 1)
    entry = store.save()
    store.prune(1)
    store.put(3, kept(2), 2)
    assert store.get(3).n == 2
    assert written(tmp_path).keys() == {(3, 1)}
    del store
    again = Store(tmp_path, (Kept,), resident=False)
    again.restore(1, entry)
    assert again.get(3).n == 1


@pytest.mark.parametrize("how", ["gone", "older", "newer", "of another run", "one row less", "no database"])
def test_an_index_that_is_not_the_manifests_is_refused(tmp_path: Path, how: str) -> None:
    """Catches states that are silently made anew, or are those of another moment."""
    store = Store(tmp_path / "states", (Kept,), resident=False)
    for client in range(3):
        store.put(client, kept(client), 1)
    entries = {1: store.save()}
    store.prune(1)
    shutil.copytree(tmp_path / "states", tmp_path / "older")
    store.put(1, kept(7), 2)
    entries[2] = store.save()
    store.prune(2)
    del store
    index, round_ = tmp_path / "states" / "index.sqlite", 2
    if how == "gone":
        index.unlink()
    elif how == "older":
        shutil.copy(tmp_path / "older" / "index.sqlite", index)
    elif how == "newer":
        round_ = 1
    elif how == "no database":
        index.write_bytes(b"\xff" * 5000)
    else:
        with closing(sqlite3.connect(index)) as changed, changed:
            changed.execute("DELETE FROM states WHERE client = 0")
            if how == "of another run":
                changed.execute("INSERT INTO states VALUES (0, 1, ?, x'00')", ("0" * 64,))
    with pytest.raises(
        CheckpointError, match=r"index\.sqlite is (not what the checkpoint of round|damaged: file is not)"
    ):
        Store(tmp_path / "states", (Kept,), resident=False).restore(round_, entries[round_])


def test_a_round_looks_at_its_cohort_only(tmp_path: Path, resident: bool) -> None:
    """Catches work that grows with the clients that have trained: a scan, a list, a manifest of all of them.

    Counted, not timed: the steps of SQLite's machine, what is held, and the bytes of the manifest.
    """
    costs = {}
    for trained in (30, 3000):
        store = Store(tmp_path / str(trained), (Kept,), resident=False)
        for client in range(trained):
            store.put(client, kept(client), 1)
        entry = store.save()
        store.prune(1)
        del store
        store = Store(tmp_path / str(trained), (Kept,), resident=resident)
        store.restore(1, entry)
        steps: list[int] = []
        assert store._db is not None
        store._db.set_progress_handler(lambda steps=steps: steps.append(1), 1)
        for round_ in (2, 3):
            for client in (3, 14, 15):
                assert store.get(client).n in (client, round_ - 1)
                store.put(client, kept(round_), round_)
        entry = store.save()
        store.prune(3)
        costs[trained] = (len(steps), len(json.dumps(entry)) - len(str(trained)), len(store._held))
    few, many = costs[30], costs[3000]
    assert 0 < many[0] < 1.2 * few[0]
    assert few[1:] == many[1:]
    assert many[2] == (3 if resident else 0)


def test_a_full_disk_under_the_index_is_told(tmp_path: Path, resident: bool) -> None:
    """Catches SQLite's own errors; what the last checkpoint left is there."""
    store = Store(tmp_path, (Kept,), resident=resident)
    store.put(3, kept(1), 1)
    entry = store.save()
    store.prune(1)
    assert store._db is not None
    store._db.execute("PRAGMA max_page_count = 10")

    def fill(store: Store) -> None:
        for client in range(300):
            store.put(client, kept(2), 2)
        store.save()

    with pytest.raises(StorageError, match=r"index\.sqlite: database or disk is full; .* Make room"):
        fill(store)
    del store
    again = Store(tmp_path, (Kept,), resident=resident)
    again.restore(1, entry)
    assert again.get(3).n == 1
    assert again.get(0) is None


def test_a_state_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    """Catches a checkpoint that is read as if it were ours."""
    sha256 = files.write(tmp_path / "a.safetensors", state_files.dump(kept(1)))
    with pytest.raises(CheckpointError, match="holds no state of this algorithm"):
        state_files.load(tmp_path / "a.safetensors", sha256, Other)


def test_bytes_that_are_no_state_are_refused(tmp_path: Path) -> None:
    """Catches a SafetensorError, or any other, that reaches the user as a traceback."""
    good = state_files.dump(kept(1))
    for number, data in enumerate((b"", b"garbage" * 9, good[:-1], good[:50], b"\xff" * 64)):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            state_files.load(path, hashlib.sha256(data).hexdigest(), Kept)


@given(seed=st.integers(0, 2**32 - 1), resident=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_pinned_checkpoint_stays_beside_the_last(seed: int, resident: bool) -> None:
    """Catches rows of the pinned round that go, rows that nothing needs any more, and a restored store without a pin.

    Random rounds, checkpoints, pins and kills are held to a list of all states that there ever were.
    """
    draws = random.Random(seed)
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "INLINE", draws.choice([0, 10**6]))
        folder = Path(name)
        store = Store(folder, (Kept,), resident=resident)
        history: dict[int, dict[int, int]] = {0: {}}  # round -> client -> the round that left its state
        saved: tuple[int, Any] = (0, None)
        pinned: tuple[int, Any] | None = None
        round_ = 0
        for _ in range(30):
            round_ += 1
            history[round_] = dict(history[round_ - 1])
            for client in draws.sample(range(5), draws.randrange(4)):
                store.put(client, kept(round_), round_)
                history[round_][client] = round_
            if draws.random() < 0.4:
                entry = store.save()
                if draws.random() < 0.7:  # else it is killed before its manifest
                    saved = round_, entry
                    pinned = saved if draws.random() < 0.4 else pinned
                    if draws.random() < 0.8:  # else it is killed after it
                        store.prune(round_, None if pinned is None else pinned[0])
                        latest = [history[round_], history[pinned[0]] if pinned else {}]
                        assert written(folder).keys() == {row for rounds in latest for row in rounds.items()}
                        assert pinned is None or _states(store.at(pinned[0])) == history[pinned[0]]
                        continue
                del store
                store = Store(folder, (Kept,), resident=resident)
                store.restore(*saved, pinned)
                round_ = saved[0]
                latest = [history[round_], history[pinned[0]] if pinned else {}]
                assert written(folder).keys() == {row for rounds in latest for row in rounds.items()}
                assert pinned is None or _states(store.at(pinned[0])) == history[pinned[0]]
            assert _states(store) == history[round_]


def _states(store: StatesOf) -> dict[int, int]:
    """The round in which each state was put, by client."""
    found = {client: store.get(client) for client in range(5)}
    return {client: state.n for client, state in found.items() if state is not None}


def test_a_move_of_the_pin_costs_what_was_pinned(tmp_path: Path) -> None:
    """Catches a scan of all clients that have trained when another checkpoint is pinned."""
    costs: list[int] = []
    for trained in (30, 3000):
        store = Store(tmp_path / str(trained), (Kept,), resident=False)
        for client in range(trained):
            store.put(client, kept(client), 1)
        store.save()
        store.prune(1, 1)
        steps: list[int] = []
        assert store._db is not None
        store._db.set_progress_handler(lambda steps=steps: steps.append(1), 1)
        for round_ in (2, 3):
            for client in (3, 14, 15):
                store.put(client, kept(round_), round_)
            store.save()
            store.prune(round_, 1 if round_ == 2 else 3)
        costs.append(len(steps))
    assert 0 < costs[1] < 1.2 * costs[0]


def test_a_pinned_checkpoint_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    """Catches a best round whose states are gone or are others, while those of the last are as they were."""
    store = Store(tmp_path, (Kept,), resident=False)
    store.put(1, kept(1), 1)
    first = store.save()
    store.prune(1, 1)
    store.put(1, kept(2), 2)
    second = store.save()
    store.prune(2, 1)
    del store
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as changed, changed:
        changed.execute("DELETE FROM states WHERE round = 1")
    with pytest.raises(CheckpointError, match=r"is not what the checkpoint of round 1 left"):
        Store(tmp_path, (Kept,), resident=False).restore(2, second, (1, first))
