"""Sites with files of their own: a class, a column or a category means at one site what it means at all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_memory import Memory
from deploy_toy import Run, config, kept, same

from polyfed import simulate
from polyfed.data.conform import schema_of
from polyfed.data.schema import Schema
from polyfed.data.sources import load_dataset
from polyfed.deploy.client.local_setup import LocalSetup
from polyfed.deploy.client.node import answer
from polyfed.deploy.settings import NodeSettings
from polyfed.deploy.wire import headers
from polyfed.deploy.wire.headers import ReplyHeader, RequestHeader, TaskFacts

ROWS = 40


def site(path: Path, classes: tuple[str, ...], *, images: bool = False, seed: int = 0) -> Path:
    """A file whose class names are in the site's own order."""
    draws = np.random.default_rng(seed)
    x = draws.integers(0, 200, (ROWS, 8, 8), dtype=np.uint8) if images else draws.standard_normal((ROWS, 5))
    np.savez(path, x=x, y=np.arange(ROWS) % len(classes), classes=np.array(classes))
    return path


class Sites(Run):
    """A run of clients with files of their own."""

    def __init__(self, folder: Path, files: list[Path], *more: str, **node: Any) -> None:
        keys = ("clients.participation=1.0", f"clients.count={len(files)}", "rounds.min_clients=1", *more)
        super().__init__(
            folder, config("fedavg", *(k for k in keys if not k.startswith("rounds."))), ["rounds.min_clients=1"]
        )
        self.memory = Memory(
            {
                100 + k: NodeSettings(client=k, data=str(file), state_dir=str(folder / f"site-{k}"), **node)
                for k, file in enumerate(files)
            }
        )

    def agreed(self) -> headers.Agreement:
        """What the last request to train says."""
        told = [headers.load(RequestHeader, message.header) for message in self.memory.log]
        task = next(request.task for request in reversed(told) if request.task is not None)
        assert task.agreed is not None
        return task.agreed

    def setup(self, node: int) -> LocalSetup:
        """A client as it trains."""
        told = [headers.load(RequestHeader, message.header) for message in self.memory.log]
        task = next(request.task for request in reversed(told) if request.task is not None)
        return LocalSetup.fitting(self.memory.settings[node], self.config, task, self.experiment)


def test_a_class_has_one_number_at_all_sites(tmp_path: Path) -> None:
    """Catches sites that number their own classes: "ill" of one site is "well" of the other, and nothing fails."""
    run = Sites(tmp_path, [site(tmp_path / "a.npz", ("well", "ill")), site(tmp_path / "b.npz", ("ill", "well"))])
    run.serve()
    assert run.rows[-1]["cohort"] == [0, 1]
    assert not [row for row in run.events if row["event"] == "refused"]
    for node in (100, 101):
        found = run.setup(node).dataset
        raw = load_dataset("npz", path=Path(run.memory.settings[node].data or ""))
        assert [found.classes[k] for k in found.y] == [raw.classes[k] for k in raw.y]
        assert found.classes == ("well", "ill")


def test_a_site_that_lacks_a_class_takes_part(tmp_path: Path) -> None:
    run = Sites(tmp_path, [site(tmp_path / "a.npz", ("a", "b", "c")), site(tmp_path / "b.npz", ("a", "c"))])
    run.serve()
    assert run.rows[-1]["cohort"] == [0, 1]
    assert run.setup(101).dataset.classes == ("a", "b", "c")
    assert set(run.setup(101).dataset.y.tolist()) == {0, 2}


def test_a_class_of_its_own_is_refused_and_both_sides_say_what_differs(tmp_path: Path) -> None:
    run = Sites(tmp_path, [site(tmp_path / "a.npz", ("a", "b")), site(tmp_path / "b.npz", ("a", "b", "dead"))])
    run.serve()
    assert run.rows[-1]["cohort"] == [0]
    refused = run.event("refused")
    assert refused["client"] == 1
    assert "its classes differ" in refused["reason"]
    assert "dead" not in json.dumps(run.events)
    (line,) = (tmp_path / "site-1" / "errors.jsonl").read_text().splitlines()
    assert "classes 'dead', which are not among the agreed 'a', 'b'" in json.loads(line)["error"]


