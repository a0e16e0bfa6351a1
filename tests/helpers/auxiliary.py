"""A private network beside a small shared one: what the tests of such algorithms share."""

from dataclasses import replace
from typing import Any

import torch
import toy
from torch import Tensor

from polyfed.core.algorithm import Algorithm
from polyfed.rounds.federation import Federation
from polyfed.testing.compare import differences

IMAGE = (1, 16, 16)
MODELS = ("mlp(hidden=(12, 9))", "mlp(hidden=(11,))")
MLP = "mlp(hidden=(12, 7))"  # G: 256 inputs, 12, d1, 4 classes
BODY = 256 * 12 + 12


def federation(algorithm: Algorithm, sizes: tuple[int, ...] = (11, 8, 6), **more: Any) -> Federation:
    keys = {"models": MODELS, "train": {"epochs": 1, "momentum": 0.9}, **more}
    return toy.federation(algorithm, shape=IMAGE, sizes=sizes, **keys)


def relabelled(fed: Federation, rows: Any, *, noise: bool = False) -> Federation:
    """The same with other labels (and pictures) at these rows."""
    x, y = fed.dataset.x.clone(), fed.dataset.y.clone()
    rows = torch.as_tensor(rows)
    y[rows] = (y[rows] + 1) % 4
    if noise:
        x[rows] = 255 - x[rows]
    return Federation(fed.config, replace(fed.dataset, x=x, y=y), fed.partition, fed.algorithm)


def told(game: toy.Game) -> Any:
    """Everything that a run led to."""
    return game.server, {k: game.private(k) for k in range(3)}


def equal(a: Any, b: Any) -> bool:
    return not differences(a[0], b[0]) and not any(differences(a[1][k], b[1][k]) for k in a[1])


def body(p: Any, x: Tensor) -> Tensor:
    """A dense network before its last layer, by hand."""
    x = x.flatten(1)
    for layer in range(1, len(p) // 2):
        x = torch.relu(x @ p[f"fc{layer}.weight"].T + p[f"fc{layer}.bias"])
    return x


def last(p: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of its last layer."""
    return p[f"fc{len(p) // 2}.weight"], p[f"fc{len(p) // 2}.bias"]


def agree(got: Any, expected: dict[str, Tensor]) -> None:
    """The same predictors, the headline first, with the same logits."""
    assert list(got) == list(expected)
    for name, logits in expected.items():
        assert torch.allclose(got[name], logits, rtol=1e-5, atol=1e-6), name


def labels_of_tests_decide_nothing(algorithm: Algorithm) -> None:
    """Test examples may be anything: a run comes to the same."""
    fed = federation(algorithm)
    rows = [int(row) for k in range(3) for row in fed.partition.test(k)]
    assert equal(told(toy.play(fed, 3)), told(toy.play(relabelled(fed, rows, noise=True), 3)))


def held_out_are_not_trained_on(algorithm: Algorithm) -> None:
    """With the choice taken away, held-out examples may be anything, over several rounds; those trained on may not."""
    fed = federation(algorithm)
    rows = torch.cat([fed.local(k, 1).held_out.rows for k in range(3)])  # type: ignore[union-attr]
    assert len(rows) == 3 + 2 + 2
    assert equal(told(toy.play(fed, 2)), told(toy.play(relabelled(fed, rows, noise=True), 2)))
    trained = fed.local(0, 2).train.rows[:3]  # type: ignore[attr-defined]
    assert not equal(told(toy.play(fed, 2)), told(toy.play(relabelled(fed, trained), 2)))


def held_out_decide(algorithm: Algorithm) -> None:
    """Other labels of held-out examples lead elsewhere."""
    fed = federation(algorithm)
    rows = torch.cat([fed.local(k, 1).held_out.rows for k in range(3)])  # type: ignore[union-attr]
    assert not equal(told(toy.play(fed, 3)), told(toy.play(relabelled(fed, rows), 3)))


def weighs(algorithm: Algorithm, values: int) -> None:
    """Each client sends and receives that many values in a round."""
    game = toy.play(federation(algorithm), 1)
    for report in game.played[0].reports.values():
        assert report.up.values == report.down.values == 4 * values
