"""One round of FIARSE against the plain implementation, and the fault of released code that it sees."""

from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
import toy
from rounds_by_hand import RUNS, TOLERANCE, TRAINING, batches, mlp, pairs, resnet8

from polyfed.algorithms.fiarse import FIARSE
from polyfed.blocks.aggregate import CoverageMean

ADAM = {
    "adam": ({"lr": 0.02, "optimizer": "adam", "weight_decay": 0.05}, plain.Settings(0.02, 0, 0.05, adam=True)),
}


def follow_fiarse(
    cls: type[FIARSE],
    net: str,
    gate: Any,
    scope: Any,
    precision: Any,
    driver: str,
    training: str = "sgd",
    macs: dict[str, int] | None = None,
    **more: Any,
) -> None:
    keys, settings = {**TRAINING, **ADAM}[training]
    make, spec, shape = (
        (mlp, toy.MLP, (7,)) if net == "mlp" else (resnet8(net), f"resnet8(norm={net}, width=4)", (1, 8, 8))
    )
    sizes = (0.25, 0.5, 0.25)
    fed = toy.federation(
        cls(gate=gate, scope=scope, server_lr=0.7, unseen_capacities=(), **more),
        models=(spec,), shape=shape, sizes=(11, 8, 6), train=keys, clients={"capacities": list(sizes)},
    )  # fmt: skip
    game = toy.play(fed, precision=precision, driver=driver)
    x0 = toy.copy(game.server.model)
    game.round()
    masked = plain.masked_names(make())
    assert sorted(game.server.masked) == sorted(masked)
    theta = [plain.thresholds(x0, masked, size, scope, more.get("groups", ()), macs) for size in sizes]
    sticky = more.get("sticky", True)
    after = [
        plain.fiarse_client(make, x0, theta[k], pairs(batches(game, k, 1)), settings, gate, sticky) for k in range(3)
    ]
    expected = plain.fiarse_server(x0, after, theta, 0.7, more.get("counts") == "nonzero")
    toy.close(game.server.model, expected, TOLERANCE[precision] * (100 if driver == "batched" else 1))
    untouched = {name: x0[name].abs() < min(t[name] for t in theta) for name in masked}
    assert sum(int(u.sum()) for u in untouched.values()) > 0
    for name, nobody in untouched.items():
        assert torch.equal(game.server.model[name][nobody], x0[name][nobody])


class Movements(CoverageMean):
    """Counts the clients whose change is not zero."""

    def add(self, total: Any, client: Any, value: Any, upload: Any) -> Any:
        moved = {name: m.masked_scatter(m, value[name] != 0) for name, m in self.part(client).items()}
        kept = {name: v[v != 0] if name in moved else v for name, v in value.items()}
        return CoverageMean(lambda _: moved).add(total, client, kept, upload)


class CountsMovements(FIARSE):
    """The authors' code: a holder whose weight did not move does not count."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        steps = super().server_round(server, cohort)
        request: Any = next(steps)
        got = yield replace(request, gather={"delta": Movements(request.gather["delta"].part)})
        try:
            steps.send(got)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("gate", ["biased", "released", "frozen"])
@pytest.mark.parametrize("net", ["mlp", "group", "batch"])
def test_fiarse(net: str, gate: Any, scope: Any, precision: Any, driver: str) -> None:
    """Catches a wrong threshold, gradient, mask, count or server rate; norm layers whole, coordinates nobody holds.

    With BatchNorm a server rate that scales running statistics too.
    """
    follow_fiarse(FIARSE, net, gate, scope, precision, driver)


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize(
    ("gate", "sticky"),
    [("biased", True), ("biased", False), ("released", True), ("released", False), ("frozen", True)],
)
@pytest.mark.parametrize("training", ["momentum, decay, clip", *ADAM])
def test_fiarse_with_an_optimizer_that_coasts(
    gate: Any, training: str, sticky: bool, precision: Any, driver: str
) -> None:
    """Catches momentum, moments or decay that move a weight below its threshold; and, not sticky, those that do not."""
    follow_fiarse(FIARSE, "mlp", gate, "model", precision, driver, training, sticky=sticky)


@pytest.mark.parametrize("net", ["mlp", "group"])
@pytest.mark.parametrize("macs", [False, True])
@pytest.mark.parametrize("scope", ["model", "layer", "stage", "groups"])
def test_fiarse_of_every_scope_and_measure(net: str, macs: bool, scope: Any) -> None:
    """Catches groups that share a threshold, and a budget of multiplications that is over- or underspent."""
    layers = ("fc1", "fc2", "fc3") if net == "mlp" else ("conv1", "layer1", "layer2", "layer3", "fc")
    groups = ((layers[0], layers[-1]), layers[1:-1]) if scope == "groups" else ()
    positions = {"fc": 1} if net == "mlp" else {"conv1": 64, "layer1": 64, "layer2": 16, "layer3": 4, "fc": 1}
    masked = plain.masked_names(mlp() if net == "mlp" else resnet8(net)())
    costs = {n: positions[next(p for p in positions if n.startswith(p))] for n in masked if n.endswith("weight")}
    follow_fiarse(
        FIARSE, net, "biased", scope, "fp64", "sequential",
        macs=costs if macs else None, groups=groups, capacity_in="macs" if macs else "parameters",
    )  # fmt: skip


@pytest.mark.parametrize(("precision", "driver"), RUNS)
def test_fiarse_with_counts_of_what_moved(precision: Any, driver: str) -> None:
    """Catches a mask count, as rows of dead units do not move: the released code's mean."""
    follow_fiarse(FIARSE, "mlp", "biased", "model", precision, driver, counts="nonzero")


@pytest.mark.parametrize("importance", ["gradient", "fisher"])
@pytest.mark.parametrize(("precision", "driver"), RUNS)
def test_fiarse_by_scores_from_uploads(importance: Any, precision: Any, driver: str) -> None:
    """Catches scores of one client, of the unaveraged round or of coordinates nobody held; and magnitude as score.

    Three rounds: by magnitude, as no coordinate has a score; by the scores of one round; by running means.
    """
    keys, settings = TRAINING["momentum, decay, clip"]
    sizes = (0.25, 0.5, 0.25)
    fed = toy.federation(
        FIARSE(importance=importance, memory=0.8, unseen_capacities=()),
        models=(toy.MLP,), shape=(7,), sizes=(11, 8, 6), train=keys, clients={"capacities": list(sizes)},
    )  # fmt: skip
    game = toy.play(fed, precision=precision, driver=driver)
    masked, scores = plain.masked_names(mlp()), dict[str, torch.Tensor]()
    for round_ in (1, 2, 3):
        x0 = toy.copy(game.server.model)
        masks = [plain.by_score(x0, scores, masked, size) for size in sizes]
        game.round()
        after = [
            plain.fiarse_client(mlp, x0, {}, pairs(batches(game, k, round_)), settings, "frozen", held=masks[k])
            for k in range(3)
        ]
        expected = plain.fiarse_server(x0, after, (), 1.0, masks=masks)
        toy.close(game.server.model, expected, TOLERANCE[precision] * (100 if driver == "batched" else 1))
        scores = plain.scored(x0, scores, after, masks, importance == "fisher", 0.8)
        toy.close(game.server.scores, scores, TOLERANCE[precision] * (100 if driver == "batched" else 1))


def test_the_fault_of_released_code_is_seen() -> None:
    """Catches a comparison that would pass whatever is counted."""
    with pytest.raises(AssertionError, match="fc1"):
        follow_fiarse(CountsMovements, "mlp", "biased", "model", "fp64", "sequential")
