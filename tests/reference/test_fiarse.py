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


def follow_fiarse(cls: type[FIARSE], net: str, gate: Any, scope: Any, precision: Any, driver: str) -> None:
    keys, settings = TRAINING["sgd"]
    make, spec, shape = (
        (mlp, toy.MLP, (7,)) if net == "mlp" else (resnet8(net), f"resnet8(norm={net}, width=4)", (1, 8, 8))
    )
    sizes = (0.25, 0.5, 0.25)
    fed = toy.federation(
        cls(gate=gate, scope=scope, server_lr=0.7, unseen_capacities=()),
        models=(spec,), shape=shape, sizes=(11, 8, 6), train=keys, clients={"capacities": list(sizes)},
    )  # fmt: skip
    game = toy.play(fed, precision=precision, driver=driver)
    x0 = toy.copy(game.server.model)
    game.round()
    masked = plain.masked_names(make())
    assert sorted(game.server.masked) == sorted(masked)
    theta = [plain.thresholds(x0, masked, size, scope) for size in sizes]
    after = [plain.fiarse_client(make, x0, theta[k], pairs(batches(game, k, 1)), settings, gate) for k in range(3)]
    expected = plain.fiarse_server(x0, after, theta, 0.7)
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


def test_the_fault_of_released_code_is_seen() -> None:
    """Catches a comparison that would pass whatever is counted."""
    with pytest.raises(AssertionError, match="fc1"):
        follow_fiarse(CountsMovements, "mlp", "biased", "model", "fp64", "sequential")
