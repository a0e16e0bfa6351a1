"""The store, the run directory and the checkpoint: nothing foreign is taken, nothing whole is lost."""

import errno
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import running
import torch

from polyfed.algorithms.standalone import Standalone
from polyfed.base import files
from polyfed.base.errors import CheckpointError, DivergedError, RunDirError, StorageError
from polyfed.core.message import Nothing, State
from polyfed.rounds import federation
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.simulation import simulate as simulating
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage import run_dir, state_files
from polyfed.storage import state_store as store_module
from polyfed.storage.run_dir import RunDir, RunDirInUseError
from polyfed.storage.state_store import Store


class Kept(State):
    x: torch.Tensor
    n: int


class Other(State):
    y: torch.Tensor


def kept(n: int) -> Kept:
    return Kept(torch.full((3,), float(n)), n)


# ------------------------------------------------------------------------------------------------------------- store


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


def test_what_was_held_does_not_come_back_over_what_was_written(tmp_path: Path, where: str) -> None:
    """Catches a store that leaves memory for workers, and saves at the checkpoint what it held before they trained."""
    store = Store(tmp_path, (Kept,), resident=True)
    store.put(3, kept(1), 1)
    store.put(4, kept(2), 1)
    store.write_through()
    assert not store.resident
    store.put(3, kept(7), 2)
    entry = store.save()
    store.prune(2)
    again = Store(tmp_path, (Kept,), resident=False)
    again.restore(2, entry)
    assert [again.get(client).n for client in (3, 4)] == [7, 2]
    assert written(tmp_path) == {(3, 2): where == "files", (4, 1): where == "files"}


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
    assert store.get(3).n == 3
    again = Store(tmp_path, (Kept,), resident=resident)
    again.restore(1, first)
    assert again.get(3).n == 1
    assert written(tmp_path).keys() == {(3, 1), (5, 1)}
    again.put(3, kept(3), 3)
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
            write = store._write
            patch.setattr(store, "_write", lambda *of: (write(*of), interrupted()))
        with pytest.raises(KeyboardInterrupt):
            checkpoint(2)
    entry = checkpoint(2)  # and the rest of the round, or all of it again
    store.prune(2)
    assert written(tmp_path).keys() == {(3, 2), (5, 2)}
    again = Store(tmp_path, (Kept,), resident=resident)
    again.restore(2, entry)
    assert [again.get(client).n for client in clients] == [2, 2]


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


# ----------------------------------------------------------------------------------------------------- run directory


def test_a_directory_that_this_process_holds_is_refused(tmp_path: Path) -> None:
    """Catches two runs that write into one directory, in one process too."""
    first = RunDir(tmp_path)
    with pytest.raises(RunDirError, match=rf"in use by process {os.getpid()};"):
        RunDir(tmp_path)
    first.close()
    RunDir(tmp_path).close()


def test_a_directory_that_holds_a_run_is_refused_with_the_way_on(tmp_path: Path) -> None:
    """Catches a run that is overwritten."""
    simulate(running.config(run={"rounds": 1}), out=tmp_path)
    before = (tmp_path / "rounds.jsonl").read_bytes()
    with pytest.raises(RunDirError, match=rf"polyfed resume {tmp_path}"):
        simulate(running.config(run={"rounds": 1}), out=tmp_path)
    assert (tmp_path / "rounds.jsonl").read_bytes() == before


def test_a_run_that_another_process_began_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches two processes at one study of which the second, while it prepares, misses that the first has begun."""
    others: list[RunDir] = []

    def prepare(config: Any) -> Any:
        others.append(RunDir(tmp_path))
        (tmp_path / "config.toml").write_text(config.to_toml())
        return federation.prepare(config)

    monkeypatch.setattr(simulating, "prepare", prepare)
    with pytest.raises(RunDirInUseError):
        simulate(running.config(run={"rounds": 1}), out=tmp_path)
    others[0].close()


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """Catches a run that settles among somebody's files, and sweeps away those that look like its own."""
    mine = tmp_path / "states" / "thesis" / "only-copy.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(RunDirError, match="not empty"):
        simulate(running.config(run={"rounds": 1}), out=tmp_path)
    assert mine.read_text() == "years of work"


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    """Catches a resume that makes an empty run of a mistyped path."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunDirError, match=r"holds no run: there is no config\.toml"):
            resume(folder)
    assert not (tmp_path / "nowhere").exists()


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """Catches a traceback instead of an exit code."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot use"):
        simulate(running.config(run={"rounds": 1}), out=tmp_path / "file")


# -------------------------------------------------------------------------------------------------------- checkpoint


@pytest.fixture
def paused(tmp_path: Path) -> Path:
    """A run of four rounds, interrupted after the second."""
    return pause(tmp_path / "run")


