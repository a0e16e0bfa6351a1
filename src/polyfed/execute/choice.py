"""How each kind of client is trained, found once by the clock and then kept with the run.

The executions differ in speed only: their numbers agree up to rounding (the laws hold each to the sequential driver).
But rounding grows over rounds, so a choice is made once, written down, and never asked of the clock again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from polyfed.base.errors import CheckpointError, PolyfedError
from polyfed.core.clients import ClientInfo
from polyfed.core.plan import Step
from polyfed.core.requests import ClientResult, Fit, Fitted, Reduce, Steps, drive
from polyfed.execute.local_training import Local, run_reduce
from polyfed.execute.placement import Placement
from polyfed.execute.replay import Replays
from polyfed.execute.stacked import SIZES, Stack, has_images, why_not

#: One client after another as they come; the same with channels innermost; many clients at once.
ExecutionName: TypeAlias = Literal["sequential", "channels-last", "stacked"]

#: An execution must be faster than the simpler one by this much before it is taken: the clock is no better than that.
MARGIN = 0.95
#: A stack that takes so many times as long as the best so far: larger ones are not tried.
HOPELESS = 1.25
#: What a trial without training may raise in an algorithm that counts on having trained.
DEGENERATE = (PolyfedError, RuntimeError, ValueError, ArithmeticError, LookupError)

#: Calls before the clock starts: in the first torch chooses its kernels and a stack's step is traced.
WARM = 2


@dataclass
class ExecutionChoice:
    """The choices of a run, as choices.json holds them.

    Args:
        by_kind: kind of client and work -> execution.
        stack: kind of client and work -> how many to stack at once, where that is the execution.
        seconds: kind of client -> seconds of training per example and pass, on one thread.
        workers: how many processes; 1 is this process alone, None is not decided yet.
        since: the round in which that was decided: an earlier one, played again after a kill, was played alone.
        memory: bytes that stacks of clients may take together.
    """

    by_kind: dict[str, ExecutionName] = field(default_factory=dict[str, ExecutionName])
    stack: dict[str, int] = field(default_factory=dict[str, int])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    workers: int | None = None
    since: int = 0
    memory: int | None = None

    def of(self, fit: Fit) -> ExecutionName:
        """The execution of a request; sequential where nothing was found out."""
        return self.by_kind.get(kind_of_fit(fit), "sequential")

    def of_testing(self, client: ClientInfo) -> ExecutionName:
        """The execution of testing a client's networks."""
        return self.by_kind.get(kind_of_testing(client), "sequential")

    def to_json(self) -> dict[str, Any]:
        """Itself as plain values."""
        return {
            "by_kind": self.by_kind,
            "stack": self.stack,
            "seconds": self.seconds,
            "workers": self.workers,
            "since": self.since,
            "memory": self.memory,
        }

    @classmethod
    def from_json(cls, found: Any, where: str) -> ExecutionChoice:
        """What `to_json` made.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            choice = cls(
                {
                    str(kind): cast("ExecutionName", execution)
                    for kind, execution in found["by_kind"].items()
                    if execution in get_args(ExecutionName)
                },
                {str(kind): int(count) for kind, count in found["stack"].items()},
                {str(kind): float(seconds) for kind, seconds in found["seconds"].items()},
                None if found["workers"] is None else int(found["workers"]),
                int(found["since"]),
                None if found["memory"] is None else int(found["memory"]),
            )
            if len(choice.by_kind) == len(found["by_kind"]):
                return choice
        except (KeyError, TypeError, ValueError, AttributeError):
            pass
        raise CheckpointError(f"{where} does not hold the choices of a run; remove it to have them made again")


def kind_of_client(info: ClientInfo) -> str:
    """Clients of one kind do the same work: one network, one capacity."""
    return f"{info.architecture} at {info.capacity:g}"


def kind_of_fit(fit: Fit) -> str:
    """Requests of one kind are executed alike: one kind of client, one function."""
    source = fit.loss if fit.loss is not None else fit.gradient
    return f"{kind_of_client(fit.client.info)}: {getattr(source, '__name__', 'step')}"


def kind_of_testing(info: ClientInfo) -> str:
    """Clients of one kind are tested alike."""
    return f"{kind_of_client(info)}: predict"


@contextmanager
def threads(count: int) -> Generator[None]:
    """Inside the block torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Trial:
    """How long a step takes, for each client, if ``clients`` take it together.

    Args:
        execution: the execution.
        clients: how many at once.
        alone: seconds on one thread.
        together: seconds on all threads.
    """

    execution: ExecutionName
    clients: int
    alone: float
    together: float


