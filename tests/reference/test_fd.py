"""Two rounds of FD against plain loops, and the faults of released code that they catch."""

from typing import Any

import plain
import pytest
import torch
import toy
from classes_by_hand import OfSums, begin, make, mean_over_holders, means, start, train
from rounds_by_hand import batches, pairs
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.fd import FD
from polyfed.blocks.aggregate import by_name_mean
from polyfed.blocks.losses import cross_entropy

TOLERANCE = 1e-10


def follow_fd(algorithm: FD, driver: str) -> None:
    game = begin(algorithm, driver)
    models, sent = start(game, "model"), dict[int, dict[str, Tensor]]()
    for round_ in (1, 2):
        game.round()
        made = {}
        for k in range(3):
            targets = mean_over_holders([sent[j] for j in sent if j != k])
            net = plain.load(make(k), models[k])

            def loss(x: Tensor, y: Tensor, net: nn.Module = net, targets: Any = targets) -> list[Tensor]:
                logp = functional.log_softmax(net(x), dim=1)
                total = functional.nll_loss(logp, y)
                for row, label in zip(logp, y.tolist(), strict=True):
                    if str(label) in targets:
                        total = total - algorithm.weight * (targets[str(label)] * row).sum() / len(y)
                return [total]

            train([net], pairs(batches(game, k, round_)), loss)
            made[k] = means(game, k, lambda x, net=net: torch.softmax(net(x), dim=1))
            models[k] = plain.saved(net)
            toy.close(game.sent[-1][k].targets, targets, TOLERANCE)
            toy.close(game.private(k).model, models[k], TOLERANCE)
            toy.close(game.got[-1][k].means, made[k], TOLERANCE)
        sent = made


class SummedOutputs(OfSums, FD):
    """Sums of softmax outputs."""


class RawLogits(FD):
    """HtFLlib's clientfd.py at ca3e29a: averages of logits as targets of a cross-entropy."""

    def output(self, nets: Any, x: Tensor) -> Tensor:
        return nets["model"](x)


class WithItsOwn(FD):
    """HtFLlib: a client's own vector is in its target."""

    def targets(self, server: Any, client: Any) -> Any:
        every = [means.by_class for means in server.bank.values()]
        return by_name_mean(every, [1] * len(every), default={})


class FallsBack(FD):
    """The same: where there is no target, a client's own logits are (its own softmax would have a gradient of zero)."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        logits, rows = nets["model"](batch[0]), nets["targets"]["rows"][batch[1]]
        held = nets["targets"]["held"][batch[1]][:, None]
        soft = rows + (1 - held) * logits.detach()
        return cross_entropy(logits, batch[1]) + self.weight * cross_entropy(logits, soft)


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_rounds(driver: str) -> None:
    """Catches a wrong loss, target, order of pass and training, or mean; sums over examples in place of means."""
    follow_fd(FD(weight=0.7), driver)


@pytest.mark.parametrize("faulty", [SummedOutputs, RawLogits, WithItsOwn, FallsBack])
def test_rounds_tell_the_faults_of_released_code(faulty: type[FD]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError):
        follow_fd(faulty(weight=0.7), "sequential")
