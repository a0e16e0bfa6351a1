"""One round of FedMRL-E against a loop written from its equations, and the faults of released code that it sees."""

from dataclasses import replace
from typing import Any

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
    forward,
    leaves,
    privates,
    start,
)
from torch import Tensor

from polyfed.algorithms.fedmrl_e import FedMRLE
from polyfed.blocks.aggregate import Mean
from polyfed.core.requests import exchange


def fedmrl_e(
    cls: type[FedMRLE], driver: str = "sequential", granularities: tuple[int, ...] = (2, 5), header: Any = "local"
) -> None:
    """One round of it is one by hand."""
    game = start(cls(auxiliary=AUXILIARY, rep_dim=5, granularities=granularities, header=header), driver)
    before = privates(game)
    theta, shared = toy.copy(game.server.G), toy.copy(game.server.H)
    assert sorted(theta) == ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"]
    game.round()
    sent, heads = [], []
    for k in range(3):
        last = f"fc{len(WIDTHS[k]) + 1}"
        begun = toy.copy(before[k].F)
        if header == "shared":  # the first d1 columns and the bias are everybody's
            begun[f"{last}.weight"][:, :5] = shared["weight"]
            begun[f"{last}.bias"][:] = shared["bias"]
        G, F, P = leaves(theta), leaves(begun), leaves(before[k].P)  # noqa: N806
        optimizer = SETTINGS.optimizer([*G.values(), *F.values(), *P.values()])
        for x, y in batches(game, k):
            small, large = forward(G, x, 2), forward(F, x, len(WIDTHS[k]))
            fused = torch.cat([small, large], 1) @ P["fc1.weight"].T + P["fc1.bias"]
            W, b = F[f"{last}.weight"], F[f"{last}.bias"]  # noqa: N806
            widths = [*(granularities or (5,)), fused.shape[1]]
            loss = torch.stack([cross(fused[:, :m] @ W[:, :m].T + b, y) for m in widths]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        toy.close(game.private(k).F, {n: v.detach() for n, v in F.items()}, 1e-9)
        toy.close(game.private(k).P, {n: v.detach() for n, v in P.items()}, 1e-9)
        sent.append({n: v.detach() for n, v in G.items()})
        heads.append({"weight": F[f"{last}.weight"].detach()[:, :5], "bias": F[f"{last}.bias"].detach()})
    toy.close(game.server.G, plain.mean(sent, SIZES), 1e-9)
    toy.close(game.server.H, plain.mean(heads, SIZES) if header == "shared" else {}, 1e-9)


@DRIVERS
def test_without_granularities_fedmrl_e_has_that_of_d1(driver: str) -> None:
    fedmrl_e(FedMRLE, driver, ())


class TwoOptimizers(FedMRLE):
    """B6: two headers share their storage, and each one's optimizer decays it."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        head = nets["F"].model.head(nets["F"].params)
        shared = sum(head["weight"][:, :m].square().sum() + head["bias"].square().sum() for m in self.nested)
        return super().loss(nets, batch) + 0.5 * SETTINGS.weight_decay * shared


class SliceOfTheInput(FedMRLE):
    """The prefixes are those of [R_G ; R_F], not of what the projector makes of it."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        joined = torch.cat([nets["G"].represent(x), nets["F"].represent(x)], dim=1)
        fused = nets["P"](joined)
        prefixes = [joined[:, : fused.shape[1]] * (torch.arange(fused.shape[1]) < m) for m in self.nested]
        return sum((cross(nets["F"].classify(r), y) for r in prefixes), cross(nets["F"].classify(fused), y))


class GoesOnWithItsOwn(FedMRLE):
    """What is shared of the header does not take the place of the client's own."""

    def predictor_parts(self, private: Any, msg: Any, client: Any) -> Any:
        return super().predictor_parts(private, replace(msg, H={}), client)


class HeadersAlike(FedMRLE):
    """Headers averaged without their clients' numbers of examples."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        gather = {"G": Mean("num_examples"), "H": Mean()}
        got = yield from exchange(cohort, self.Broadcast(server.G, server.H), gather=gather)
        return self.Server(got["G"], got["H"])


@DRIVERS
@pytest.mark.parametrize("header", ["local", "shared"])
def test_rounds_are_those_of_the_equations(header: str, driver: str) -> None:
    fedmrl_e(FedMRLE, driver, header=header)


@pytest.mark.parametrize(
    ("faulty", "header"),
    [
        (TwoOptimizers, "local"),
        (SliceOfTheInput, "local"),
        (GoesOnWithItsOwn, "shared"),
        (HeadersAlike, "shared"),
    ],
)
def test_the_faults_of_released_code_are_seen(faulty: type[FedMRLE], header: str) -> None:
    with pytest.raises(AssertionError):
        fedmrl_e(faulty, header=header)
