"""``kept_round``: what the server had at the end of a round of ``run.keep_rounds``, to look into."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from polyfed.config import Config, load_algorithm
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.message import State
from polyfed.core.net import Nets
from polyfed.execute.placement import Placement
from polyfed.rounds.federation import configured_task
from polyfed.storage.run_dir import SavedRun
from polyfed.trained.load import check_saved, run_folder
from polyfed.trained.preprocessing import Preprocessing


@dataclass(frozen=True)
class KeptRound:
    """A round of a run, as the server had it at the round's end.

    Args:
        round: the round; 0 is before training.
        config: the configuration of the run.
        algorithm: its algorithm.
        task: the common knowledge of server and clients.
        server: the server's state: an instance of ``algorithm.Server``.
    """

    round: int
    config: Config
    algorithm: Algorithm
    task: Task
    server: State

    def __repr__(self) -> str:
        """One line: the state holds weights, and FedIN's the features that clients have shown."""
        names = ", ".join(self.nets) or "no networks"
        return f"KeptRound(round {self.round} of {self.config.run.rounds}: {self.algorithm.name}, {names})"

    @property
    def nets(self) -> Mapping[str, Nets]:
        """The networks that the server can make by itself, by name, such as one of each architecture; maybe none."""
        return self.algorithm.global_nets(self.server, self.task)


def kept_round(run_dir: Path | str, round_: int) -> KeptRound:
    """Return what a run kept of a round of ``run.keep_rounds``; needs no data.

    Of a round the server's state is kept, and no private state of a client, so networks that clients have for
    themselves are not among it.

    Args:
        run_dir: a run directory that no run is writing to.
        round_: the round.

    Raises:
        RunDirError: the folder holds no run, or a run is in progress.
        CheckpointError: the run does not keep that round, a file is damaged, or code or frozen weights changed.
        ModelError: your own network cannot be imported.
    """
    folder = run_folder(run_dir)
    config, about = Config.load(folder / "config.toml"), Preprocessing.read(folder)
    algorithm = load_algorithm(config.algorithm.name, config.algorithm.keys)
    with (
        Placement.of("cpu", config.run.precision).defaults(),
        closing(SavedRun(folder, algorithm.states, round_)) as saved,
    ):
        task = configured_task(config, about.input_shape, about.num_classes, about.input_dtype, about.feature_columns)
        check_saved(folder, config, task, saved)
    return KeptRound(round_, config, algorithm, task, saved.server)