class Calibration:
    """Plays one client's round without learning anything, and times every execution of each of its requests.

    Nothing of the run moves: randomness is keyed, what came in is cloned, and what comes out is thrown away.

    Args:
        choice: where the findings go.
        placement: device and precision.
        twins: how many clients of the kind train in a round; a single one cannot be stacked.
        most: how many clients like that of a request fit into memory at once.
    """

    def __init__(self, choice: ExecutionChoice, placement: Placement, twins: int, most: Callable[[Fit], int]) -> None:
        self.choice, self.placement, self.twins, self.most = choice, placement, twins, most
        #: Seconds of all the client's training in a round, on one thread and on all of them.
        self.alone = self.together = 0.0
        self._best: dict[str, tuple[Trial, Trial]] = {}  # by kind of request: on one thread, and on all

    def choose(self, *, workers: bool) -> None:
        """Put what is best, on the one thread of a worker or on all threads of one process, into the choice."""
        for kind, best in self._best.items():
            trial = best[0] if workers else best[1]
            self.choice.by_kind.setdefault(kind, trial.execution)
            if trial.execution == "stacked":
                self.choice.stack.setdefault(kind, trial.clients)

    def client(self, call: Steps[ClientResult] | ClientResult) -> None:
        """Find the executions of one client's round."""
        # A dry run trains nothing, so what an algorithm makes of it may be degenerate; then sequential it stays.
        with suppress(*DEGENERATE):
            drive(cast("Steps[ClientResult]", call), self._answer)

    def _answer(self, request: Any) -> Any:
        if isinstance(request, Reduce):
            return run_reduce(request, self.placement)
        assert isinstance(request, Fit)
        self._time(request)
        return Fitted({part: dict(params) for part, params in request.parts.items()}, 1, 0.0)

    def _time(self, fit: Fit) -> None:
        client = fit.client
        for model in client.models.values():
            model.train(True)
        with client.rng.at("calibrate").fork():
            trials = list(timed(self._trials(fit)))
        best = fastest(trials, lambda trial: trial.alone), fastest(trials, lambda trial: trial.together)
        self._best.setdefault(kind_of_fit(fit), best)
        steps = client.plan.count(len(client.train))
        self.alone += best[0].alone * steps
        self.together += best[1].together * steps

    def _trials(self, fit: Fit) -> Iterator[tuple[ExecutionName, int, Callable[[], None]]]:
        """By execution: how many clients, and a step of them, with its batch; larger stacks last."""
        rows = torch.arange(min(fit.client.plan.batch_size, len(fit.client.train)))
        yield "sequential", 1, self._alone(fit, rows, self.placement)
        if has_images(fit.client.models):
            yield "channels-last", 1, self._alone(fit, rows, replace(self.placement, channels_last=True))
        most = min(self.twins, self.most(fit))
        if most > 1 and why_not(fit) is None:
            for count in [size for size in SIZES if size <= most] or [most]:
                yield "stacked", count, self._stacked(fit, rows, count)

    def _alone(self, fit: Fit, rows: Tensor, placement: Placement) -> Callable[[], None]:
        data, augment, drawn = fit.client.train, _augmenter(fit), fit.drawn(Step(rows, 0, 0))
        local = Local(fit, placement)
        return lambda: local.step(placement.batch(data, rows, augment), False, drawn)

    def _stacked(self, fit: Fit, rows: Tensor, count: int) -> Callable[[], None]:
        # A trace takes up to a second, which stacks of convolutions hardly ever earn: they are timed without.
        replays = None if has_images(fit.client.models) else Replays(after=0)
        stack = Stack([fit] * count, self.placement, replays)
        data, each, augment = [fit.client.train] * count, [rows] * count, [_augmenter(fit)] * count
        drawn = {n: self.placement.put(v).expand(count, *v.shape) for n, v in fit.drawn(Step(rows, 0, 0)).items()}
        return lambda: stack.step(list(range(count)), self.placement.batches(data, each, augment), False, drawn)


def _augmenter(fit: Fit) -> torch.Generator:
    return fit.client.rng.at("calibrate").torch()


def timed(trials: Iterator[tuple[ExecutionName, int, Callable[[], None]]]) -> Iterator[Trial]:
    """Each trial with its timings; ends with the first stack that is far from a gain."""
    best = float("inf")
    for execution, clients, step in trials:
        with threads(1):
            alone = seconds(step, clients=clients)
        together = seconds(step, clients=clients) if torch.get_num_threads() > 1 else alone
        yield Trial(execution, clients, alone, together)
        if execution == "stacked" and min(alone, together) > HOPELESS * best:
            break
        best = min(best, alone, together)


def fastest(trials: Sequence[Trial], takes: Callable[[Trial], float]) -> Trial:
    """The simplest execution, unless another is faster by the margin; of stacks the fastest."""
    best = trials[0]
    for trial in trials[1:]:
        if takes(trial) < (1 if trial.execution == best.execution else MARGIN) * takes(best):
            best = trial
    return best


def find_testing(
    choice: ExecutionChoice,
    placement: Placement,
    info: ClientInfo,
    images: bool,
    predict: Callable[[Placement], Callable[[], Any]],
) -> None:
    """Choose the layout in which ``predict(placement)()`` tests a client fastest, on one thread."""
    execution: ExecutionName = "sequential"
    with threads(1), suppress(*DEGENERATE):
        if images and seconds(predict(replace(placement, channels_last=True))) < MARGIN * seconds(predict(placement)):
            execution = "channels-last"
    choice.by_kind[kind_of_testing(info)] = execution


def seconds(work: Callable[[], Any], *, clients: int = 1, enough: float = 0.08) -> float:
    """The least of a few timings, per client of those that are served at once; infinite where it cannot be done."""
    try:
        for _ in range(WARM):
            work()
        times: list[float] = []
        while not times or (sum(times) < enough and len(times) < 50):
            started = time.perf_counter()
            work()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    except (RuntimeError, NotImplementedError):  # vmap's refusals
        return float("inf")
    return min(times) / clients