def test_the_configuration_gives_what_all_sites_have(tmp_path: Path) -> None:
    """Catches an agreement that depends on who joins first."""
    files = [site(tmp_path / "a.npz", ("a", "b")), site(tmp_path / "b.npz", ("dead", "a"))]
    run = Sites(tmp_path, files, 'data.agreed.classes=["dead","a","b"]')
    run.serve()
    assert run.rows[-1]["cohort"] == [0, 1]
    assert run.agreed().meaning.classes == ("dead", "a", "b")
    assert {run.setup(node).dataset.classes for node in (100, 101)} == {("dead", "a", "b")}


def test_pixels_are_scaled_alike(tmp_path: Path) -> None:
    """Catches a mean and a deviation that every site takes from its own images."""
    files = [site(tmp_path / f"{k}.npz", ("a", "b"), images=True, seed=k) for k in range(2)]
    run = Sites(tmp_path, files)
    run.serve()
    first = load_dataset("npz", path=files[0])
    assert {(run.setup(node).dataset.mean, run.setup(node).dataset.std) for node in (100, 101)} == {
        (first.mean, first.std)
    }


@pytest.mark.parametrize("classes", [("a", "b"), ("b", "a"), ("a", "secret")])
def test_private_names_are_compared_and_do_not_travel(classes: tuple[str, ...], tmp_path: Path) -> None:
    files = [site(tmp_path / "a.npz", ("a", "b")), site(tmp_path / "b.npz", classes)]
    run = Sites(tmp_path, files, tell=("scores", "costs"))
    run.serve()
    fits = classes == ("a", "b")
    assert run.rows[-1]["cohort"] == ([0, 1] if fits else [0])
    if not fits:
        assert "its classes differ" in run.event("refused")["reason"]
        assert "whose names are private" in (tmp_path / "site-1" / "errors.jsonl").read_text()
    assert run.agreed().meaning == Schema()
    for header, _ in run.memory.replies:
        about = headers.load(ReplyHeader, header).about
        assert about is None or about.agreement.meaning == Schema()


def sheet(path: Path, text: str) -> Path:
    """A table of forty rows: the header, and rows that repeat."""
    head, *rows = text.split()
    path.write_text("\n".join([head, *(rows[k % len(rows)] for k in range(ROWS))]) + "\n")
    return path


def test_tables_are_arranged_alike(tmp_path: Path) -> None:
    """Catches columns and categories that mean their position in a site's file; and refuses a site with one class."""
    files = [
        sheet(tmp_path / "a.csv", "age,sex,dx 30,f,ill 41,m,well 52,x,well"),
        sheet(tmp_path / "b.csv", "dx,sex,age ill,m,30 well,m,41"),
        sheet(tmp_path / "c.csv", "age,sex,dx 30,m,well 41,x,well"),
    ]
    run = Sites(tmp_path, files, data_options={"label": "dx"})
    run.serve()
    assert run.rows[-1]["cohort"] == [0, 1, 2]
    found = [run.setup(node).dataset for node in (100, 101, 102)]
    assert {data.classes for data in found} == {("ill", "well")}
    assert found[1].x[0].tolist() == [30, 0, 1, 0]
    assert found[2].x[1].tolist() == [41, 0, 0, 1]
    assert set(found[2].y.tolist()) == {1}


def test_a_table_with_a_category_of_its_own_is_refused(tmp_path: Path) -> None:
    files = [
        sheet(tmp_path / "a.csv", "age,sex,dx 30,f,ill 41,m,well"),
        sheet(tmp_path / "b.csv", "age,sex,dx 30,f,ill 41,x,well"),
        sheet(tmp_path / "c.csv", "age,bmi,dx 30,20,ill 41,21,well"),
    ]
    run = Sites(tmp_path, files, data_options={"label": "dx"})
    run.serve()
    assert run.rows[-1]["cohort"] == [0]
    reasons = {row["client"]: row["reason"] for row in run.events if row["event"] == "refused"}
    assert "its categories differ" in reasons[1]
    assert "its categories, columns differ" in reasons[2]
    logs = [(tmp_path / f"site-{k}" / "errors.jsonl").read_text() for k in (1, 2)]
    assert "'x' in column 'sex'" in logs[0]
    assert "lacks sex and has bmi" in logs[1]


