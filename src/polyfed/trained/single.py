"""What a deployed client keeps of the last round, so that its own folder makes its predictor, without the server."""

# Without postponed annotations: the types of a record's fields are checked when its class is made.

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError
from torch import Tensor

from polyfed.base import files
from polyfed.base.errors import CheckpointError
from polyfed.base.types import ClientId, Parts
from polyfed.config import Config
from polyfed.core.algorithm import Task
from polyfed.core.message import State
from polyfed.data.client import Standardise
from polyfed.models.catalogue import ModelSpec
from polyfed.storage import state_files
from polyfed.trained.preprocessing import Preprocessing, keep_statistics

NAME = "trained.json"
_TENSORS = "trained.safetensors"
_OWNER_ONLY = 0o600


class OwnParts(State):
    """The tensors of a client's parts, by part and name."""

    parts: Mapping[str, Mapping[str, Tensor]]


class SingleClient(BaseModel, frozen=True, extra="forbid"):
    """``trained.json``: whose model the folder holds.

    Args:
        client: the number of the client.
        round: the round after which it predicts so.
        model: its network.
        capacity: the fraction of a full-size network that it can hold.
        architectures: the networks of the clients as far as they are public.
        capacities: the capacities that occur.
        sha256: of the tensors beside it.
    """

    client: ClientId
    round: int
    model: str
    capacity: float
    architectures: tuple[str, ...]
    capacities: tuple[float, ...]
    sha256: str

    @classmethod
    def keep(
        cls,
        folder: Path,
        config: Config,
        task: Task,
        about: Preprocessing,
        stats: Standardise | None,
        parts: Parts,
        *,
        client: ClientId,
        round_: int,
        model: ModelSpec,
        capacity: float,
    ) -> None:
        """Write a client's folder: configuration, preprocessing and parts, for its owner only.

        Raises:
            StorageError: the disk is full.
        """
        files.write(folder / "config.toml", config.to_toml().encode(), mode=_OWNER_ONLY)
        if stats is not None:
            keep_statistics([stats, stats], folder, mode=_OWNER_ONLY)
        about.write(folder, mode=_OWNER_ONLY)
        whole = OwnParts({part: dict(params) for part, params in parts.items()})
        found = cls(
            client=client,
            round=round_,
            model=str(model),
            capacity=capacity,
            architectures=tuple(map(str, task.architectures)),
            capacities=task.capacities,
            sha256=files.write(folder / _TENSORS, state_files.dump(whole), mode=_OWNER_ONLY),
        )
        files.write(folder / NAME, (found.model_dump_json(indent=2) + "\n").encode(), mode=_OWNER_ONLY)

    @classmethod
    def read(cls, folder: Path) -> "SingleClient":
        """Read the file that `keep` wrote.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            return cls.model_validate(files.read_json(folder / NAME))
        except ValidationError as error:
            raise CheckpointError(f"{folder / NAME} is damaged ({error.errors()[0]['msg']}); restore it") from error

    def parts(self, folder: Path) -> Parts:
        """Read the parts.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        found: OwnParts = state_files.load(folder / _TENSORS, self.sha256, OwnParts)
        return found.parts

    def task(self, config: Config, about: Preprocessing) -> Task:
        """Return what the client knew of the training."""
        return Task(
            input_shape=about.input_shape,
            num_classes=about.num_classes,
            num_clients=config.clients.count,
            rounds=config.run.rounds,
            architectures=tuple(map(ModelSpec.parse, self.architectures)),
            capacities=self.capacities,
            kind=config.data.task,
            dtype=about.input_dtype,
            columns=about.feature_columns,
        )
