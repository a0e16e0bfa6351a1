"""Rounds of HeteroFL and FedRolex against plain modules with hooks, and the faults of released code that this sees."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import toy
import widths_by_hand as hand
from rounds_by_hand import RUNS, TOLERANCE, TRAINING, batches, pairs

from polyfed.algorithms.fedrolex import FedRolex
from polyfed.algorithms.heterofl import HeteroFL
from polyfed.blocks.aggregate import CoverageMean, OwnRows
from polyfed.models.mlp import MLP
from polyfed.models.resnet import ResNet

CAPACITIES = (1.0, 0.25, 0.25)
#: No client has class 3; the first lacks class 2, the last has class 2 alone beside class 0.
LABELS = ((0, 0, 1, 1, 0, 1, 0, 1), (1, 2, 2, 1, 2, 1), (0, 2, 2, 0, 0, 2))


def make(net: str, share: float) -> Any:
    if net == "mlp":
        return partial(MLP, (7,), hidden=(math.ceil(share * 12), math.ceil(share * 6)), num_classes=4)
    width = math.ceil(share * 4)
    return partial(ResNet, (1, 8, 8), stem="plain", blocks=(1, 1, 1), width=width, norm=net, num_classes=4)


def follow(algorithm: HeteroFL, net: str, precision: Any, driver: str, rounds: int = 2) -> None:
    keys, settings = TRAINING["sgd"]
    spec, shape = (toy.MLP, (7,)) if net == "mlp" else (f"resnet8(norm={net}, width=4)", (1, 8, 8))
    fed = toy.federation(
        algorithm, models=(spec,), shape=shape, labels=LABELS, train=keys, clients={"capacities": list(CAPACITIES)}
    )
    game = toy.play(fed, precision=precision, driver=driver)
    shares = [math.sqrt(c) for c in CAPACITIES]
    own = [sorted(set(labels)) for labels in LABELS]
    head = ("fc3.weight", "fc3.bias") if net == "mlp" else ("fc.weight", "fc.bias")
    for j in range(rounds):
        w0, old = toy.copy(game.server.model), game.server.statistics
        game.round()
        start = j if getattr(algorithm, "window", "static") == "rolling" else 0
        uploads = []
        for k, (capacity, share) in enumerate(zip(CAPACITIES, shares, strict=True)):
            w = hand.sliced({**w0, **hand_full(make(net, 1.0), old.get(str(capacity), {}))}, make(net, share), start)
            # BatchNorm's statistics are those of training where nobody asks for them: then nothing is scaled.
            rho = 1.0 if net == "batch" and not algorithm.calibrate else share
            trained = hand.train(
                make(net, share), w, pairs(batches(game, k, j + 1)), settings, rho, own[k], algorithm.absent
            )
            uploads.append({n: trained[n] for n in w0})
        expected = hand.average(w0, uploads, [start] * 3, own, head)
        limit = TOLERANCE[precision] * 100  # of two rounds and more: rounding in the first goes on in the next
        toy.close(game.server.model, expected, limit)
        for capacity, found in game.server.statistics.items():
            share, place = math.sqrt(float(capacity)), game.driver.placement
            asked = [k for k, c in enumerate(CAPACITIES) if str(c) == capacity]
            with place.defaults():
                data = [
                    t.batch(torch.arange(len(t)), dtype=place.dtype)[0] for t in (game.local(k).train for k in asked)
                ]
            full = {**game.server.model, **hand_full(make(net, 1.0), found)}
            toy.close(found, hand.statistics(make(net, share), hand.sliced(full, make(net, share), 0), data), limit)


def hand_full(make_full: Any, small: Any) -> Any:
    """Statistics at full size, the rest as a new module has it."""
    full = {n: v for n, v in make_full().state_dict().items() if n in small}
    out = {n: v.to(small[n].dtype) for n, v in full.items()}
    for name, value in small.items():
        out[name][: len(value)] = value
    return out


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("net", ["mlp", "batch", "group"])
def test_heterofl(net: str, precision: Any, driver: str) -> None:
    """Catches wrong slices, Scalers, masks, rows and counts, and statistics of another width, model or weight."""
    follow(HeteroFL(unseen_capacities=()), net, precision, driver)


@pytest.mark.parametrize("absent", ["zero", "kept"])
def test_heterofl_with_other_masks(absent: Any) -> None:
    """Catches a switch that does nothing."""
    follow(HeteroFL(absent=absent), "mlp", "fp64", "sequential")


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("net", ["mlp", "batch", "static"])
def test_fedrolex(net: str, precision: Any, driver: str) -> None:
    """Catches windows that stand still, move otherwise in one of two coupled layers, or do not wrap around."""
    follow(FedRolex(), net, precision, driver, rounds=4 if net == "mlp" else 2)


class ZeroFilled(HeteroFL):
    """The authors' code: classes without examples have the logit 0."""

    def loss(self, nets: Any, batch: Any) -> Any:
        return HeteroFL.loss(HeteroFL(absent="zero"), nets, batch)


class AllRows(HeteroFL):
    """Averages rows of classes that a client never saw."""

    def init_server(self, task: Any, rng: Any) -> Any:
        return HeteroFL.init_server(HeteroFL(own_rows=False), task, rng)


class Unscaled(HeteroFL):
    """Forgets the Scaler."""

    def loss(self, nets: Any, batch: Any) -> Any:
        ones = {n: torch.ones_like(v) for n, v in nets["rho"].params.items()}
        return super().loss({**nets, "rho": replace(nets["rho"], params=ones)}, batch)


@dataclass(frozen=True)
class Aliased(OwnRows):
    """FedRolex's counts: one object serves as a tensor's count and as the running one, so later clients weigh more."""

    def add(self, total: Any, client: Any, value: Any, upload: Any) -> Any:
        mean = OwnRows(self.part, None, self.default, self.head)
        for _ in range(client.id + 1):
            total = mean.add(total, client, value, upload)
        return total


class AliasedCounts(FedRolex):
    """Averages with those counts."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        steps = super().server_round(server, cohort)
        request: Any = next(steps)
        mean: CoverageMean = request.gather["model"]
        got = yield replace(request, gather={"model": Aliased(mean.part, None, mean.default, server.head)})
        try:
            steps.send(got)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("faulty", [ZeroFilled, AllRows, Unscaled, AliasedCounts])
def test_the_faults_of_released_code_are_seen(faulty: type[HeteroFL]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError, match="fc"):
        follow(faulty(), "mlp", "fp64", "sequential")
