"""Where numbers live and how precise they are."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from polyfed.errors import ConfigError

Precision: TypeAlias = Literal["fp32", "bf16", "fp64"]


@dataclass(frozen=True)
class Place:
    """A device and a precision.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; ``"auto"`` takes a GPU if there is one.
        precision: ``"fp32"``; ``"bf16"``, fp32 weights and bfloat16 arithmetic where torch's autocast allows it;
            ``"fp64"``, everything in double precision, for comparing drivers.
    """

    device: torch.device
    precision: Precision = "fp32"

    @classmethod
    def of(cls, device: str, precision: Precision) -> Place:
        """Resolve a configured device.

        Raises:
            ConfigError: a GPU is asked for where torch sees none.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(
                f'run.device is {device!r}, but torch {torch.__version__} sees no GPU; use "cpu" or "auto"'
            )
        return cls(torch.device(device), precision)

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and inputs."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    @contextmanager
    def defaults(self) -> Generator[None]:
        """Inside the block, new floating-point tensors have this precision."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
