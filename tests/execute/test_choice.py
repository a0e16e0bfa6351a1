"""The rule of `driver = "auto"`: its table, that nothing but the configuration enters it, and that it is followed."""

from __future__ import annotations

import builtins
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import running
import torch
import toy
from torch import Tensor, nn

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedmrl import FedMRL
from polyfed.core.clients import ClientInfo
from polyfed.core.plan import LocalSGD
from polyfed.execute import choice
from polyfed.execute.choice import RULES, Chosen, ExecutionChoice, choose
from polyfed.models.split import SplitModel
from polyfed.parallel.setup import execution_choice
from polyfed.rounds.federation import prepare
from polyfed.simulation.simulate import simulate

IMAGE = (1, 16, 16)


def models(spec: str, shape: tuple[int, ...] = IMAGE) -> dict[str, SplitModel]:
    """The network of a client under FedAvg."""
    fed = toy.federation(FedAvg(), models=(spec,), shape=shape, sizes=(4,))
    return dict(fed.local(0, 1).models)


def own(make: Any, shape: tuple[int, ...], classifier: str = "head") -> dict[str, SplitModel]:
    """A network of one's own."""
    return {"model": SplitModel(make.__name__, make, input_shape=shape, classifier=classifier)}


class Waves(nn.Module):
    """Convolutions over time: (B, 9, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv1d(9, 16, 5)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu().mean(2))


class Tokens(nn.Module):
    """Attention: dense weights, each of which meets all 64 tokens of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x)
        return self.head((torch.softmax(query @ x.transpose(1, 2), -1) @ x).mean(1))


class Dropping(nn.Module):
    """Dropout between two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Scaled(nn.Module):
    """Refuses the zeros that are counted with; no cut goes through it, so that it may look at its data."""

    def forward(self, x: Tensor) -> Tensor:
        if not bool(x.any()):
            raise ValueError("no signal")
        return x / x.abs().max()


class Picky(nn.Module):
    """Cannot be run on zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled()
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scaled(x))


def waves() -> nn.Module:
    return Waves()


def tokens() -> nn.Module:
    return Tokens()


def dropping() -> nn.Module:
    return Dropping()


def picky() -> nn.Module:
    return Picky()


PLAN = LocalSGD(batch_size=10, lr=0.1)


@pytest.mark.parametrize(
    ("nets", "shape", "batch", "together", "kind", "execution", "size", "layout"),
    [
        (lambda: models("mlp(hidden=(200, 100))"), IMAGE, 10, 10, "dense", "stacked", 16, "sequential"),
        (lambda: models("mlp(hidden=(200, 100))"), IMAGE, 250, 10, "dense", "stacked", 16, "sequential"),
        (lambda: models("mlp(hidden=(2000, 250))"), IMAGE, 10, 10, "dense", "stacked", 3, "sequential"),
        (lambda: models("mlp(hidden=(2000, 2000))"), IMAGE, 10, 10, "dense", "sequential", 1, "sequential"),
        (lambda: models("mlp(hidden=(12, 6))", (7,)), (7,), 10, 2, "dense", "stacked", 16, "sequential"),
        (lambda: models("mlp(hidden=(12, 6))", (7,)), (7,), 10, 1, "dense", "sequential", 1, "sequential"),
        (lambda: models("mlp(hidden=(12, 6))", (7,)), (7,), 10, 1.9, "dense", "sequential", 1, "sequential"),
        (lambda: models("resnet8(width=2)"), IMAGE, 4, 8, "images", "stacked", 32, "channels-last"),
        (lambda: models("resnet8(width=2)"), IMAGE, 4, 7, "images", "channels-last", 1, "channels-last"),
        (lambda: models("resnet8(width=2)"), IMAGE, 400, 8, "images", "channels-last", 1, "channels-last"),
        (lambda: models("cnn5", (3, 32, 32)), (3, 32, 32), 64, 50, "images", "channels-last", 1, "channels-last"),
        (lambda: own(waves, (9, 128)), (9, 128), 10, 8, "other", "stacked", 16, "sequential"),
        (lambda: own(waves, (9, 128)), (9, 128), 10, 7, "other", "sequential", 1, "sequential"),
        (lambda: own(waves, (9, 128)), (9, 128), 500, 8, "other", "sequential", 1, "sequential"),
        (lambda: own(tokens, (64, 8)), (64, 8), 10, 8, "other", "stacked", 16, "sequential"),
        (lambda: own(tokens, (64, 8)), (64, 8), 500, 8, "other", "sequential", 1, "sequential"),
        (lambda: own(dropping, (7,)), (7,), 10, 8, "dense", "sequential", 1, "sequential"),
    ],
)  # fmt: skip
def test_the_table(
    nets: Any, shape: tuple[int, ...], batch: int, together: float, kind: str, execution: str, size: int, layout: str
) -> None:
    """Catches a row that moves without its page: docs/performance.md has the same table."""
    made, plan = nets(), LocalSGD(batch_size=batch, lr=0.1)
    flops = choice.forward_flops(made, shape)
    assert flops is not None
    assert choice.kind_of_network(made, flops) == kind
    chosen = choose(made, plan, shape, together)
    assert (chosen.execution, chosen.size, chosen.layout) == (execution, size, layout)
    assert chosen.flops == 3 * flops * batch


