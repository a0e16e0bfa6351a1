"""Two rounds of FML against plain loops, and the faults of released code that they catch."""

from functools import partial
from typing import Any

import plain
import pytest
import toy
from classes_by_hand import L, begin, make, network, start, train
from rounds_by_hand import batches, pairs
from torch import Tensor
from torch.nn import functional

from polyfed.algorithms.fml import FML
from polyfed.base import tree
from polyfed.blocks.losses import cross_entropy, kl_divergence
from polyfed.core.requests import exchange, fit

TOLERANCE = 1e-10


def follow_fml(algorithm: FML, driver: str) -> None:
    game = begin(algorithm, driver)
    privates, meme = start(game, "F"), toy.copy(game.server.G)

    def kl(teacher: Tensor, student: Tensor) -> Tensor:
        p, q = teacher.detach().softmax(1), student.softmax(1)
        return (p * (p.log() - q.log())).sum() / len(p)

    for round_ in (1, 2):
        game.round()
        memes = []
        for k in range(3):
            F, G = plain.load(make(k), privates[k]), plain.load(partial(network, (5,)), meme)  # noqa: N806

            def losses(x: Tensor, y: Tensor, F: Any = F, G: Any = G) -> list[Tensor]:  # noqa: N803
                z, g = F(x), G(x)
                return [
                    algorithm.alpha * functional.cross_entropy(z, y) + (1 - algorithm.alpha) * kl(g, z),
                    algorithm.beta * functional.cross_entropy(g, y) + (1 - algorithm.beta) * kl(z, g),
                ]

            train([F, G], pairs(batches(game, k, round_)), losses)
            privates[k] = plain.saved(F)
            memes.append(plain.saved(G))
            toy.close(game.private(k).F, privates[k], TOLERANCE)
            toy.close(game.got[-1][k].G, memes[k], TOLERANCE)
        meme = plain.mean(memes, [1, 1, 1])
        toy.close(game.server.G, meme, TOLERANCE)


class Undetached(FML):
    """HtFLlib, PFLlib: teachers learn to be imitated."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        z, g = nets["F"](batch[0]), nets["G"](batch[0])
        labels = self.alpha * cross_entropy(z, batch[1]) + self.beta * cross_entropy(g, batch[1])
        return labels + (1 - self.alpha) * kl_divergence(z, g) + (1 - self.beta) * kl_divergence(g, z)


class OverElements(FML):
    """HtFLlib, PFLlib: KL as a mean over classes too."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        z, g = nets["F"](batch[0]), nets["G"](batch[0])
        labels = self.alpha * cross_entropy(z, batch[1]) + self.beta * cross_entropy(g, batch[1])
        terms = (1 - self.alpha) * kl_divergence(z, g.detach()) + (1 - self.beta) * kl_divergence(g, z.detach())
        return labels + terms / L


class NeverForked(FML):
    """The authors' script: without fork and merge every client goes on with a meme of its own."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        memes = self.__dict__.setdefault("memes", {})
        own = self.Broadcast(memes.get(client.info.id, msg.G))
        fitted = yield from fit(client, self.predictor_parts(private, own, client), loss=self.loss)
        memes[client.info.id] = fitted.parts["G"]
        return self.Private(fitted.parts["F"]), self.Upload(fitted.parts["G"])


class Unmerged(FML):
    """The same at the server: the meme stays what it was."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        yield from exchange(cohort, self.Broadcast(server.G))
        return server


class Summed(FML):
    """A merge onto a network that was not set to zero."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        new = yield from super().server_round(server, cohort)
        return self.Server(tree.add(server.G, new.G))


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_rounds(driver: str) -> None:
    """Catches a wrong loss, target, order of pass and training, or mean; sums over examples in place of means."""
    follow_fml(FML(auxiliary="mlp(hidden=(5,))", alpha=0.3, beta=0.8), driver)


@pytest.mark.parametrize("faulty", [Undetached, OverElements, NeverForked, Unmerged, Summed])
def test_rounds_tell_the_faults_of_released_code(faulty: type[FML]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError):
        follow_fml(faulty(auxiliary="mlp(hidden=(5,))", alpha=0.3, beta=0.8), "sequential")
