"""Three rounds of FedProto, two clients each, against plain loops, and the faults of released code that they catch."""

from functools import partial
from typing import Any

import plain
import pytest
import torch
import toy
from classes_by_hand import OfSums, begin, body, make, mean_over_holders, means, start, train
from rounds_by_hand import batches, pairs
from torch import Tensor
from torch.nn import functional

from polyfed.algorithms.fedproto import FedProto
from polyfed.blocks.classwise import class_counts, class_means, distance_to_class, representation
from polyfed.blocks.losses import cross_entropy
from polyfed.core.requests import each, exchange

TOLERANCE = 1e-10


def follow_fedproto(algorithm: FedProto, driver: str) -> None:
    game = begin(algorithm, driver, participation=0.67)
    models, prototypes = start(game, "model"), dict[str, Tensor]()
    mixed = False
    for round_ in (1, 2, 3):
        game.round()
        made = []
        for k in sorted(game.got[-1]):
            net: Any = plain.load(make(k), models[k])

            def loss(x: Tensor, y: Tensor, net: Any = net, prototypes: Any = prototypes) -> list[Tensor]:
                r = body(net, x)
                target = r.detach().clone()  # as the authors do: where there is no prototype, the distance to itself
                for row, label in enumerate(y.tolist()):
                    target[row] = prototypes.get(str(label), target[row])
                distance = functional.mse_loss(r, target)
                return [functional.cross_entropy(net(x), y) + algorithm.weight * distance]

            steps = pairs(batches(game, k, round_))
            mixed |= any(len({str(c) in prototypes for c in y.tolist()}) == 2 for _, y in steps)
            train([net], steps, loss)
            made.append(means(game, k, partial(body, net)))
            models[k] = plain.saved(net)
            toy.close(game.private(k).model, models[k], TOLERANCE)
            toy.close(game.got[-1][k].prototypes, made[-1], TOLERANCE)
        prototypes = prototypes | mean_over_holders(made)
        toy.close(game.server.prototypes, prototypes, TOLERANCE)
    assert mixed  # a batch with some classes that have a prototype, and some that have none


class Stale(FedProto):
    """HtFLlib's FedTGP: prototypes of the network as it was before the round."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        stale = yield from class_means(client, {"model": private.model}, representation)
        kept, _ = yield from super().client_round(private, msg, client)
        return kept, self.Upload(stale)


class OnlyHeld(FedProto):
    """The distance averaged over the examples with a prototype, not over the batch."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        x, y = batch
        r, table = nets["model"].represent(x), nets["prototypes"]
        share = table["held"][y].mean()
        distance = distance_to_class(r, y, table) / torch.where(share > 0, share, 1.0)
        return cross_entropy(nets["model"].classify(r), y) + self.weight * distance


class SummedPrototypes(OfSums, FedProto):
    """Sums of representations."""


class ByExamples(FedProto):
    """The paper's formula: a client weighs by its number of examples of the class."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        self.__dict__.setdefault("counts", {})[client.info.id] = class_counts(client)
        return (yield from super().client_round(private, msg, client))

    def server_round(self, server: Any, cohort: Any) -> Any:
        got = yield from exchange(cohort, self.Broadcast(server.prototypes), gather={"prototypes": each})
        sums, numbers = dict[str, Tensor](), dict[str, int]()
        for client, prototypes in got["prototypes"].items():
            for c, row in prototypes.items():
                n = self.__dict__["counts"][client][int(c)]
                sums[c], numbers[c] = sums.get(c, 0) + n * row, numbers.get(c, 0) + n
        return self.Server({**server.prototypes, **{c: sums[c] / numbers[c] for c in sums}}, server.classes)


class Forgets(FedProto):
    """HtFLlib: prototypes of classes that the cohort has not are gone."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        got = yield from exchange(cohort, self.Broadcast(server.prototypes), gather={"prototypes": each})
        return self.Server(mean_over_holders([*got["prototypes"].values()]), server.classes)


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_rounds(driver: str) -> None:
    """Catches a wrong loss, target, order of pass and training, or mean; sums over examples in place of means."""
    follow_fedproto(FedProto(weight=0.7), driver)


@pytest.mark.parametrize("faulty", [Stale, OnlyHeld, SummedPrototypes, ByExamples, Forgets])
def test_rounds_tell_the_faults_of_released_code(faulty: type[FedProto]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError):
        follow_fedproto(faulty(weight=0.7), "sequential")
