"""Two rounds of FedIN against the plain implementation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import plain
import pytest
import torch
import toy
from rounds_by_hand import IMAGE, RUNS, batches
from torch import nn

from polyfed.algorithms.fedin import FedIN
from polyfed.models.resnet import SIZES, ResNet


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("align", ["none", "local_primary", "in_primary_sum", "always"])
def test_fedin(align: Any, precision: Any, driver: str) -> None:
    """Catches a pair that is not the donor's, IN steps that reach stem, head or statistics, owners counted wrong."""
    # Batches of four at least: BatchNorm over two examples of 1x1 maps knows only signs, and amplifies rounding.
    keys, settings = (
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01, "epochs": 1, "batch_size": 6},
        plain.Settings(0.01, 0.9, 0.01),
    )
    if precision == "fp32":  # one step in each round, before rounding has made any ReLU flip
        keys |= {"batch_size": 12}
    names = ("in-resnet10-small", "in-resnet14-small", "in-resnet10-small")
    fed = toy.federation(
        FedIN(align=align, weight=0.6, feature_batch=8),
        models=tuple(f"{name}(width=4)" for name in names), shape=IMAGE, sizes=(12, 10, 10), train=keys,
    )  # fmt: skip
    game = toy.play(fed, precision=precision, driver=driver)

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
            pair = None if given[k] is None else bank[given[k]]
            w = plain.fedin_client(make(k), own, batches(game, k, round_), pair, settings, align=align, weight=0.6)
            local = game.local(k, round_)
            order = torch.randperm(len(local.train), generator=local.rng.at("features").torch())[:8]
            with game.driver.placement.defaults():
                made[k] = plain.features(make(k), w, local.train.batch(order, dtype=game.driver.placement.dtype)[0])
            ended.append(w)
        layers, bank = plain.fedin_server(layers, ended, [12, 10, 10]), made
        toy.close(
            game.server.layers, layers, tolerance * (1 if round_ == 1 else 10), floor=0.1
        )  # fresh biases are tiny
        for k in range(3):
            toy.close({"s_in": game.server.bank[k].s_in, "s_out": game.server.bank[k].s_out},
                      {"s_in": bank[k][0], "s_out": bank[k][1]}, tolerance * 10)  # fmt: skip


def donor(given: tuple[Any, ...], bank: dict[int, Any], tolerance: float) -> int | None:
    """Whose pair it is, both halves of it."""
    for pair in given:
        for k, (s_in, s_out) in bank.items():
            if pair.s_in.shape == s_in.shape and (pair.s_in - s_in).norm() <= tolerance * s_in.norm():
                assert (pair.s_out - s_out).norm() <= tolerance * s_out.norm()
                return k
        raise AssertionError("a pair of nobody's")
    return None
