"""The device and the precision of numbers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from polyfed.base.errors import ConfigError
from polyfed.core.clients import Examples
from polyfed.core.net import Batch
from polyfed.data.client import ClientData, together

Precision: TypeAlias = Literal["fp32", "bf16", "fp64"]


@dataclass(frozen=True)
class Placement:
    """A device and a precision.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; ``"auto"`` takes a GPU if there is one.
        precision: ``"fp32"``; ``"bf16"``, fp32 weights and bfloat16 arithmetic where torch's autocast allows it;
            ``"fp64"``, everything in double precision, for comparing drivers.
        channels_last: keep images and kernels with the channels innermost, which convolutions may prefer: 1.2 times
            faster on a CPU in fp32 and 1.6 times in bf16, and equal up to rounding.
    """

    device: torch.device
    precision: Precision = "fp32"
    channels_last: bool = False

    @classmethod
    def of(cls, device: str, precision: Precision) -> Placement:
        """Resolve a configured device.

        Raises:
            ConfigError: the configuration names a GPU, but torch sees no GPU.
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

    def put(self, value: Tensor, *, copy: bool = False) -> Tensor:
        """Return ``value`` on the device and in the layout; without ``copy`` it may be ``value`` itself."""
        form = torch.channels_last if self.channels_last and value.dim() == 4 else torch.preserve_format
        # A copy to a GPU is queued; see `polyfed.data.client.send`.
        return value.to(self.device, non_blocking=self.device.type == "cuda", copy=copy, memory_format=form)

    def batch(self, data: Examples, rows: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Return the examples at ``rows`` of a client's data, on the device; with a generator, augmented."""
        x, y = data.batch(rows, generator=generator, dtype=self.dtype, device=self.device)
        return self.put(x), y

    def batches(self, data: Sequence[Examples], rows: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Batch:
        """Return equally long batches of all clients as one: (K, B, ...) and (K, B)."""
        own = [one for one in data if isinstance(one, ClientData)]
        if (
            len(own) == len(data)
            and not own[0].dataset.is_standardised  # each client has statistics of its own
            and len({(id(one.dataset), one.augment) for one in own}) == 1
        ):
            x, y = together(own, rows, generators, dtype=self.dtype, device=self.device)
            return x.unflatten(0, (len(own), -1)), y.unflatten(0, (len(own), -1))
        each = [self.batch(*given) for given in zip(data, rows, generators, strict=True)]
        return torch.stack([x for x, _ in each]), torch.stack([y for _, y in each])

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def settle(self) -> None:
        """Make new floating-point tensors have this precision from now on, and convolutions keep all of it.

        By default cuDNN uses TensorFloat-32, with 10 bits of mantissa, for a convolution of float32; ``"bf16"`` is the
        setting for more speed at less precision. Some of its convolutions add in an order that differs from run to
        run; they are not used.
        """
        torch.set_default_dtype(self.dtype)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True

    @contextmanager
    def defaults(self) -> Generator[None]:
        """Apply `settle` inside the block and restore the earlier settings afterwards."""
        cudnn = torch.backends.cudnn
        before = torch.get_default_dtype(), cudnn.allow_tf32, cudnn.deterministic
        self.settle()
        try:
            yield
        finally:
            torch.set_default_dtype(before[0])
            cudnn.allow_tf32, cudnn.deterministic = before[1:]


@contextmanager
def threads(count: int) -> Generator[None]:
    """Let torch compute on ``count`` threads inside the block."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
