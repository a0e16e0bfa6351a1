"""Dense networks, and the projector that joins two representations."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn


class MLP(nn.Module):
    """Flatten, then layers ``fc1``, ``fc2``, ... with a ReLU (``act1``, ...) between two of them.

    Args:
        input_shape: shape of one sample, of any number of dimensions.
        hidden: widths of the hidden layers; may be empty.
        num_classes: width of the last layer.
    """

    def __init__(self, input_shape: tuple[int, ...], *, hidden: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        widths = (prod(input_shape), *hidden, num_classes)
        self.depth = len(hidden) + 1
        self.stages = [f"act{number}" for number in range(1, self.depth)]
        for number in range(1, self.depth + 1):
            self.add_module(f"fc{number}", nn.Linear(widths[number - 1], widths[number]))
            if number < self.depth:
                self.add_module(f"act{number}", nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Samples ``(B, *input_shape)`` -> logits ``(B, L)``."""
        x = x.flatten(1)  # (B, prod(input_shape))
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
