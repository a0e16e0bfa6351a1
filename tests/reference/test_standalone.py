"""Two rounds of Standalone against the plain implementation."""

from typing import Any

import plain
import pytest
import toy
from rounds_by_hand import RUNS, TOLERANCE, TRAINING, batches, mlp, pairs

from polyfed.algorithms.standalone import Standalone


@pytest.mark.parametrize(("precision", "driver"), RUNS)
@pytest.mark.parametrize("training", TRAINING)
def test_standalone(training: str, precision: Any, driver: str) -> None:
    """Catches anything that travels after all, over two rounds: each client trains as if the others did not exist."""
    keys, settings = TRAINING[training]
    game = toy.play(toy.federation(Standalone(), train=keys), precision=precision, driver=driver)
    with game.driver.placement.defaults():
        models = {k: toy.copy(game.private(k).model) for k in range(3)}
    for round_ in (1, 2):
        game.round()
        for k in range(3):
            models[k] = plain.local_sgd(mlp, models[k], pairs(batches(game, k, round_)), settings)
            toy.close(game.private(k).model, models[k], 10 * TOLERANCE[precision])
