"""Two rounds of LG-FedAvg against plain loops, and the fault of released code that they catch."""

from typing import Any

import plain
import pytest
import toy
from classes_by_hand import HIDDEN, SETTINGS, SIZES, begin, make, start
from rounds_by_hand import batches, pairs

from polyfed.algorithms.lg_fedavg import LGFedAvg
from polyfed.blocks.aggregate import Mean
from polyfed.core.requests import exchange

TOLERANCE = 1e-10


def follow_lg(algorithm: LGFedAvg, driver: str) -> None:
    game = begin(algorithm, driver)
    bodies, head = start(game, "body"), toy.copy(game.server.head)
    for round_ in (1, 2):
        game.round()
        heads = []
        for k in range(3):
            last = f"fc{len(HIDDEN[k % 2]) + 1}"
            whole = {**bodies[k], f"{last}.weight": head["weight"], f"{last}.bias": head["bias"]}
            ended = plain.local_sgd(make(k), whole, pairs(batches(game, k, round_)), SETTINGS)
            heads.append({name: ended.pop(f"{last}.{name}") for name in ("weight", "bias")})
            bodies[k] = ended
            toy.close(game.private(k).body, ended, TOLERANCE)
        head = plain.mean(heads, SIZES)
        toy.close(game.server.head, head, TOLERANCE)


class Alike(LGFedAvg):
    """The authors' code: clients weigh alike."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        got = yield from exchange(cohort, self.Broadcast(server.head), gather={"head": Mean()})
        return self.Server(got["head"])


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_rounds(driver: str) -> None:
    """Catches a wrong loss, target, order of pass and training, or mean; sums over examples in place of means."""
    follow_lg(LGFedAvg(), driver)


@pytest.mark.parametrize("faulty", [Alike])
def test_rounds_tell_the_faults_of_released_code(faulty: type[LGFedAvg]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError):
        follow_lg(faulty(), "sequential")
