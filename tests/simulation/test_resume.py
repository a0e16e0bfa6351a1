"""Runs that were interrupted or diverge, and what is refused when one is to go on."""

import json
from pathlib import Path
from typing import Any

import pytest
import running
import torch

from polyfed.algorithms.standalone import Standalone
from polyfed.base import files
from polyfed.base.errors import CheckpointError, DivergedError
from polyfed.rounds.callbacks import Interrupted, Quiet
from polyfed.simulation.simulate import resume, simulate
from polyfed.storage import run_dir, state_files
from polyfed.storage import state_store as store_module


class Broken(Quiet):
    """Fails as a bug in someone's own code would, after round 3."""

    def round_ended(self, row: Any) -> None:
        if row["round"] == 3:
            raise ZeroDivisionError("a bug")


def test_a_bug_in_somebodys_code_costs_no_finished_round(tmp_path: Path) -> None:
    """Catches rounds that only polyfed's own errors and Ctrl-C would save."""
    with pytest.raises(ZeroDivisionError):
        simulate(running.config(run={"rounds": 5, "checkpoint_every": 100}), out=tmp_path / "run", callbacks=[Broken()])
    rounds: list[int] = []

    class Count(Quiet):
        def round_ended(self, row: Any) -> None:
            rounds.append(row["round"])

    resume(tmp_path / "run", callbacks=[Count()])
    assert rounds == [4, 5]


def test_what_a_killed_write_left_is_swept(tmp_path: Path) -> None:
    """Catches temporary files that pile up over kills."""
    with pytest.raises(ZeroDivisionError):
        simulate(running.config(run={"rounds": 5}), out=tmp_path / "run", callbacks=[Broken()])
    leftover = tmp_path / "run" / "checkpoint" / ".server-round-9.safetensors.77.tmp"
    leftover.write_bytes(b"half")
    resume(tmp_path / "run")
    assert not leftover.exists()


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
        simulate(running.config(**sections), out=folder, callbacks=[Stop(2)])
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
        simulate(running.config(**one), out=tmp_path / "a", callbacks=[Stop(3)])
    resume(tmp_path / "a")
    simulate(running.config(**one), out=tmp_path / "b")
    running.same(tmp_path / "a", tmp_path / "b")


def test_a_complete_run_resumes_to_its_summary(tmp_path: Path) -> None:
    """Catches rounds beyond the last."""
    summary = simulate(running.config(run={"rounds": 2}), out=tmp_path).summary
    log = (tmp_path / "rounds.jsonl").read_bytes()
    again = resume(tmp_path).summary
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
    with pytest.raises(CheckpointError, match=r"written by another version of polyfed .layout 1, expected 3"):
        resume(paused)


def test_a_log_that_lost_lines_is_refused(paused: Path) -> None:
    """Catches a log with a hole."""
    (paused / "rounds.jsonl").write_bytes((paused / "rounds.jsonl").read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"shorter than the [\d,]+ bytes that the checkpoint expects"):
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