def test_private_names_may_stand_in_the_configuration(tmp_path: Path) -> None:
    """Catches a site that follows what travelled, and forgets what the configuration gives."""
    files = [site(tmp_path / "a.npz", ("a", "b")), site(tmp_path / "b.npz", ("b", "a"))]
    run = Sites(tmp_path, files, 'data.agreed.classes=["b","a"]', tell=("scores",))
    run.serve()
    assert run.rows[-1]["cohort"] == [0, 1]
    assert {run.setup(node).dataset.classes for node in (100, 101)} == {("b", "a")}


def test_hashes_of_two_runs_cannot_be_compared() -> None:
    schema = Schema(classes=("a", "b"))
    assert schema.digests("run-1") != schema.digests("run-2")
    assert schema.digests("run-1") == schema.digests("run-1")


def test_a_resumed_server_keeps_the_agreement(tmp_path: Path) -> None:
    """Catches a server that lets another site propose after a restart: its model knows the first one's order."""
    files = [site(tmp_path / "a.npz", ("well", "ill")), site(tmp_path / "b.npz", ("ill", "well"))]
    run = Sites(tmp_path, files, "run.rounds=3")
    run.memory.online = {100}
    trained = 0

    def once(message: Any, go: Any) -> Any:
        nonlocal trained
        trained += headers.load(RequestHeader, message.header).kind == "train"
        if trained > 1:
            raise KeyboardInterrupt
        return go()

    run.memory.instead = once
    with pytest.raises(KeyboardInterrupt):
        run.serve()
    run.memory.instead = lambda message, go: go()
    run.memory.waiting.clear()
    run.memory.online = {101}
    run.memory.log.clear()
    run.serve()
    asked = headers.load(RequestHeader, run.memory.log[0].header)
    assert asked.agreed is not None, "the site is asked whether it fits"
    assert run.agreed().meaning.classes == ("well", "ill")
    assert run.setup(101).dataset.classes == ("well", "ill")


def test_tokens_stay_tokens_and_do_not_train_beside_numbers(tmp_path: Path) -> None:
    """Catches a server that takes whole numbers for features: an embedding would get floats."""
    draws = np.random.default_rng(0)
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", x=draws.integers(0, 9, (ROWS, 5)), y=np.arange(ROWS) % 2)
    run = Sites(tmp_path, [tmp_path / "a.npz", tmp_path / "b.npz"], "algorithm.name=standalone")
    own = {100: ("sequence_nets:Tokens", {"kind": "tokens"}), 101: ("mlp(hidden=(8,))", {})}
    for node, (model, options) in own.items():
        settings = run.memory.settings[node]
        run.memory.settings[node] = settings.model_copy(update={"data_options": options, "model": model})
    run.serve()
    assert run.setup(100).dataset.kind == "tokens"
    assert run.rows[-1]["cohort"] == [0]
    assert "not tokens, unlike" in run.event("refused")["reason"]


