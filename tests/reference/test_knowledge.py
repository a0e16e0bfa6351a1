"""Two rounds of FD, FedProto, LG-FedAvg and FML against plain loops, and the faults of released code that they catch.

Clients have two architectures of one width and some of eight classes, unequally often: class 0 is client 0's alone,
class 3 is held by all, three times by client 0, class 7 is client 2's alone. FedProto plays three rounds of two each.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import plain
import pytest
import torch
import toy
from test_reference import batches, one_thread, pairs
from torch import Tensor, nn
from torch.nn import functional

from polyfed.algorithms.fd import FD
from polyfed.algorithms.fedproto import FedProto
from polyfed.algorithms.fml import FML
from polyfed.algorithms.lg_fedavg import LGFedAvg
from polyfed.base import tree
from polyfed.blocks.aggregate import by_name_mean
from polyfed.blocks.classwise import class_counts, class_means, distance_to_class
from polyfed.blocks.losses import cross_entropy, kl_divergence
from polyfed.core.algorithm import Algorithm
from polyfed.core.requests import exchange, fit
from polyfed.models.mlp import MLP

__all__ = ["one_thread"]

HIDDEN = ((12, 6), (9, 6))
TRAIN = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
SETTINGS = plain.Settings(0.1, 0.9, 0.01)
SIZES = tuple(map(len, toy.LABELS))
L = 8
TOLERANCE = 1e-10


def network(hidden: tuple[int, ...]) -> nn.Module:
    return MLP((7,), hidden=hidden, num_classes=L)


def make(client: int) -> Callable[[], nn.Module]:
    return partial(network, HIDDEN[client % 2])


def body(net: Any, x: Tensor) -> Tensor:
    """All but the last layer."""
    for number in range(1, net.depth):
        x = torch.relu(net.get_submodule(f"fc{number}")(x))
    return x


def begin(algorithm: Algorithm, driver: str, **clients: Any) -> toy.Game:
    models = tuple(f"mlp(hidden={hidden})" for hidden in HIDDEN)
    fed = toy.federation(algorithm, models=models, labels=toy.LABELS, classes=L, train=TRAIN, clients=clients)
    return toy.play(fed, precision="fp64", driver=driver)


def start(game: toy.Game, field: str) -> dict[int, plain.Weights]:
    """What the clients begin with."""
    with game.driver.placement.defaults():
        return {k: toy.copy(getattr(game.private(k), field)) for k in range(3)}


def train(modules: list[nn.Module], steps: list[Any], losses: Callable[[Tensor, Tensor], list[Tensor]]) -> None:
    """Each module descends the loss in its place, and no other."""
    optimizers = [SETTINGS.optimizer(module.parameters()) for module in modules]
    for x, y in steps:
        found = losses(x, y)
        grads = [
            torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
            for loss, module in zip(found, modules, strict=True)
        ]
        for module, grad in zip(modules, grads, strict=True):
            for p, g in zip(module.parameters(), grad, strict=True):
                p.grad = g
        for optimizer in optimizers:
            optimizer.step()


@torch.no_grad()
def means(game: toy.Game, client: int, rows: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The mean row of each class of a client."""
    train = game.local(client).train
    x, y = train.batch(torch.arange(len(train)), dtype=torch.float64)
    return {str(c): rows(x)[y == c].mean(0) for c in sorted(set(y.tolist()))}


def mean_over_holders(uploads: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = {name for upload in uploads for name in upload}
    return {name: torch.stack([upload[name] for upload in uploads if name in upload]).mean(0) for name in names}


class OfSums:
    """Sums over the examples of a class where means are due."""

    def client_round(self, private: Any, msg: Any, client: Any) -> Any:
        kept, up = yield from super().client_round(private, msg, client)  # type: ignore[misc]
        (rows,) = (getattr(up, field.name) for field in fields(up))
        counts = class_counts(client)
        return kept, type(up)({c: row * counts[int(c)] for c, row in rows.items()})


# ---------------------------------------------------------------------------------------------------------------- FD


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


# ---------------------------------------------------------------------------------------------------------- FedProto


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
        stale = yield from class_means(client, {"model": private.model}, self.represent)
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
        replies = yield from exchange(cohort, self.Broadcast(server.prototypes))
        sums, numbers = dict[str, Tensor](), dict[str, int]()
        for reply in replies:
            for c, row in reply.message.prototypes.items():
                n = self.__dict__["counts"][reply.client.id][int(c)]
                sums[c], numbers[c] = sums.get(c, 0) + n * row, numbers.get(c, 0) + n
        return self.Server({**server.prototypes, **{c: sums[c] / numbers[c] for c in sums}}, server.classes)


class Forgets(FedProto):
    """HtFLlib: prototypes of classes that the cohort has not are gone."""

    def server_round(self, server: Any, cohort: Any) -> Any:
        replies = yield from exchange(cohort, self.Broadcast(server.prototypes))
        return self.Server(mean_over_holders(replies.all("prototypes")), server.classes)


# --------------------------------------------------------------------------------------------------------- LG-FedAvg


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
        replies = yield from exchange(cohort, self.Broadcast(server.head))
        return self.Server(by_name_mean(replies.all("head"), [1] * len(replies), default={}))


# --------------------------------------------------------------------------------------------------------------- FML


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


# -------------------------------------------------------------------------------------------------------------- tests

MEME = {"auxiliary": "mlp(hidden=(5,))"}
FOLLOW: list[Any] = [
    (follow_fd, FD, {"weight": 0.7}, [SummedOutputs, RawLogits, WithItsOwn, FallsBack]),
    (follow_fedproto, FedProto, {"weight": 0.7}, [Stale, OnlyHeld, SummedPrototypes, ByExamples, Forgets]),
    (follow_lg, LGFedAvg, {}, [Alike]),
    (follow_fml, FML, {**MEME, "alpha": 0.3, "beta": 0.8}, [Undetached, OverElements, NeverForked, Unmerged, Summed]),
]


@pytest.mark.parametrize("driver", ["sequential", "batched"])
@pytest.mark.parametrize(("follow", "cls", "keys"), [case[:3] for case in FOLLOW], ids=[c[1].name for c in FOLLOW])
def test_rounds(follow: Any, cls: Any, keys: dict[str, Any], driver: str) -> None:
    """Catches a wrong loss, target, order of pass and training, or mean; sums over examples in place of means."""
    follow(cls(**keys), driver)


@pytest.mark.parametrize(
    ("follow", "faulty", "keys"),
    [pytest.param(case[0], fault, case[2], id=fault.__name__) for case in FOLLOW for fault in case[3]],
)
def test_rounds_tell_the_faults_of_released_code(follow: Any, faulty: Any, keys: dict[str, Any]) -> None:
    """Catches a comparison that would pass whatever is computed."""
    with pytest.raises(AssertionError):
        follow(faulty(**keys), "sequential")
