"""One round of adaptive FedMRL against a loop written from its equations, and a fault that it sees."""

from functools import partial
from typing import Any

import plain
import pytest
import torch
import toy
from auxiliary_by_hand import (
    AUXILIARY,
    DRIVERS,
    SETTINGS,
    WIDTHS,
    batches,
    cross,
    forward,
    held,
    leaves,
    privates,
    start,
)
from torch import Tensor

from polyfed.algorithms.fedmrl import FedMRL
from polyfed.algorithms.fedmrl_adaptive import FedMRLAdaptive
from polyfed.base import tree
from polyfed.blocks.submodel import put
from polyfed.core.requests import each, exchange


def losses_at(
    theta: dict[str, Tensor], w: dict[str, Tensor], phi: dict[str, Tensor], depth: int, ladder: list[int], batch: Any
) -> list[Tensor]:
    """CE of both headers with G cut at each width, from products of slices."""
    x, y = batch
    small, large = forward(theta, x, 2), forward(w, x, depth)
    found = []
    for m in ladder:
        fused = small[:, :m] @ phi["fc1.weight"][:, :m].T + large @ phi["fc1.weight"][:, 5:].T + phi["fc1.bias"]
        coarse = fused[:, :m] @ theta["fc3.weight"][:, :m].T + theta["fc3.bias"]
        fine = fused @ w[f"fc{depth + 1}.weight"].T + w[f"fc{depth + 1}.bias"]
        found.append(cross(coarse, y) + cross(fine, y))
    return found


def fedmrl_adaptive(cls: type[FedMRLAdaptive], driver: str = "sequential") -> None:
    """One round of it is one by hand: three clients at three widths."""
    algorithm = cls(auxiliary=AUXILIARY, rep_dim=5, granularities=(2, 3), holdout=0.4, tolerance=0.05, patience=1)
    game = start(algorithm, driver)
    held_widths = {0: 2, 1: 5, 2: 3}
    game.server = type(game.server)(game.server.G, game.server.shapes, {0: 2, 2: 3})
    before = privates(game)
    theta = toy.copy(game.server.G)
    game.round()
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    count = {name: torch.zeros_like(value) for name, value in theta.items()}
    for k, d in held_widths.items():
        G = leaves(theta)  # noqa: N806
        F, P = leaves(before[k].F), leaves(before[k].P)  # noqa: N806
        optimizer = SETTINGS.optimizer([*G.values(), *F.values(), *P.values()])
        ladder = [m for m in (2, 3, 5) if m <= d]
        losses = partial(losses_at, G, F, P, len(WIDTHS[k]), ladder)
        for batch in batches(game, k):
            optimizer.zero_grad()
            torch.stack(losses(batch)).mean().backward()
            optimizer.step()
        toy.close(game.private(k).F, {n: v.detach() for n, v in F.items()}, 1e-9)
        toy.close(game.private(k).P, {n: v.detach() for n, v in P.items()}, 1e-9)
        values = [float(v.detach()) for v in losses(held(game, k))]
        chosen = next(m for m, v in zip(ladder, values, strict=True) if v <= 1.05 * min(values))
        wider = {2: 3, 3: 5, 5: 5}[d]
        assert game.server.widths[k] == (wider if chosen == d else chosen)
        for name, value in G.items():
            block = tuple(slice(d) if size == 5 else slice(None) for size in value.shape)  # 5 is D, and nothing else
            total[name][block] += SIZES_LEFT[k] * value.detach()[block]
            count[name][block] += SIZES_LEFT[k]
    expected = {name: torch.where(count[name] > 0, total[name] / count[name], theta[name]) for name in theta}
    toy.close(game.server.G, expected, 1e-9)


#: Training examples without the 40 % that are held out.
SIZES_LEFT = [12 - 5, 9 - 4, 7 - 3]


class ZerosCount(FedMRLAdaptive):
    """Who does not hold a coordinate counts as a zero."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        gather = {"G": each, "num_examples": each, "width": each}
        got = yield from exchange(cohort, lambda client: self.message_for(server, client), gather=gather)
        models = [put(model, None, tree.shapes(server.G)) for model in got["G"].values()]
        return self.Server(plain.mean(models, [*got["num_examples"].values()]), server.shapes, got["width"])


@DRIVERS
def test_a_ladder_of_one_width_is_fedmrl(driver: str) -> None:
    """Catches a loss of another scale, and masks that change numbers: bitwise the same small model as FedMRL's."""
    adaptive = start(FedMRLAdaptive(auxiliary=AUXILIARY, rep_dim=5, granularities=(5,), holdout=0.01), driver)
    ordinary = start(Held(auxiliary=AUXILIARY, rep_dim=5), driver)
    for _ in (1, 2):
        adaptive.round()
        ordinary.round()
    toy.close(adaptive.server.G, toy.copy(ordinary.server.G), 1e-14)
    for k in range(3):
        toy.close(adaptive.private(k).P, toy.copy(ordinary.private(k).P), 1e-14)


class Held(FedMRL):
    """FedMRL that trains on as few examples."""

    holdout = 0.01


@DRIVERS
def test_rounds_are_those_of_the_equations(driver: str) -> None:
    fedmrl_adaptive(FedMRLAdaptive, driver)


@pytest.mark.parametrize("faulty", [ZerosCount])
def test_the_faults_of_released_code_are_seen(faulty: type[FedMRLAdaptive]) -> None:
    with pytest.raises(AssertionError):
        fedmrl_adaptive(faulty)
