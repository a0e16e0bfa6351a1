"""Two rounds of FedKD against a loop written from its equations, and the faults of released code that it sees."""

from dataclasses import replace
from typing import Any

import numpy as np
import plain
import pytest
import torch
import toy
from auxiliary_by_hand import (
    AUXILIARY,
    DRIVERS,
    SETTINGS,
    SIZES,
    WIDTHS,
    batches,
    cross,
    descend,
    kl,
    net,
    privates,
    start,
)
from torch import Tensor

from polyfed.algorithms.fedkd import FedKD
from polyfed.base import tree
from polyfed.blocks.lowrank import LowRank


def inside(mlp: Any, x: Tensor) -> tuple[Tensor, Any]:
    """A dense network up to its last layer, and that layer."""
    for number in range(1, mlp.depth):
        x = torch.relu(getattr(mlp, f"fc{number}")(x))
    return x, getattr(mlp, f"fc{mlp.depth}")


def truncated(matrix: Tensor, energy: float) -> tuple[Tensor, int]:
    """The nearest matrix of the smallest rank that holds this energy, by numpy; and how many numbers it takes."""
    flat = matrix.reshape(len(matrix), -1).numpy()
    u, s, v = np.linalg.svd(flat, full_matrices=False)
    r = next(r for r in range(1, len(s) + 1) if (s[:r] ** 2).sum() >= energy * (s**2).sum() or r == len(s))
    numbers = r * (sum(flat.shape) + 1)
    if numbers >= flat.size:
        return matrix, flat.size
    return torch.from_numpy((u[:, :r] @ np.diag(s[:r]) @ v[:r]).reshape(matrix.shape)), numbers


def fedkd(cls: type[FedKD], driver: str = "sequential") -> None:
    """Two rounds of it are two rounds by hand, and measured bytes the numbers that the ranks need."""
    game = start(cls(auxiliary=AUXILIARY, energy=(0.5, 0.8)), driver)
    before = privates(game)
    teachers = {k: toy.copy(p.F) for k, p in before.items()}
    maps = {k: toy.copy(p.W) for k, p in before.items()}
    G = toy.copy(game.server.G)  # noqa: N806
    shrunk = False
    for t in (1, 2):
        game.round()
        energy = 0.5 + 0.3 * t / 3
        updates = []
        for k in range(3):
            F, student = plain.load(net(WIDTHS[k]), teachers[k]), plain.load(net((10, 5)), G)  # noqa: N806
            W = maps[k]["weight"].clone().requires_grad_()  # noqa: N806
            assert W.shape == (WIDTHS[k][-1], 5)
            optimizer = SETTINGS.optimizer([*F.parameters(), *student.parameters(), W])
            for x, y in batches(game, k):
                (h_t, head_t), (h_s, head_s) = inside(F, x), inside(student, x)
                z, g = head_t(h_t), head_s(h_s)
                s = float((cross(z, y) + cross(g, y)).detach())
                hidden = (h_t - h_s @ W.T).square().mean() / s
                teach = cross(z, y) + kl(g.detach(), z) / s + hidden
                learn = cross(g, y) + kl(z.detach(), g) / s + hidden
                descend(optimizer, (teach, list(F.parameters())), (learn, list(student.parameters())), (hidden, [W]))
            teachers[k], maps[k] = plain.saved(F), {"weight": W.detach()}
            toy.close(game.private(k).F, teachers[k], 1e-9)
            toy.close(game.private(k).W, maps[k], 1e-9)
            update, numbers = {}, 0
            for name, value in plain.saved(student).items():
                update[name], count = (
                    truncated(value - G[name], energy) if value.dim() > 1 else (value - G[name], len(value))
                )
                numbers += count
            updates.append(update)
            assert game.played[-1].reports[k].up.values == 8 * numbers
            shrunk |= numbers < sum(value.numel() for value in G.values())
        mean = plain.mean(updates, SIZES)
        G = {name: v + (truncated(mean[name], energy)[0] if v.dim() > 1 else mean[name]) for name, v in G.items()}  # noqa: N806
        toy.close(game.server.G, G, 1e-9)
    assert shrunk


class GradientOfTheDenominator(FedKD):
    """s is not detached: a larger cross-entropy makes the rest smaller."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        h_t, h_s = nets["F"].represent(x), nets["G"].represent(x)
        z, g = nets["F"].classify(h_t), nets["G"].classify(h_s)
        s = cross(z, y) + cross(g, y)
        hidden = (h_t - h_s @ nets["W"]["weight"].T).square().mean()
        return s + (kl(z.detach(), g) + kl(g.detach(), z) + hidden) / s


class TwiceTheMap(FedKD):
    """The hidden term is counted in both losses and nothing is detached: all of it counts twice."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        h_t, h_s = nets["F"].represent(x), nets["G"].represent(x)
        hidden = (h_t - h_s @ nets["W"]["weight"].T).square().mean()
        s = cross(nets["F"].classify(h_t), y) + cross(nets["G"].classify(h_s), y)
        return FedKD.loss(self, nets, batch) + hidden / s.detach()


class TruncatesWeights(FedKD):
    """The student's weights are cut to a low rank, not its update."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        kept, up = yield from super().client_round(private, msg, client)
        after = tree.add(kept.G, up.update.full(kept.G))
        cut = LowRank.of(after, msg.energy).full(after)
        return kept, replace(up, update=LowRank.of(tree.sub(cut, kept.G), 1.0))


@DRIVERS
def test_rounds_are_those_of_the_equations(driver: str) -> None:
    fedkd(FedKD, driver)


@pytest.mark.parametrize("faulty", [GradientOfTheDenominator, TwiceTheMap, TruncatesWeights])
def test_the_faults_of_released_code_are_seen(faulty: type[FedKD]) -> None:
    with pytest.raises(AssertionError):
        fedkd(faulty)