@pytest.mark.parametrize(
    ("nets", "shape", "together", "execution", "size"),
    [
        (lambda: models("mlp(hidden=(12, 6))", (7,)), (7,), 2, "stacked", 32),
        (lambda: models("resnet8(width=2)"), IMAGE, 4, "stacked", 32),
        (lambda: models("resnet8(width=2)"), IMAGE, 3, "sequential", 1),
        (lambda: own(waves, (9, 128)), (9, 128), 2, "stacked", 32),
    ],
)
def test_a_gpu_has_a_rule_of_its_own(
    nets: Any, shape: tuple[int, ...], together: float, execution: str, size: int
) -> None:
    """Catches bounds of caches and cores on a GPU, where the number of steps counts at any size."""
    for batch in (10, 10_000):
        chosen = choose(nets(), LocalSGD(batch_size=batch, lr=0.1), shape, together, "cuda")
        assert (chosen.execution, chosen.size, chosen.layout) == (execution, size, "sequential")


def test_the_rule_is_that_of_the_configured_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rule that does not hear where the run computes."""
    fed = prepare(running.config(algorithm={"name": "standalone"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = replace(fed, config=running.config(algorithm={"name": "standalone"}, run={"device": "cuda"}))
    monkeypatch.setattr(
        choice, "RULES", {"cpu": RULES["cpu"], "cuda": {"dense": choice.Rule(float("inf"), 1, 3, "sequential")}}
    )
    assert execution_choice(there).of(fed.info(0)).size == 3
    assert execution_choice(fed).of(fed.info(0)).size != 3


def test_the_page_has_the_table() -> None:
    """Catches a bound that was measured again and is old in the documentation."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    named = {"dense": "dense", "images": "convolves images", "other": "anything else"}
    for device, rules in RULES.items():
        for kind, rule in rules.items():
            row = next(row for row in page.splitlines() if row.startswith(f"| {device.upper()}, {named[kind]}"))
            bound = "always" if rule.stacked_up_to == float("inf") else f"up to {rule.stacked_up_to / 1e6:.0f} MFLOP"
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert cells[1:] == [bound, str(rule.least), str(rule.size), f"`{rule.layout}`"], (device, kind)


def test_the_bound_is_that_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches FLOPs of an example, of a forward pass or of all clients that are compared with those of a step."""
    nets = models("resnet8(width=2)")
    flops = choice.forward_flops(nets, IMAGE)
    assert flops is not None
    step = 3 * flops * PLAN.batch_size
    for bound, execution in ((step, "stacked"), (step - 1, "channels-last")):
        monkeypatch.setattr(choice, "RULES", {"cpu": {"images": choice.Rule(bound, 2, 4, "channels-last")}})
        assert choose(nets, PLAN, IMAGE, 2).execution == execution


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [("mlp(hidden=(12, 6))", (7,), 2 * (7 * 12 + 12 * 6 + 6 * 4)), ("mlp(hidden=(5, 3))", IMAGE, 2 * (1280 + 15 + 12))],
)
def test_flops_are_the_hand_counts(spec: str, shape: tuple[int, ...], expected: int) -> None:
    """Catches a count of two examples, and multiply-adds that count once."""
    assert choice.forward_flops(models(spec, shape), shape) == expected


def test_all_networks_that_take_the_data_count_and_a_projector_does_not() -> None:
    """Catches half of a client's work that is forgotten, and a part whose input is no example."""
    fed = toy.federation(
        FedMRL(auxiliary="cnn5", rep_dim=4), models=("mlp(hidden=(12, 6))",), shape=IMAGE, sizes=(4, 4)
    )
    parts = fed.local(0, 1).models
    taking = [model for model in parts.values() if model.input_shape == IMAGE]
    assert len(taking) == 2 < len(parts)
    both = choice.forward_flops(parts, IMAGE)
    assert both == sum(choice.forward_flops({"model": model}, IMAGE) or 0.0 for model in taking)
    assert choice.kind_of_network(parts, both or 0.0) == "images", "one that convolves is enough"


def test_what_cannot_be_counted_runs_one_by_one() -> None:
    """Catches a network of somebody's own that ends the run, or that is stacked on a guess."""
    assert choose(own(picky, (7,)), PLAN, (7,), 8) == Chosen("sequential", 1, "sequential", None)