class Stop(Quiet):
    """Presses Ctrl-C after a round."""

    def __init__(self, round_: int) -> None:
        self.round = round_

    def round_ended(self, row: Any) -> None:
        """Look whether it is time."""
        if row["round"] == self.round:
            raise KeyboardInterrupt


def pause(folder: Path, **sections: Any) -> Path:
    with pytest.raises(Interrupted) as caught:
        simulate(running.config(**sections), out=folder, callback=Stop(2))
    assert caught.value.run_dir == folder.resolve()
    return folder


def test_an_interruption_between_rounds_keeps_the_round(tmp_path: Path) -> None:
    """Catches Ctrl-C while a round is being told, which used up the round's work and saved nothing."""
    folder = pause(tmp_path / "run", run={"checkpoint_every": 99})
    assert json.loads((folder / "checkpoint" / "manifest.json").read_text())["manifest"]["round"] == 2
    resume(folder)
    simulate(running.config(run={"checkpoint_every": 99}), out=tmp_path / "straight")
    running.same(folder, tmp_path / "straight")


def test_six_rounds_are_three_and_three(tmp_path: Path) -> None:
    """Catches a resumed run that ends elsewhere."""
    one = {"run": {"rounds": 6, "eval_every": 1}}
    with pytest.raises(Interrupted):
        simulate(running.config(**one), out=tmp_path / "a", callback=Stop(3))
    resume(tmp_path / "a")
    simulate(running.config(**one), out=tmp_path / "b")
    running.same(tmp_path / "a", tmp_path / "b")


def test_a_complete_run_resumes_to_its_summary(tmp_path: Path) -> None:
    """Catches rounds beyond the last."""
    summary = simulate(running.config(run={"rounds": 2}), out=tmp_path)
    log = (tmp_path / "rounds.jsonl").read_bytes()
    again = resume(tmp_path)
    assert running.essence(again) == running.essence(summary)
    assert again["memory"]["process_peak"] == summary["memory"]["process_peak"] > 0
    assert (tmp_path / "rounds.jsonl").read_bytes() == log


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["empty", "no JSON", "half", "a list", "another round", "no manifest"])
def test_a_damaged_manifest_is_refused(paused: Path, how: str) -> None:
    """Catches a run that goes on from nowhere, or a KeyError."""
    path = paused / "checkpoint" / "manifest.json"
    text = path.read_text()
    path.write_text(
        {
            "empty": "",
            "no JSON": "\xff{",
            "half": text[: len(text) // 2],
            "a list": "[]",
            "another round": text.replace('"round": 2', '"round": 1', 1),
            "no manifest": '{"sha256": "0"}',
        }[how]
    )
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        resume(paused)


@pytest.mark.parametrize("which", ["checkpoint/server-round-*", "states/??/*"])
@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_damaged_or_missing_file_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, how: str
) -> None:
    """Catches weights with a flipped bit, and a state that is silently made anew."""
    monkeypatch.setattr(store_module, "INLINE", 0)
    paused = pause(tmp_path / "run")
    assert list(paused.glob(which))
    for path in paused.glob(which):
        damage(path) if how == "damaged" else path.unlink()
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256" if how == "damaged" else "cannot be read"):
        resume(paused)


def test_a_damaged_row_is_refused_by_name(paused: Path) -> None:
    """Catches a flipped bit in a state that is a row of the index."""
    path = paused / "states" / "index.sqlite"
    for *_, blob in running.rows(paused / "states"):
        data = path.read_bytes()
        place = data.index(blob[2000:2100]) + 50
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(CheckpointError, match=r"index\.sqlite, client \d is damaged: its SHA-256"):
        resume(paused)


def test_a_run_of_an_earlier_layout_is_refused(paused: Path) -> None:
    """Catches states of another version that are taken for none."""
    path = paused / "checkpoint" / "manifest.json"
    manifest = json.loads(path.read_text())["manifest"]
    manifest["states"] = {"3": ["03/client-3-round-2.safetensors", "0" * 64]}
    del manifest["layout"]
    files.write_json(path, {"sha256": run_dir._digest(manifest), "manifest": manifest})
    with pytest.raises(CheckpointError, match=r"written by another version of polyfed .layout 1, this one has 3"):
        resume(paused)


def test_a_log_that_lost_lines_is_refused(paused: Path) -> None:
    """Catches a log with a hole."""
    (paused / "rounds.jsonl").write_bytes((paused / "rounds.jsonl").read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="shorter than its checkpoint says"):
        resume(paused)


def test_a_checkpoint_of_another_configuration_is_refused(paused: Path) -> None:
    """Catches a config.toml that was edited between start and resume."""
    path = paused / "config.toml"
    assert "lr = 0.05" in path.read_text()
    path.write_text(path.read_text().replace("lr = 0.05", "lr = 0.06"))
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        resume(paused)


