"""Clients with some of eight classes: what the tests of algorithms that know of classes share."""

from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from polyfed.base.errors import ModelError
from polyfed.core.algorithm import Task
from polyfed.execute.local_training import bind

TWO = (toy.MLP, "mlp(hidden=(9, 6))")


def federation(algorithm: Any, **keys: Any) -> Any:
    """Clients with some of eight classes, unequally often, so that each lacks some; or with ``sizes`` examples."""
    dealt = {} if "sizes" in keys else {"labels": toy.LABELS}
    return toy.federation(algorithm, **{"models": TWO, "classes": 8, **dealt, **keys})


def inputs(count: int) -> Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(0))


def predicted(game: toy.Game, client: int, x: Tensor) -> dict[str, Tensor]:
    local, algorithm = game.federation.local(client, 1), game.federation.algorithm
    parts = algorithm.predictor_parts(game.private(client), algorithm.message_for(game.server, local.info), local)
    with torch.no_grad():
        return dict(algorithm.predict(bind(local.models, parts), x))


def needs_equal_heads(algorithm: Any) -> None:
    """A server refuses heads that it cannot run or mix, before a round of training, and networks it does not know."""
    fed = federation(algorithm, models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(ModelError, match=r"classifier is .*\(8, 6\).* but .*\(8, 5\)"):
        fed.algorithm.check(fed.task)
    with pytest.raises(ModelError, match=f"{algorithm.name} needs networks whose classifiers the server knows"):
        algorithm.check(Task((7,), 8))


def needs_equal_widths(algorithm: Any) -> None:
    """The same of representations."""
    fed = federation(algorithm, models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(ModelError, match=r"representation width is 6 in .* but 5 in"):
        fed.algorithm.check(fed.task)
    with pytest.raises(ModelError, match="needs networks whose width the server knows"):
        algorithm.check(Task((7,), 8))