def test_choosing_moves_no_random_stream_and_no_mode() -> None:
    """Catches a count that draws from what training draws from."""
    nets = own(dropping, (7,))
    before = torch.random.get_rng_state()
    choose(nets, PLAN, (7,), 8)
    assert torch.equal(torch.random.get_rng_state(), before)


def refuse(name: str) -> Any:
    def asked(*_: Any, **__: Any) -> Any:
        pytest.fail(f"{name} was read")

    return asked


def test_no_clock_and_no_free_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stopwatch, or a machine, that decides about numbers."""
    cases = [(models("resnet8(width=2)"), IMAGE), (models("mlp(hidden=(12, 6))", (7,)), (7,))]
    cases.append((own(waves, (9, 128)), (9, 128)))
    expected = [choose(nets, PLAN, shape, 4) for nets, shape in cases]
    opened = builtins.open

    def watched(file: Any, *given: Any, **keys: Any) -> Any:
        assert not str(file).startswith(("/proc", "/sys")), file
        return opened(file, *given, **keys)

    with monkeypatch.context() as patch:
        for name in ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "process_time"):
            patch.setattr(time, name, refuse(f"time.{name}"))
        for name in ("sysconf", "cpu_count", "sched_getaffinity", "getloadavg"):
            if hasattr(os, name):
                patch.setattr(os, name, refuse(f"os.{name}"))
        patch.setattr(torch.cuda, "mem_get_info", refuse("torch.cuda.mem_get_info"))
        patch.setattr(torch, "get_num_threads", refuse("torch.get_num_threads"))
        patch.setattr(builtins, "open", watched)
        if sys.platform == "linux":
            patch.setattr(Path, "read_text", refuse("a file"))
        found = [choose(nets, PLAN, shape, 4) for nets, shape in cases]
    assert found == expected


@pytest.mark.parametrize(
    ("clients", "expected"),
    [
        ({"count": 8, "participation": 1.0}, {"stacked"}),
        ({"count": 8, "participation": 0.25}, {"stacked"}),
        ({"count": 8, "participation": 0.125}, {"sequential"}),
        ({"count": 1, "participation": 1.0}, {"sequential"}),
        # Two of a cohort's four are of each network; of four networks one client each comes.
        ({"count": 8, "participation": 0.5, "models": ["mlp(hidden=(9,))", "mlp(hidden=(8,))"]}, {"stacked"}),
        ({"count": 8, "participation": 0.5, "models": [f"mlp(hidden=({k},))" for k in range(5, 9)]}, {"sequential"}),
        ({"count": 8, "participation": 0.25, "capacities": [1.0, 0.5]}, {"sequential"}),
        ({"count": 8, "participation": 0.5, "capacities": [1.0, 0.5]}, {"stacked"}),
    ],
)
def test_a_client_that_is_alone_of_its_kind_is_not_stacked(clients: dict[str, Any], expected: set[str]) -> None:
    """Catches stacks of one: what counts is how many of a kind a cohort has on average, not how many there are."""
    fed = prepare(
        running.config(
            clients=clients,
            partition={"kind": "iid", "classes_per_client": None, "samples_per_client": 12},
            algorithm={"name": "fiarse" if "capacities" in clients else "standalone"},
        )
    )
    chosen = execution_choice(fed)
    assert {chosen.of(fed.info(k)).execution for k in range(clients["count"])} == expected


def test_a_kind_is_decided_once() -> None:
    """Catches a count of FLOPs at every unit of every round."""
    asked: list[ClientInfo] = []
    choices = ExecutionChoice(lambda client: asked.append(client) or Chosen("stacked", 4))
    for k in range(4):
        for capacity in (1.0, 0.5):
            assert choices.of(ClientInfo(k, capacity, "a")).size == 4
    assert [info.capacity for info in asked] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("model", "clients", "execution"),
    [
        ("mlp(hidden=(12, 8))", 4, "stacked"),
        ("mlp(hidden=(12, 8))", 1, "sequential"),
        ("cnn5", 4, "channels-last"),
    ],
)
def test_auto_follows_the_rule_and_says_so(tmp_path: Path, model: str, clients: int, execution: str) -> None:
    """Catches a choice that is not followed, or that the clients' log does not tell."""
    made = running.config(
        run={"driver": "auto", "rounds": 1, "eval_every": 1},
        clients={"count": clients, "models": [model], "participation": 1.0},
        train={"batch_size": 64} if model == "cnn5" else {},
        partition={"kind": "iid", "classes_per_client": None, "samples_per_client": 100},
        algorithm={"name": "fedavg"},
    )
    simulate(made, out=tmp_path / "run")
    trained = [row for row in running.lines(tmp_path / "run" / "clients.jsonl") if "execution" in row]
    assert {row["execution"] for row in trained} == {execution}
    assert not (tmp_path / "run" / "choices.json").exists()
