"""Two rounds of FedIN against the plain implementation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import plain
import pytest
import torch
import toy
from rounds_by_hand import IMAGE, RUNS, batches
from torch import Tensor, nn

from polyfed.algorithms.fedin import FedIN
from polyfed.models.resnet import SIZES, ResNet


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("align", ["none", "local_primary", "in_primary_sum", "always"])
def test_fedin(align: Any, precision: Any, driver: str) -> None:
    """Catches a pair that is not the donor's, IN steps that reach stem, head or statistics, owners counted wrong."""
    follow(precision, driver, align=align)


@pytest.mark.parametrize("driver", ["sequential", "batched"])
@pytest.mark.parametrize(
    "keys",
    [
        {"granularity": "kernel"},
        {"granularity": "whole"},
        {"granularity": "whole", "align": "always"},
        {"vectors": True, "granularity": "kernel", "align": "local_primary"},
        {"norm": "running"},
        {"distance": "cosine"},
        {"distance": "smooth_l1"},
        {"distance": "standardised"},
        {"every": "step"},
        *(
            {"level": "round", "every": "step", "align": a}
            for a in ("none", "local_primary", "in_primary_sum", "always")
        ),
        {"level": "round", "granularity": "kernel"},
        {"level": "round", "granularity": "whole", "vectors": True, "norm": "running", "every": "step"},
        {"pool": 3},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_choices_of_the_reconstruction(keys: Any, driver: str) -> None:
    """Catches a choice that is not the one of the page: what is combined, when, with which statistics and distance."""
    follow("fp64", driver, **keys)


#: The alignments that do not use lambda.
WITHOUT = ("local_primary", "always")


def follow(precision: Any, driver: str, **keys: Any) -> None:
    """Play two rounds beside the plain implementation."""
    # Batches of four at least: BatchNorm over two examples of 1x1 maps knows only signs, and amplifies rounding.
    train, settings = (
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "epochs": 1, "batch_size": 6},
        plain.Settings(0.01, 0.9, 0.01),
    )
    if precision == "fp32":  # one step in each round, before rounding has made any ReLU flip
        train |= {"batch_size": 12}
    names = ("in-resnet10-small", "in-resnet14-small", "in-resnet10-small")
    keys = {"align": "in_primary_sum", "weight": 0.6, **keys}
    fed = toy.federation(
        FedIN(feature_batch=8, **{k: v for k, v in keys.items() if k != "weight" or keys["align"] not in WITHOUT}),
        models=tuple(f"{name}(width=4)" for name in names), shape=IMAGE, sizes=(12, 10, 10), train=train,
    )  # fmt: skip
    game = toy.play(fed, precision=precision, driver=driver)
    pool, each_step = keys.pop("pool", 1), keys.pop("every", "epoch") == "step"

    def make(k: int) -> Callable[[], nn.Module]:
        stem, blocks = SIZES[names[k]]
        return partial(ResNet, IMAGE, stem=stem, blocks=blocks, width=4, norm="batch", num_classes=4)

    layers = toy.copy(game.server.layers)
    bank: dict[int, Any] = {}
    tolerance = {"fp32": 3e-6, "fp64": 1e-11}[precision] * (100 if driver == "batched" else 1)
    for round_ in (1, 2):
        game.round()
        given = {k: donor(game.sent[-1][k].pairs, bank, tolerance) for k in range(3)}
        assert all((given[k] is not None) is (round_ == 2) and given[k] != k for k in range(3))
        ended, made = [], {}
        for k in range(3):
            own = {name: layers[name] for name in make(k)().state_dict()}
            pair = None if given[k] is None else (wide(bank[given[k]][0], pool), bank[given[k]][1])
            seen = [(x, y, due or each_step) for x, y, due in batches(game, k, round_)]
            w = plain.fedin_client(make(k), own, seen, pair, settings, **keys)
            local = game.local(k, round_)
            order = torch.randperm(len(local.train), generator=local.rng.at("features").torch())[:8]
            with game.driver.placement.defaults():
                s_in, s_out = plain.features(make(k), w, local.train.batch(order, dtype=game.driver.placement.dtype)[0])
            made[k] = (narrow(s_in, pool), s_out)
            ended.append(w)
        layers, bank = plain.fedin_server(layers, ended, [12, 10, 10]), made
        toy.close(
            game.server.layers, layers, tolerance * (1 if round_ == 1 else 10), floor=0.1
        )  # fresh biases are tiny
        for k in range(3):
            toy.close({"s_in": game.server.bank[k].s_in, "s_out": game.server.bank[k].s_out},
                      {"s_in": bank[k][0], "s_out": bank[k][1]}, tolerance * 10)  # fmt: skip


def narrow(s_in: Tensor, pool: int) -> Tensor:
    """The mean of each window of maps (B, C, H, W); the last window of a row or column has what is left."""
    rows = [
        [s_in[:, :, y : y + pool, x : x + pool].mean((2, 3)) for x in range(0, s_in.shape[3], pool)]
        for y in range(0, s_in.shape[2], pool)
    ]
    return torch.stack([torch.stack(row, 2) for row in rows], 2)


def wide(s_in: Tensor, pool: int, side: int = 4) -> Tensor:
    """Maps (B, C, side, side) where each place has its window's mean."""
    rows = [torch.stack([s_in[:, :, y // pool, x // pool] for x in range(side)], 2) for y in range(side)]
    return torch.stack(rows, 2)


def donor(given: tuple[Any, ...], bank: dict[int, Any], tolerance: float) -> int | None:
    """Whose pair it is, both halves of it."""
    for pair in given:
        for k, (s_in, s_out) in bank.items():
            if pair.s_in.shape == s_in.shape and (pair.s_in - s_in).norm() <= tolerance * s_in.norm():
                assert (pair.s_out - s_out).norm() <= tolerance * s_out.norm()
                return k
        raise AssertionError("a pair of nobody's")
    return None
