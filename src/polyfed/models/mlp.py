"""Dense networks, and the projector that joins two representations."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from polyfed.base.errors import ModelError


class MLP(nn.Module):
    """Flatten, then layers ``fc1``, ``fc2``, ... with a ReLU (``act1``, ...) between two of them.

    Args:
        input_shape: shape of one sample, of any number of dimensions.
        hidden: widths of the hidden layers; may be empty.
        num_classes: width of the last layer.
        columns: positions of the features that it reads, ascending; None reads all.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        hidden: tuple[int, ...],
        num_classes: int,
        columns: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        widest = prod(input_shape)
        self.columns = columns or ()
        places = range(widest) if columns is None else columns
        if columns is not None and (list(columns) != sorted({*columns}) or not -1 < columns[0] <= columns[-1] < widest):
            raise ModelError(
                f"mlp: option 'columns' is {columns}, expected ascending positions below {widest}: samples have shape "
                f"{input_shape}"
            )
        #: Begin and end of each run of neighbours; empty if all are read. A GPU would get a list of positions anew in
        #: every pass, slices cost nothing.
        starts = [at for at in places if at - 1 not in places] if columns is not None else []
        ends = [at + 1 for at in places if at + 1 not in places]
        self.runs = list(zip(starts, ends, strict=False))
        widths = (len(places), *hidden, num_classes)
        self.depth = len(hidden) + 1
        self.stages = [f"act{number}" for number in range(1, self.depth)]
        for number in range(1, self.depth + 1):
            self.add_module(f"fc{number}", nn.Linear(widths[number - 1], widths[number]))
            if number < self.depth:
                self.add_module(f"act{number}", nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Samples ``(B, *input_shape)`` -> logits ``(B, L)``."""
        x = x.flatten(1)  # (B, prod(input_shape))
        if self.runs:
            x = torch.cat([x[:, begin:end] for begin, end in self.runs], dim=1)  # (B, columns)
        for number in range(1, self.depth):
            x = self.get_submodule(f"act{number}")(self.get_submodule(f"fc{number}")(x))
        return self.get_submodule(f"fc{self.depth}")(x)  # (B, L)


class Projector(nn.Module):
    """From a representation ``(B, d_in)`` to another ``(B, d_out)``: one layer, or two with a ReLU."""

    def __init__(self, d_in: int, d_out: int, *, kind: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_in, d_out)
        self.fc2 = nn.Linear(d_out, d_out) if kind == "mlp" else None

    def forward(self, r: Tensor) -> Tensor:
        """``(B, d_in)`` -> ``(B, d_out)``."""
        r = self.fc1(r)
        return r if self.fc2 is None else self.fc2(r.relu())
