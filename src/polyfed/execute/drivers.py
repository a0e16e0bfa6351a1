"""The drivers of one machine: `Sequential`, the definition of correct, and `Batched`, many clients at once."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import GeneratorType
from typing import Any

import torch

from polyfed.base.types import ClientId, Parts
from polyfed.core.clients import ClientInfo
from polyfed.core.message import Message, State
from polyfed.core.requests import ClientResult, Fit, Fitted, Reduce, Steps, drive, finished
from polyfed.execute.choice import ExecutionChoice, layout
from polyfed.execute.cost import CostCounter
from polyfed.execute.local_training import run_fit, run_reduce
from polyfed.execute.placement import Placement
from polyfed.execute.replay import Replays
from polyfed.execute.stacked import SIZES, USUAL, StackRule, kind_of, pieces, run_stacked, signature, why_not
from polyfed.models.flops import Flops
from polyfed.models.probe import in_network
from polyfed.models.split import SplitModel

log = logging.getLogger(__name__)


@dataclass
class Work:
    """The costs of one client's round.

    Args:
        flops: counted FLOPs, forward and backward; NaN if they are not known.
        seconds: seconds of computing; for stacked clients an equal share of the group's seconds.
        peak_bytes: largest sum of live tensors in one step.
        steps: optimizer steps.
        loss: mean training loss of the last fit.
        execution: the execution of the last fit: "sequential", "channels-last" or "stacked".
    """

    flops: float = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    steps: int = 0
    loss: float | None = None
    execution: str | None = None


@dataclass
class _Account:
    """A driver's record of a client while its coroutine runs; see `Outcome`."""

    work: Work = field(default_factory=Work)
    trained: Parts = field(default_factory=dict[str, Any])


#: The clients' coroutines, by client.
Calls = Mapping[ClientId, Steps[ClientResult]]


@dataclass(frozen=True)
class Outcome:
    """The end of a client's coroutine.

    Args:
        private: the state that the client keeps.
        upload: the message that it sends.
        work: the costs.
        trained: all parts at the end of its last fit, frozen parts included; empty without a fit.
    """

    private: State
    upload: Message | None
    work: Work
    trained: Parts = field(default_factory=dict[str, Any])


class Sequential:
    """One client after another, in this process: plain, bitwise reproducible on a CPU, and the base of all drivers."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.costs = CostCounter(placement)
        #: Number of fits by execution: ``{"sequential": 12}``.
        self.paths = Counter[str]()

    def play(self, calls: Calls) -> dict[ClientId, Outcome]:
        """Run each client's coroutine to its end, in order of client id."""
        out: dict[ClientId, Outcome] = {}
        for client in sorted(calls):
            account = _Account()
            private, upload = drive(calls[client], lambda request, account=account: self._perform(request, account))
            out[client] = Outcome(private, upload, account.work, account.trained)
        return out

    def unit(self, client: ClientInfo) -> int:
        """Return the number of clients of this kind in a unit: each client is played alone."""
        return 1

    def perform(self, request: Any, work: Work | None = None) -> Any:
        """Do one request by itself, such as the server's own; what it costs goes to ``work``."""
        return self._perform(request, _Account(work or Work()))

    def _perform(self, request: Any, account: _Account) -> Any:
        started, work = time.perf_counter(), account.work
        if isinstance(request, Reduce):
            with Flops() as counter:  # few forward passes, so counting them costs little
                result = run_reduce(request, self.placement)
            work.seconds += time.perf_counter() - started
            work.flops += counter.total
            return result
        if not isinstance(request, Fit):
            raise TypeError(f"a client requested {type(request).__name__}; expected fit or reduce")
        fitted, work.execution = self._fit(request)
        self.paths[work.execution] += 1
        work.seconds += time.perf_counter() - started
        self.charge(request, fitted, work)
        account.trained = {**request.frozen, **fitted.parts}
        return fitted

    def _fit(self, fit: Fit) -> tuple[Fitted, str]:
        return run_fit(fit, self.placement), "sequential"

    def testing(self, client: ClientInfo) -> Placement:
        """Where and in which layout a client's networks are tested."""
        return self.placement

    def testing_server(self, models: Mapping[str, SplitModel]) -> Placement:
        """Where and in which layout a network that the server has is tested."""
        return self.placement

    def charge(self, fit: Fit, fitted: Fitted, work: Work) -> None:
        """Add the costs of a fit to its client's account."""
        kind = kind_of(fit)
        for number, ((examples, due), steps) in enumerate(_steps(fit).items()):
            if number == 0:  # the largest batch
                work.peak_bytes = max(work.peak_bytes, self.costs.peak(kind, fit, examples, due))
            work.flops += steps * self.costs.step(kind, fit, examples, due)
        work.steps += fitted.steps
        work.loss = fitted.loss
        log.debug("client %d: %d steps, loss %.4f", fit.client.info.id, fitted.steps, fitted.loss)