def test_a_site_may_have_a_parquet_file_or_a_folder_of_images(tmp_path: Path) -> None:
    """Catches a reader that a deployed site lacks."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    sheet(tmp_path / "a.csv", "age,dx 30,ill 41,well")
    pq.write_table(pa.table({"dx": ["well", "ill"] * 20, "age": list(range(40))}), tmp_path / "b.parquet")
    run = Sites(tmp_path / "tables", [tmp_path / "a.csv", tmp_path / "b.parquet"], data_options={"label": "dx"})
    run.serve()
    assert run.rows[-1]["cohort"] == [0, 1]
    assert run.setup(101).dataset.classes == ("ill", "well")
    draws = np.random.default_rng(0)
    for place, classes in (("c", ("cat", "dog")), ("d", ("dog", "cat"))):
        for k in range(12):
            folder = tmp_path / place / classes[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{k}.png")
    run = Sites(tmp_path / "images", [tmp_path / "c", tmp_path / "d"])
    run.serve()
    assert run.rows[-1]["cohort"] == [0, 1]
    assert len({(run.setup(node).dataset.mean, run.setup(node).dataset.classes) for node in (100, 101)}) == 1


def test_a_site_keeps_the_rows_of_a_patient_together(tmp_path: Path) -> None:
    """Catches a split that a simulation follows and a deployed site does not."""
    units = np.repeat(np.arange(ROWS // 4), 4)
    np.savez(
        tmp_path / "a.npz", x=np.random.default_rng(0).standard_normal((ROWS, 3)), y=np.arange(ROWS) % 2, units=units
    )
    run = Sites(tmp_path, [tmp_path / "a.npz"], "data.split=groups")
    run.serve()
    partition = run.setup(100).partition
    assert not set(units[partition.train(0)]) & set(units[partition.test(0)])


def test_a_site_may_have_rows_without_a_label(tmp_path: Path) -> None:
    """Catches a site that splits, trains or probes such rows otherwise than a simulation, or that lets them through to
    what learns from labels."""
    draws, own = np.random.default_rng(0), list[dict[str, Any]]()
    for k in range(2):
        y = np.where(draws.random(ROWS) < 0.6, "", np.array(["a", "b"])[np.arange(ROWS) % 2])
        own.append({"x": draws.standard_normal((ROWS, 2, 12)), "y": y})
        np.savez(tmp_path / f"{k}.npz", **own[-1], classes=np.array(["b", "a"][:: 1 - 2 * k]))
    both = {name: np.concatenate([arrays[name] for arrays in own]) for name in ("x", "y")}
    np.savez(tmp_path / "all.npz", **both, groups=np.repeat([0, 1], ROWS), classes=np.array(["b", "a"]))
    keys = (
        "data.dataset=npz",
        f"data.path={tmp_path / 'all.npz'}",
        'data.options={layout="NCT", unlabelled=true}',
        "data.image_size=none",
        "partition.kind=natural",
        "partition.samples_per_client=1000",
        'clients.models=["mlp(hidden=(9,))"]',
        "run.eval_every=2",
    )
    ssl = ("algorithm.name=fedmrl-ssl", "algorithm.auxiliary=mlp(hidden=(8,))", "algorithm.rep_dim=4")
    run = Sites(tmp_path, [tmp_path / "0.npz", tmp_path / "1.npz"], *keys, *ssl)
    run.serve()
    found = run.setup(101)
    y = found.dataset.strata
    assert found.dataset.num_unlabelled == (own[1]["y"] == "").sum() == (y[found.partition.train(0)] < 0).sum()
    simulate(run.config, out=tmp_path / "simulated")
    private, known = run.private(), kept(tmp_path / "simulated", run.config)
    assert all(same(private[client], known[client]) for client in range(2))
    summed = [json.loads((folder / "summary.json").read_text()) for folder in (run.folder, tmp_path / "simulated")]
    assert summed[0]["accuracy"] == summed[1]["accuracy"]
    refused = run.config.to_dict() | {"algorithm": {"name": "fedavg"}}
    asked = RequestHeader(kind="describe", experiment="one", config=refused)
    header, _ = answer(headers.dump(asked), None, run.memory.settings[100])
    assert (headers.load(ReplyHeader, header).error or "").startswith("ConfigError")
    np.savez(tmp_path / "1.npz", **own[1] | {"y": np.array(["a", *[""] * (ROWS - 1)])})
    asked = RequestHeader(kind="describe", experiment="two", config=run.config.to_dict())
    header, _ = answer(headers.dump(asked), None, run.memory.settings[101])
    assert (headers.load(ReplyHeader, header).error or "").startswith("DataError")


def test_the_results_name_the_agreed_classes(tmp_path: Path) -> None:
    run = Sites(tmp_path, [site(tmp_path / "a.npz", ("well", "ill"))], 'run.metrics=["accuracy", "sensitivity"]')
    run.serve()
    assert set(run.rows[-1]["metrics"]["sensitivity"]["pooled_by_class"]) == {"well", "ill"}


def test_a_task_of_other_data_is_refused(tmp_path: Path) -> None:
    settings = NodeSettings(client=0, data=str(site(tmp_path / "a.npz", ("a", "b"))), state_dir=str(tmp_path / "s"))
    found = LocalSetup.of(settings, config("fedavg"))
    facts = TaskFacts(input_shape=(7,), num_classes=2, agreed=found.agreement("x"))
    with pytest.raises(Exception, match=r"have shape \(5,\) in 2 classes; expected \(7,\) in 2"):
        LocalSetup.fitting(settings, config("fedavg"), facts, "x")
    right = LocalSetup.fitting(settings, config("fedavg"), facts.model_copy(update={"input_shape": (5,)}), "x")
    assert torch.equal(right.dataset.y, found.dataset.y)
    assert schema_of(found.dataset).classes == ("a", "b")
