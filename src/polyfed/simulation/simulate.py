"""A simulated run from its first round to its result: rounds, evaluations, logs, checkpoints, and how to resume it."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

import polyfed
from polyfed.base import files
from polyfed.base.errors import CheckpointError, ConfigError, RunDirError
from polyfed.config import Config
from polyfed.config.profiles import to_csv
from polyfed.core.message import State
from polyfed.data.dataset import Dataset
from polyfed.data.doubts import doubts
from polyfed.data.partition.make import hardly_tested
from polyfed.data.partition.partition import Partition
from polyfed.execute.placement import Placement, threads
from polyfed.parallel.setup import Execution
from polyfed.report.progress import close, reporting
from polyfed.report.results import RunResult
from polyfed.rounds.callbacks import Callback, Interrupted
from polyfed.rounds.evaluation import Evaluation, Evaluator
from polyfed.rounds.federation import Federation, prepare, unread
from polyfed.rounds.gradient import gradient_squared
from polyfed.rounds.identity import Content
from polyfed.rounds.ledger import Ledger
from polyfed.rounds.loop import RoundLoop
from polyfed.rounds.round import Played, play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.simulation.arguments import AlgorithmSource, ConfigSource, ModelSource, arranged, only_here
from polyfed.simulation.clock import TimedClients
from polyfed.storage import predictions
from polyfed.storage.run_dir import LOGS, RunDir
from polyfed.storage.state_store import Store
from polyfed.trained import preprocessing
from polyfed.trained.assemble import keep_assembled
from polyfed.trained.preprocessing import keep_preprocessing

#: Files that a run leaves behind if it was killed before it wrote its config.toml.
STARTED = (
    *("lock", "environment.json", "partition.npz", "devices.csv", "content.json", *LOGS),
    *(preprocessing.NAME, preprocessing.STATISTICS, preprocessing.TOKENIZER),
)


def simulate(
    config: ConfigSource,
    *,
    algorithm: AlgorithmSource | None = None,
    dataset: Dataset | str | None = None,
    models: Sequence[ModelSource] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    out: Path | str | None = None,
) -> RunResult:
    """Run a configuration from the start.

    A class or function of a module file is written into the configuration by its name, and the run can be resumed as
    any other. What no module file holds, such as a class of a notebook, only this Python process can resume, and the
    run says so before it starts.

    Args:
        config: the configuration: a `Config`, its tables as a dictionary, or the path of its file.
        algorithm: in place of ``[algorithm]``: an instance such as ``FedMRL(rep_dim=100)``, a class for its defaults,
            or a name.
        dataset: in place of ``data.dataset``: a name, or a data set such as `federated_data` makes it and
            `load_dataset` reads it. If the configuration says nothing of data and partition, a data set with clients of
            its own is dealt to these.
        models: in place of ``clients.models``, client i has entry i mod length: names, tables, classes of
            ``nn.Module``, functions that build a module, or modules. Each client begins with new weights of a class or
            function, but with the weights of a module as it is now.
        callbacks: objects that receive the events of the run.
        progress: whether the progress is printed: a line that is redrawn in a terminal, at most about 20 lines
            elsewhere.
        out: the run directory, new or empty; by default ``runs/<name>-<algorithm>-<time>``, with a number if a loop
            begins two in a second.

    Returns:
        The result; `load_run` reads it again later.

    Raises:
        PolyfedError: bad input, a diverging loss, a full disk.
        Interrupted: Ctrl-C, after a checkpoint.

    Example:
        >>> result = simulate({"run": {"rounds": 5}}, algorithm="fedavg")  # doctest: +SKIP
        >>> result.accuracy, result.costs["bytes_up"]  # doctest: +SKIP
    """
    config, given = arranged(config, algorithm=algorithm, dataset=dataset, models=models)
    if faults := config.check():  # a Config that was put together by hand was not checked as a whole
        raise ConfigError(*faults)
    config = config.resolved()
    folder = _new_folder(config) if out is None else Path(out)
    _check_new(folder)
    callback = reporting(_label(config), callbacks, progress)
    try:
        # All faults of the input are reported before a file is written.
        federation = prepare(config, given)
        with closing(RunDir(folder)) as run_dir:
            _check_new(folder)  # again: while this process prepared, another may have begun and ended a run here
            files.write_json(run_dir.path / "environment.json", environment(config))
            federation.partition.save(run_dir.path / "partition.npz")
            Content.of(config, federation.dataset.files).write(run_dir.path)
            keep_preprocessing(federation, run_dir.path)
            if federation.availability is not None:
                files.write(run_dir.path / "devices.csv", to_csv(federation.availability.profiles).encode())
            files.write(run_dir.path / "config.toml", config.to_toml().encode())  # last: it marks the directory as run
            return _Run(federation, run_dir, callback).run()
    finally:
        close(callback)


def resume(
    folder: Path | str,
    *,
    rounds: int | None = None,
    dataset: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> RunResult:
    """Resume a run from its last checkpoint; a complete run returns its result, unless it goes on after its end.

    Args:
        folder: the run directory.
        rounds: the number of rounds at whose end the run is to be; None keeps ``run.rounds``. The run ends as if it had
            had that many rounds from its start.
        dataset: the same data set as that of the start, if a program gave it.
        callbacks: objects that receive the events of the run.
        progress: as for `simulate`.

    Raises:
        RunDirError: the folder holds no run, or another process holds it.
        ConfigError: a program gave a network or the algorithm, in another Python process; or the run has more rounds
            already, or its numbers depend on their number.
        CheckpointError: the checkpoint is damaged or foreign, or the data, the user's source or versions changed.
    """
    folder = Path(folder)
    if not (folder / "config.toml").exists():
        raise RunDirError(f"{folder} holds no run: it has no config.toml; give the run directory of a run")
    with closing(RunDir(folder)) as run_dir:
        stored = Partition.load(run_dir.path / "partition.npz").hash  # the arrays are freed at once
        config = Config.load(folder / "config.toml")
        before = config.run.rounds
        federation = prepare(config if rounds is None else config.extended(rounds), dataset)
        content = Content.of(federation.config, federation.dataset.files)
        content.check(folder)
        if stored != federation.partition.hash:
            raise CheckpointError(
                f"the data or the partition changed since {folder} was started (its partition has the hash "
                f"{stored[:12]}, now {federation.partition.hash[:12]}); restore the same data, or start a new run"
            )
        keep_preprocessing(federation, run_dir.path)  # of a run that an earlier version began
        if federation.config.run.rounds != before:
            content.write(folder)
            extend(folder, federation.config)
        callback = reporting(_label(federation.config), callbacks, progress)
        try:
            return _Run(federation, run_dir, callback).run()
        finally:
            close(callback)


def _label(config: Config) -> str:
    """Return what the lines of progress begin with."""
    return config.algorithm.name.rpartition(":")[2]


def _new_folder(config: Config) -> Path:
    """Return the default run directory."""
    name = config.algorithm.name.split(":")[-1]
    first = Path("runs") / f"{config.run.name}-{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return next(
        path for number in count(1) if not (path := first if number == 1 else Path(f"{first}-{number}")).exists()
    )


def extend(folder: Path, config: Config) -> None:
    """Let a run go on after its end: its directory gets the configuration with more rounds.

    A process that is killed here leaves a run that has either number of rounds and can be resumed.
    """
    (folder / "summary.json").unlink(missing_ok=True)  # first: with it, the run counts as complete
    files.write(folder / "config.toml", config.to_toml().encode())


def _check_new(folder: Path) -> None:
    if (folder / "config.toml").exists():
        raise RunDirError(
            f"{folder} already holds a run; to continue it, run `polyfed resume {folder}`, or choose another --out"
        )
    found = sorted(path.name for path in folder.glob("[!.]*") if path.name not in STARTED)
    if found:
        raise RunDirError(f"{folder} is not empty (it holds {found[0]!r}); choose a new or empty folder for --out")


class _Run(RoundLoop):
    """The rounds of a simulation."""

    def __init__(self, federation: Federation, run_dir: RunDir, callback: Callback) -> None:
        config = federation.config
        self.federation, self.callback = federation, callback
        self.placement = Placement.of(config.run.device, config.run.precision)
        store = Store(run_dir.path / "states", federation.algorithm.states, resident=config.run.store == "memory")
        self.execution = Execution(
            federation,
            store,
            self.placement,
            scratch=run_dir.path / "states",
            say=callback.note,
            close=(run_dir.lock,),
        )
        frozen = (model.constants_digest for model in federation.task.family().values())
        hashes = (federation.partition.hash, *filter(None, frozen))

        def identity(rounds: int) -> str:
            return "-".join(each[:16] for each in (config.lasting(rounds).hash(), *hashes))

        super().__init__(federation, run_dir, store, self.execution.driver, identity)
        self.evaluator = Evaluator(federation, self.driver, federation.data)
        self.timed: TimedClients | None = None

    def run(self) -> RunResult:
        """Play the run to its end and return its result."""
        run = self.federation.config.run
        # These are the server's threads; the clients' threads are set where the clients train.
        with threads(run.server_threads), self.placement.defaults(), self.execution as self.simulated:
            self.clients = self.simulated
            if self.federation.availability is not None:
                self.timed = TimedClients(self.federation, self.simulated, self.callback.note)
            self.ledger = Ledger(self.federation, self.restore())
            self.callback.started(self.run_dir.path, self.federation.config, self.round + 1)
            hard = hardly_tested(self.federation.dataset, self.federation.partition)
            capacities = unread(self.federation.config, self.federation.algorithm)
            notes = (*only_here(self.federation.config), *capacities, *doubts(self.federation.dataset), hard)
            for warning in filter(None, notes):
                self.callback.note(warning)
            try:
                self.rounds()
            except BaseException as error:
                # Whatever ended the run, keep the last complete round. Only in a moment between two rounds, in which
                # memory holds half a round, the checkpoint before stays the last.
                if self.whole:
                    self.save()
                if isinstance(error, KeyboardInterrupt):
                    raise Interrupted(self.run_dir.path) from None
                raise
            try:
                tests = self.tests()
                self._keep_assembled()
            except KeyboardInterrupt:
                raise Interrupted(self.run_dir.path) from None
        if self.ledger.stopped:
            self.callback.note(f"ended at round {self.ledger.stopped['round']}: {self.ledger.stopped['reason']}")
        trained = self.run_dir.trained()
        summary = self.ledger.summary(str(self.run_dir.path), trained, self.federation.partition.hash, tests)
        files.write_json(self.run_dir.path / "summary.json", summary)
        self.callback.ended(summary)
        return RunResult(self.run_dir.path, summary)

    def _keep_assembled(self) -> None:
        """Keep what the clients' predictors need of their data, for the model that the run keeps."""
        round_, server, states = self.round, self.server, self.store
        if self.pinned is not None and self.pinned != self.round:
            round_, server = self.run_dir.best(self.view.algorithm.states)
            states = self.store.at(round_)
        keep_assembled(self.federation, server, states.get, round_, self.driver.perform, self.run_dir.path)

    def play(self, round_: int) -> Played:
        """Play a round, by the simulated clock if there is one."""
        score = self.due(round_)
        if self.timed is not None:
            return self.timed.play(self.server, round_, self.driver, self.ledger.now, score=score)
        return play_round(
            self.federation,
            self.server,
            draw_cohort(self.federation, round_),
            self.clients,
            self.driver,
            score=score,
        )

    def evaluate(self, server: State, round_: int, played: Played | None) -> Evaluation | None:
        """Evaluate, measure the gradient if ``run.gradient_clients`` is set, and store predictions if asked to."""
        found = super().evaluate(server, round_, played)
        self._store_predictions(found)
        if found is not None and self.federation.config.run.gradient_clients is not None:
            started = time.perf_counter()
            found.gradient = gradient_squared(server, self.simulated, round_)
            found.seconds += time.perf_counter() - started
        return found

    def test(self, server: State, round_: int) -> Evaluation | None:
        """Test, and store predictions if asked to: in the end, those of the model that the run keeps."""
        found = super().test(server, round_)
        self._store_predictions(found)
        return found

    def _store_predictions(self, found: Evaluation | None) -> None:
        if found is not None and (rows := {k: score.rows for k, score in found.scores.items() if score.rows}):
            federation = self.federation
            held = {k: (federation.partition.test(k), own) for k, own in rows.items()}
            path = self.run_dir.path / predictions.NAME
            predictions.write(path, held, federation.dataset.classes, federation.client_names)

    def at_best(self, round_: int) -> AbstractContextManager[None]:
        """The private states of the pinned checkpoint."""
        return self.simulated.reading(self.store.at(round_))

    def progress(self) -> dict[str, Any]:
        """The ledger."""
        self.ledger.peaked(self.execution.peak())
        return self.ledger.progress

    def ended(self, row: dict[str, Any]) -> None:
        """Report the row to the callback."""
        self.callback.round_ended(row)


def environment(config: Config) -> dict[str, Any]:
    """Return versions and hardware, for a person who wants to repeat the run."""
    return {
        "polyfed": polyfed.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": config.run.threads,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