def _steps(fit: Fit) -> Counter[tuple[int, int]]:
    """Return the number of a fit's steps by (batch size, due); the largest batch first."""
    found = Counter(
        (examples, fit.due(index, in_epoch))
        for examples, index, in_epoch in fit.client.plan.sizes(len(fit.client.train))
    )
    return Counter(dict(sorted(found.items(), reverse=True)))


class Batched(Sequential):
    """Many clients at once over stacked parameters, grouped by signature; alone if stacking is impossible or slower.

    Args:
        placement: device and precision.
        say: receives, once each, the reasons why clients run one by one.
        memory: bytes that a stack may take, so that any number of clients fits; None sets no limit.
        rule: the sizes of stacks, and the steps that are traced.
    """

    def __init__(
        self,
        placement: Placement,
        say: Callable[[str], None] = log.info,
        memory: int | None = None,
        rule: StackRule = USUAL,
    ) -> None:
        super().__init__(placement)
        self.say, self.memory, self.rule = say, memory, rule
        self._said: set[str] = set()
        self._refused: dict[object, str] = {}  # kinds that vmap cannot run, and why
        self._replays = Replays(rule.after)

    def unit(self, client: ClientInfo) -> int:
        """Return the largest number of clients of this kind in a unit: those of a largest stack."""
        return SIZES[-1]

    def play(self, calls: Calls) -> dict[ClientId, Outcome]:
        """Advance all coroutines to their next request, perform the requests by groups, and repeat until all end."""
        accounts = {client: _Account() for client in sorted(calls)}
        # A client's method without any yield returned its value at once.
        ended = {client: finished(call) for client, call in calls.items() if not isinstance(call, GeneratorType)}
        answers: dict[ClientId, Any] = {client: None for client in accounts if client not in ended}
        while answers:
            requests: dict[ClientId, Any] = {}
            for client, answer in answers.items():
                try:
                    requests[client] = calls[client].send(answer)
                except StopIteration as stop:
                    ended[client] = finished(stop.value)
            answers = self._answer(requests, accounts)
        return {
            client: Outcome(ended[client][0], ended[client][1], account.work, account.trained)
            for client, account in accounts.items()
        }

    def _answer(self, requests: Mapping[ClientId, Any], accounts: Mapping[ClientId, _Account]) -> dict[ClientId, Any]:
        groups: dict[object, list[ClientId]] = {}
        for client, request in requests.items():
            groups.setdefault(signature(request) if isinstance(request, Fit) else client, []).append(client)
        answers: dict[ClientId, Any] = {}
        for clients in groups.values():
            fits = [requests[client] for client in clients]
            fitted = self._together(fits, [accounts[c] for c in clients]) if isinstance(fits[0], Fit) else None
            if fitted is not None:
                answers |= zip(clients, fitted, strict=True)
            else:
                answers |= {client: self._perform(requests[client], accounts[client]) for client in clients}
        return {client: answers[client] for client in requests}

    def _stack(self, fits: Sequence[Fit]) -> bool:
        if len(fits) == 1 or not self._pays(fits[0]):
            return False
        reason = why_not(fits[0]) or self._refused.get(kind_of(fits[0]))
        if reason and reason not in self._said:
            self._said.add(reason)
            self.say(f"clients run one by one: {reason}")
        return reason is None

    def _pays(self, fit: Fit) -> bool:
        return True

    def most(self, fit: Fit) -> int:
        """Return how many clients of this kind may be stacked."""
        if self.memory is None:
            return sys.maxsize
        examples, due = next(iter(_steps(fit)))
        return max(1, self.memory // max(1, self.costs.peak(kind_of(fit), fit, examples, due)))

    def _together(self, fits: Sequence[Fit], accounts: Sequence[_Account]) -> list[Fitted] | None:
        """Run the fits as one stack; return None if they have to run one by one."""
        if not self._stack(fits):
            return None
        started = time.perf_counter()
        try:
            most = self.most(fits[0])
            fitted = [one for few in pieces(fits, most, self.rule) for one in self._run(few)]
        except torch.OutOfMemoryError:
            raise  # out of memory is a RuntimeError on a GPU, too, but free memory must not decide about numbers
        except Exception as error:  # vmap's refusals, or a network's; they change nothing outside the stack
            if not (isinstance(error, RuntimeError | NotImplementedError) or in_network(error)):
                raise
            names = ", ".join(dict.fromkeys(model.name for model in fits[0].client.models.values()))
            self._refused[kind_of(fits[0])] = f"{names} cannot be stacked ({str(error).strip().splitlines()[0]})"
            self._stack(fits)  # reports the reason
            return None
        self.paths["stacked"] += len(fits)
        share = (time.perf_counter() - started) / len(fits)
        for fit, result, account in zip(fits, fitted, accounts, strict=True):
            account.work.seconds += share
            account.work.execution = "stacked"
            account.trained = {**fit.frozen, **result.parts}
            self.charge(fit, result, account.work)
        return fitted

    def _run(self, fits: Sequence[Fit]) -> list[Fitted]:
        return run_stacked(fits, self.placement, self._replays, self.rule)


class Auto(Batched):
    """Executes each kind of client by `ExecutionChoice`: stacked, or one after another in the chosen layout.

    Args:
        placement: device and precision.
        choice: the execution of each kind of client.
        say: receives, once each, the reasons why clients run one by one.
        memory: bytes that a stack may take.
    """

    def __init__(
        self,
        placement: Placement,
        choice: ExecutionChoice,
        say: Callable[[str], None] = log.info,
        memory: int | None = None,
    ) -> None:
        super().__init__(placement, say, memory)
        self.choice = choice

    def unit(self, client: ClientInfo) -> int:
        """Return the number of clients of this kind in a unit."""
        return self.choice.of(client).size

    def _pays(self, fit: Fit) -> bool:
        return self.choice.of(fit.client.info).execution == "stacked"

    def _fit(self, fit: Fit) -> tuple[Fitted, str]:
        if self.choice.of(fit.client.info).execution != "channels-last":
            return super()._fit(fit)
        return run_fit(fit, replace(self.placement, channels_last=True)), "channels-last"

    def testing(self, client: ClientInfo) -> Placement:
        """Where and in which layout a client's networks are tested."""
        return replace(self.placement, channels_last=self.choice.of(client).layout == "channels-last")

    def testing_server(self, models: Mapping[str, SplitModel]) -> Placement:
        """Where and in which layout a network that the server has is tested."""
        return replace(self.placement, channels_last=layout(models, self.placement.device.type) == "channels-last")


def make_driver(
    name: str,
    placement: Placement,
    say: Callable[[str], None] = log.info,
    *,
    choice: ExecutionChoice | None = None,
    memory: int | None = None,
) -> Sequential:
    """Return the driver ``sequential``, ``batched`` or ``auto``."""
    if name == "sequential":
        return Sequential(placement)
    if name == "batched":
        return Batched(placement, say, memory)
    return Auto(placement, choice or ExecutionChoice(), say, memory)
