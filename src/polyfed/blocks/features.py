"""Batches of features that clients show one another: how they are veiled, stored, dealt and read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from polyfed.base.errors import ModelError
from polyfed.base.ranges import NonNegative, Positive
from polyfed.base.rng import Rng
from polyfed.base.types import ClientId, Params
from polyfed.blocks.losses import distance_correlation, task_loss
from polyfed.core.checks import check_features
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Record, State
from polyfed.core.net import Batch, Net, Nets
from polyfed.models.exits import channels_last
from polyfed.models.split import SplitModel

#: Whose pairs a client gets: another client's; or, as controls, its own, another's with the outputs of other rows, or
#: noise with another's outputs of other rows.
Donor: TypeAlias = Literal["foreign", "own", "shuffled", "random"]
#: Which other clients may be donors: all; those whose network has the architecture of the client's; or the others.
DonorArchitecture: TypeAlias = Literal["any", "same", "other"]


class Features(Record):
    """One batch of pairs: s_in (B_f, ...), s_out (B_f, rep_dim), and the round in which they were made."""

    s_in: Tensor
    s_out: Tensor
    round: int


#: The latest pairs of each client.
Bank: TypeAlias = Mapping[ClientId, Features]


def renewed(bank: Bank, fresh: Mapping[ClientId, tuple[Features, ...]], round_: int, max_age: int) -> Bank:
    """The bank with the pairs that a round brought, and without those that were made ``max_age`` rounds ago or more."""
    new = {k: replace(p, round=round_) for k, pairs in fresh.items() for p in pairs}
    return {k: p for k, p in {**bank, **new}.items() if round_ - p.round < max_age}


def dealt(bank: Bank, client: ClientId, donor: Donor, rng: Rng, mix: int = 1) -> tuple[Features, ...]:
    """One batch of pairs for ``client``: none while there are none.

    The other client is drawn uniformly; or ``mix`` others, or all if there are fewer, and then the examples, uniformly
    from theirs together, as many as the largest of their batches has. An s_out stays beside its s_in. ``shuffled``
    moves each output to the input some rows further, so that no input has its own; ``random`` replaces the inputs, too,
    by normal numbers with the mean and the deviation of all of them.

    Args:
        bank: the pairs that there are.
        client: who gets them.
        donor: whose; see `Donor`.
        rng: randomness keyed by seed and round.
        mix: how many other clients the examples are of.
    """
    if donor == "own":
        return (bank[client],) if client in bank else ()
    others = sorted(bank.keys() - {client})
    drawn = [bank[int(k)] for k in rng.at("pair", client).numpy().permutation(others)[:mix]]
    if len(drawn) > 1:
        drawn = [_mixed(drawn, rng.at("mix", client))]
    return tuple(_controlled(pair, donor, rng.at("control", client)) for pair in drawn)


def _mixed(pairs: Sequence[Features], rng: Rng) -> Features:
    """Examples of all pairs, in a random order; they are as old as the oldest."""
    s_in, s_out = (torch.cat([getattr(pair, name) for pair in pairs]) for name in ("s_in", "s_out"))
    rows = torch.randperm(len(s_in), generator=rng.torch())[: max(len(pair.s_in) for pair in pairs)]
    rows = rows.to(s_in.device)
    return Features(s_in[rows], s_out[rows], min(pair.round for pair in pairs))


def _controlled(pair: Features, donor: Donor, rng: Rng) -> Features:
    """The pair itself; for a control, with what makes it one."""
    if donor == "foreign":
        return pair
    by, s_in = int(rng.numpy().integers(1, max(2, len(pair.s_out)))), pair.s_in
    if donor == "random":
        exact = s_in.double()
        noise = torch.randn(s_in.shape, generator=rng.at("noise").torch(), dtype=torch.float64)
        s_in = (exact.mean() + exact.std(correction=0) * noise).to(s_in.dtype)
    return replace(pair, s_in=s_in, s_out=pair.s_out.roll(by, 0))


class Pinned(State):
    """The rows of a client's training examples that it shows at each participation, (B_f,) int64."""

    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class FeatureExchange:
    """Which features a client shows, what it does to them first (pool, clip, noise, half, in this order), for whom.

    None of it is differentially private.

    Args:
        feature_batch: B_f, examples in the pair that a client sends.
        donor: whose pairs a client gets; see `Donor`.
        donor_architecture: which other clients' pairs it may be given; see `DonorArchitecture`.
        mix: how many other clients the examples that it gets are of; see `dealt`.
        max_age: rounds after which a pair leaves the server's bank.
        pin: whether a client shows the same examples at each participation; else it draws new ones.
        pool: side of the windows over which s_in is averaged; 1 leaves it as it is.
        clip: largest norm of an example's features, in medians of the batch's norms, s_in and s_out apart; 0: none.
        noise: standard deviation of the normal noise on s_in and s_out, in standard deviations of each; 0: none.
        half: whether features travel in half precision.
        nopeek: alpha, the weight in the local loss of the distance correlation of a batch with its s_in.
    """

    feature_batch: Positive = 64
    donor: Donor = "foreign"
    donor_architecture: DonorArchitecture = "any"
    mix: Positive = 1
    max_age: Positive = 10
    pin: bool = False
    pool: Positive = 1
    clip: NonNegative = 0.0
    noise: NonNegative = 0.0
    half: bool = False
    nopeek: NonNegative = 0.0

    def facts(self, server: Any) -> Mapping[str, Mapping[str, int]]:
        """How many clients of the last round got pairs of each age, in rounds: a count of ``server.ages``."""
        ages = sorted(server.ages.values())
        return {"pair_ages": {str(age): ages.count(age) for age in ages}}

    def noted(self, architectures: Mapping[ClientId, str], cohort: Cohort) -> Mapping[ClientId, str]:
        """The architecture of each client that was asked so far; empty where donors are not chosen by it."""
        return {**architectures, **{c.id: c.architecture for c in cohort if self.donor_architecture != "any"}}

    def draw(self, server: Any, client: ClientInfo, cohort: Cohort) -> tuple[Features, ...]:
        """The pairs that ``client`` gets: `dealt` from ``server.bank``, from those donors that it may have."""
        bank, same = server.bank, self.donor_architecture == "same"
        if self.donor_architecture != "any":
            known = server.architectures
            bank = {k: pair for k, pair in bank.items() if (known[k] == client.architecture) is same}
        return dealt(bank, client.id, self.donor, cohort.rng, self.mix)

    def local_loss(self, nets: Nets, batch: Batch) -> Tensor:
        """The task's loss; with ``nopeek`` plus alpha dCor(x, s_in).

        P. Vepakomma, A. Singh, O. Gupta, R. Raskar: NoPeek, 2020, https://arxiv.org/abs/2008.09161.
        """
        net, x = nets["model"], batch[0]
        if not self.nopeek:
            return task_loss(net(x), batch)
        s_in = net.extract(x)
        loss = task_loss(net.classify(net.intermediate(s_in)), batch)
        return loss + self.nopeek * distance_correlation(x, s_in)

    def rows(self, private: State, client: LocalClient) -> Tensor:
        """The rows (B_f,) of the client's training examples that it shows: those it has pinned, or a random choice."""
        if isinstance(private, Pinned):
            return private.rows
        order = torch.randperm(len(client.train), generator=client.rng.at("features").torch())
        return order[: self.feature_batch]

    @staticmethod
    def whole(x: Tensor, net: Net) -> Tensor:
        """Return tokens ``(B, T)`` with padding up to the length of the data; anything else as it is.

        A batch is as long as its longest row, and the pairs of all clients have one shape.
        """
        short = net.model.input_shape[-1] - x.shape[-1] if net.model is not None and not x.is_floating_point() else 0
        return functional.pad(x, (0, short)) if short else x

    @property
    def wire_type(self) -> torch.dtype:
        """The type of features on the wire."""
        return torch.float16 if self.half else torch.get_default_dtype()

    def wire_shape(self, model: SplitModel) -> tuple[int, ...]:
        """The shape of an s_in on the wire.

        Raises:
            ModelError: it has no positions to average over.
        """
        first, *sides = model.s_in_shape
        if self.pool > 1 and not 1 <= len(sides) <= 3:
            raise ModelError(
                f"algorithm.pool = {self.pool} averages over positions, but the extractor of {model.name!r} puts out "
                f"{model.s_in_shape} per example; expected channels and one to three sides; cut the network "
                "behind a convolution, or leave pool out"
            )
        return (first, *(-(-side // self.pool) for side in sides))

    def check_features(self, models: Iterable[SplitModel], *, batch_statistics: bool) -> None:
        """Check that clients can make, veil and train on features.

        Args:
            models: the clients' networks.
            batch_statistics: whether normalisation layers of an IN step use those of the pair's examples.

        Raises:
            ModelError: s_in has no positions to average over, or not behind its channels; or one example is too few.
        """
        for model in models:
            _ = self.wire_shape(model)
            if self.pool > 1 and channels_last(model, str(model.cuts[1]), model.s_in_shape):
                raise ModelError(
                    f"algorithm.pool = {self.pool} averages over positions, but the extractor of {model.name!r} puts "
                    f"out {model.s_in_shape} per example, with the channels last; expected them first; leave pool out"
                )
            if self.feature_batch > 1:
                continue
            if batch_statistics and model.statistic_names & model.intermediate_names:
                raise ModelError(
                    f"algorithm.feature_batch = 1 with norm = 'batch': normalisation layers of {model.name!r} need two "
                    "examples for statistics of their own; take at least 2, or norm = 'running'"
                )
            if self.donor in ("shuffled", "random"):
                raise ModelError(
                    f"algorithm.feature_batch = 1 with donor = {self.donor!r}: an only output cannot belong to another "
                    "example; take at least 2"
                )

    def check_pairs(self, model: SplitModel, pairs: tuple[Features, ...]) -> None:
        """Check that each pair is what a client with ``model`` sends.

        Raises:
            MessageError: a tensor has another shape or type, or has no or too many examples.
        """
        both = ((p.s_in, p.s_out) for p in pairs)
        check_features(self.wire_shape(model), model.s_out_shape, both, self.feature_batch, self.wire_type)

    def veiled(self, made: Params, client: LocalClient) -> Features:
        """The features s_in (B, ...) and s_out (B, d) as they are sent."""
        shown = {n: self.veil(n, s, client.rng.at("veil", n)) for n, s in made.items()}
        return Features(**shown, round=client.round)

    def veil(self, name: str, s: Tensor, rng: Rng) -> Tensor:
        """The features called ``name`` of one batch, (B, ...), as they are sent; ``rng`` draws the noise.

        In half precision numbers beyond the type's are cut off, or one would be infinite and the upload be refused.
        """
        if name == "s_in" and self.pool > 1:
            mean = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[s.dim() - 3]
            s = mean(s, self.pool, ceil_mode=True)
        if self.clip:
            norms = s.flatten(1).norm(dim=1)
            scale = (self.clip * norms.median() / norms.clamp_min(torch.finfo(s.dtype).tiny)).clamp(max=1.0)
            s = s * scale.reshape(-1, *(1 for _ in s.shape[1:]))
        if self.noise:
            noise = torch.randn(s.shape, generator=rng.torch(), dtype=torch.float64).to(s.dtype)
            s = s + self.noise * s.std(correction=0) * noise
        if self.half:
            limit = torch.finfo(self.wire_type).max
            s = s.clamp(-limit, limit).to(self.wire_type)
        return s

    def seen_plainly(self) -> Self:
        """The same without what an attacker cannot compute: the noise, and rounding, which has no gradient."""
        return replace(self, noise=0.0, half=False)

    def read(self, pairs: tuple[Features, ...], model: SplitModel) -> dict[str, Tensor]:
        """What ``model`` trains on: s_in (B, *s_in_shape), where a window has its mean everywhere, and s_out.

        Empty without pairs.
        """
        if not pairs:
            return {}
        s_in, s_out = (s.to(torch.get_default_dtype()) for s in (pairs[0].s_in, pairs[0].s_out))
        if self.pool > 1:
            for axis, side in enumerate(model.s_in_shape[1:], 2):
                s_in = s_in.repeat_interleave(self.pool, axis).narrow(axis, 0, side)
        return {"s_in": s_in.contiguous(), "s_out": s_out}
