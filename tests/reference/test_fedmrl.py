"""One round of FedMRL against the plain implementation."""

from functools import partial
from typing import Any

import plain
import pytest
import toy
from rounds_by_hand import IMAGE, RUNS, TOLERANCE, TRAINING, batches, pairs
from torch import nn

from polyfed.algorithms.fedmrl import FedMRL
from polyfed.models.cnn import CNN


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"weights": (0.5, 2.0), "lr_auxiliary": 0.02, "lr_projector": 0.2},
        {"mrl": False},
        {"projector": "mlp"},
        {"header": "local"},
        {"share": False},
    ],
    ids=["as in the paper", "weights and rates", "without MRL", "MLP projector", "local header", "nothing shared"],
)
def test_fedmrl(keys: dict[str, Any], precision: Any, driver: str) -> None:
    """Catches every fault of the card: order, slice, projector, rates, shared optimizers, the last client's model.

    And what does not travel of G kept as it was, or not kept at home.
    """
    train, settings = TRAINING["momentum, decay, clip"]
    algorithm = FedMRL(auxiliary="cnn5", rep_dim=4, **keys)
    widths = {0: ("cnn5", 6), 1: ("cnn2", 8), 2: ("cnn5", 6)}
    fed = toy.federation(
        algorithm,
        models=("cnn5(rep_dim=6)", "cnn2(rep_dim=8)"),
        shape=IMAGE,
        sizes=(11, 8, 6),
        train=train | {"epochs": 1},
    )
    game = toy.play(fed, precision=precision, driver=driver)
    with game.driver.placement.defaults():
        before = {k: game.private(k) for k in range(3)}
    theta = toy.copy(game.server.G)
    game.round()

    def cnn(name: str, rep_dim: int) -> nn.Module:
        channels, width = {"cnn5": (32, 500), "cnn2": (16, 2000)}[name]
        return CNN(IMAGE, channels2=channels, width1=width, rep_dim=rep_dim, num_classes=4)

    rates = [keys.get("lr_auxiliary", settings.lr), settings.lr, keys.get("lr_projector", settings.lr)]
    sent = []
    tolerance = TOLERANCE[precision] * (100 if driver == "batched" else 1)
    for k, width in widths.items():
        whole = {**before[k].G, **theta}
        G, F, P = plain.fedmrl_client(  # noqa: N806
            partial(cnn, "cnn5", 4), partial(cnn, *width), whole, dict(before[k].F), dict(before[k].P),
            pairs(batches(game, k, 1)), settings,
            rates=rates, m=algorithm.weights, mrl=algorithm.mrl,
        )  # fmt: skip
        toy.close(game.private(k).F, F, tolerance)
        toy.close(game.private(k).P, P, tolerance)
        toy.close(game.private(k).G, {name: G[name] for name in G if name not in theta}, tolerance)
        sent.append({name: G[name] for name in theta})
    toy.close(game.server.G, plain.mean(sent, [11, 8, 6]), tolerance)