def test_data_that_changed_are_refused(paused: Path) -> None:
    """Catches a run that goes on with another split."""
    path = paused / "config.toml"
    path.write_text(path.read_text().replace("samples_per_client = 16", "samples_per_client = 17"))
    with pytest.raises(CheckpointError, match="the data or the partition changed"):
        resume(paused)


# ------------------------------------------------------------------------------------------------------- a full disk


def full(path: Any) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_of_a_run_may_be_read_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    """Catches a partition or manifest that the colleague who may read the rest may not."""
    before = os.umask(umask)
    try:
        simulate(running.config(run={"rounds": 1}), out=tmp_path / "run")
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"partition.npz", "summary.json", "manifest.json", "rounds.jsonl"} <= found.keys()
    assert found == dict.fromkeys(found, mode)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Catches files that are written in place, and temporary ones that stay."""
    path = tmp_path / "file"
    files.write(path, b"before")

    def fail(*args: Any) -> None:
        raise full(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError, match=r"No space left on device; what was there before is intact"):
            files.write(path, b"after")
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("which", ["server-round-3", "manifest.json", "client-"])
@pytest.mark.parametrize("store", ["memory", "disk"])
def test_a_run_goes_on_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, store: str
) -> None:
    """Catches a checkpoint that a failed one has spoilt, whichever of its files did not fit any more."""
    rename, rounds = os.replace, {"run": {"store": store}}
    monkeypatch.setattr(store_module, "INLINE", 0)

    def fails(source: Any, target: Any) -> None:
        if which in str(target) and armed:
            raise full(target)
        rename(source, target)

    armed: list[int] = []

    class Arm(Quiet):
        def round_ended(self, row: Any) -> None:
            if row["round"] == 2:
                armed.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(StorageError, match="Make room"):
            simulate(running.config(**rounds), out=tmp_path / "a", callback=Arm())
    assert json.loads((tmp_path / "a/checkpoint/manifest.json").read_text())["manifest"]["round"] < 3
    resume(tmp_path / "a")
    simulate(running.config(**rounds), out=tmp_path / "b")
    running.same(tmp_path / "a", tmp_path / "b")


def can_mount() -> bool:
    """Whether this process may have a small disk of its own."""
    if os.geteuid() != 0:
        return False
    target = "/tmp/.polyfed-can-mount"
    os.makedirs(target, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", target], capture_output=True, check=False)
    if done.returncode == 0:
        subprocess.run(["umount", target], check=True)
    os.rmdir(target)
    return done.returncode == 0


if can_mount():  # elsewhere the patched functions above have to do

    @pytest.mark.parametrize("room", [4, 30, 60, 120])
    def test_a_disk_that_is_really_full(tmp_path: Path, room: int) -> None:
        """Catches errors that no patched function raises: buffered logs, the lock, the partition."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
        subprocess.run(mount, check=True)
        try:
            usage = os.statvfs(disk)
            filler = disk / "filler"
            filler.write_bytes(b"\0" * (usage.f_bavail * usage.f_frsize - room * 1024))
            with pytest.raises(StorageError):
                simulate(running.config(run={"eval_every": 1}), out=disk / "run")
            filler.unlink()
            if (disk / "run" / "config.toml").exists():
                resume(disk / "run")
            else:
                simulate(running.config(run={"eval_every": 1}), out=disk / "run")
            simulate(running.config(run={"eval_every": 1}), out=tmp_path / "straight")
            running.same(disk / "run", tmp_path / "straight")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_diverging_run_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    """Catches NaN that is saved, and a message that does not say whose, when and where."""
    keys = {"name": "standalone"}
    config = running.config(
        train={"lr": 1e12, "momentum": 0.0}, algorithm=keys, run={"checkpoint_every": 99, "rounds": 50}
    )
    with pytest.raises(DivergedError, match=r"client \d, round \d+: tensor 'model\.fc\d\.(weight|bias)' is not finite"):
        simulate(config, out=tmp_path / "run")
    manifest = json.loads((tmp_path / "run/checkpoint/manifest.json").read_text())["manifest"]
    assert manifest["round"] == len(running.lines(tmp_path / "run/rounds.jsonl")) - 1
    found = running.rows(tmp_path / "run/states")
    assert len(found) == manifest["states"]["count"] > 0
    for client, _, sha256, data in found:
        state = state_files.parse(data, sha256, f"client {client}", *Standalone.states)
        assert all(bool(torch.isfinite(v).all()) for v in state.model.values())
    with pytest.raises(DivergedError):  # it goes on from there, and comes to the same end
        resume(tmp_path / "run")
