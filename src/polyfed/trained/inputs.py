"""Preprocessing as modules: from what a person has, such as float64 numbers and codes, to the input of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyfed.data.client import Standardise
from polyfed.trained.preprocessing import Preprocessing


@dataclass(frozen=True)
class Input:
    """An input of a trained model.

    Args:
        name: "numbers", "categories", "images", "series" or "tokens".
        dtype: its type.
        shape: shape of one row.
        columns: the names of its columns; empty if the data are no table.
        categories: of each column of "categories" the name of each code from 0.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    columns: tuple[str, ...] = ()
    categories: tuple[tuple[str, ...], ...] = ()

    def described(self) -> dict[str, Any]:
        """Return it as JSON values; a batch of any size is the first dimension."""
        about: dict[str, Any] = {
            "name": self.name,
            "type": str(self.dtype).removeprefix("torch."),
            "shape": ["batch", *self.shape],
        }
        if self.columns:
            about["columns"] = list(self.columns)
        if self.categories:
            about["categories"] = [list(levels) for levels in self.categories]
        return about


class Prepared(nn.Module, ABC):
    """Turns inputs into the input of a network, (B, ...) of ``dtype``.

    Args:
        inputs: what `forward` takes, in order.
        dtype: the type of a network's input.
    """

    def __init__(self, inputs: Sequence[Input], dtype: torch.dtype) -> None:
        super().__init__()
        self.inputs, self.dtype = tuple(inputs), dtype

    @abstractmethod
    def example(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return inputs of some rows that are made up: they are nobody's data."""

    def of_rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of rows as a data set holds them, (B, ...)."""
        return (x.to(self.inputs[0].dtype),)


class Standardised(Prepared):
    """Features or series, float64, NaN where missing: imputed and standardised as the training rows of a client."""

    def __init__(self, inputs: Sequence[Input], stats: Standardise, dtype: torch.dtype) -> None:
        super().__init__(inputs, dtype)
        self.register_buffer("mean", stats.mean)
        self.register_buffer("inverse", stats.inverse)
        self.mean: Tensor
        self.inverse: Tensor

    def forward(self, *inputs: Tensor) -> Tensor:
        """The same arithmetic as `Standardise.apply`."""
        return Standardise(self.mean, self.inverse).apply(*inputs).to(self.dtype)

    def example(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draws around the mean; the first value of the last row is missing."""
        return (self._drawn(rows, generator, self.inputs[0].shape, self.mean, self.inverse),)

    @staticmethod
    def _drawn(rows: int, generator: torch.Generator, shape: tuple[int, ...], mean: Tensor, inverse: Tensor) -> Tensor:
        spread = torch.where(inverse > 0, 1 / torch.where(inverse > 0, inverse, 1), 0)
        x = mean + spread * torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
        x.view(-1)[-x[0].numel()] = torch.nan
        return x


class Tabular(Standardised):
    """The columns of a table: numbers (B, F) float64, NaN where missing; codes (B, C) int64, -1 where missing.

    Any code that no category has is missing, too. A missing category becomes NaN in all its columns of zeros and ones,
    as in training, and so the category's frequencies.
    """

    def __init__(self, about: Preprocessing, stats: Standardise, dtype: torch.dtype) -> None:
        numbers, categories = about.numbers, about.categories
        inputs: list[Input] = []
        if numbers:
            inputs.append(Input("numbers", torch.float64, (len(numbers),), tuple(numbers)))
        if categories:
            levels = tuple(categories.values())
            inputs.append(Input("categories", torch.int64, (len(categories),), tuple(categories), levels))
        super().__init__(inputs, stats, dtype)
        self.has_numbers, self.has_categories = bool(numbers), bool(categories)
        owner, level, size, order = list[int](), list[int](), list[int](), list[int]()
        at, number = len(numbers), 0
        for column in about.columns:
            if column.categories is None:
                order.append(number)
                number += 1
                continue
            width = len(column.categories)
            owner += [list(categories).index(column.name)] * width
            level += range(width)
            size += [width] * width
            order += range(at, at + width)
            at += width
        for name, values in (("owner", owner), ("level", level), ("size", size), ("order", order)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)
        self.owner: Tensor
        self.level: Tensor
        self.size: Tensor
        self.order: Tensor

    def forward(self, *inputs: Tensor) -> Tensor:
        """Numbers, if there are any, then codes, if there are any."""
        pieces = [inputs[0].double()] if self.has_numbers else []
        if self.has_categories:
            codes = inputs[-1].index_select(1, self.owner)  # (B, levels of all columns)
            unknown = (codes < 0) | (codes >= self.size)
            pieces.append((codes == self.level).double().masked_fill(unknown, torch.nan))
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1).index_select(1, self.order)
        return super().forward(x)

    def of_rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """Numbers as they are, and of each category the code of its 1."""
        placed = x[:, torch.argsort(self.order)]  # numbers, then the zeros and ones of each category
        count = len(self.order) - len(self.owner)
        found = [placed[:, :count].double()] if self.has_numbers else []
        if self.has_categories:
            levels = placed[:, count:]
            each = [levels[:, self.owner == number] for number in range(len(self.inputs[-1].columns))]
            codes = [torch.where(hot.isnan().any(1), -1, hot.nan_to_num().argmax(1)) for hot in each]
            found.append(torch.stack(codes, dim=1))
        return tuple(found)

    def example(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Numbers around the mean and any codes; the first number and the first code of the last row are missing."""
        out: list[Tensor] = []
        if self.has_numbers:
            count = len(self.inputs[0].columns)
            at = torch.argsort(self.order)[:count]  # the place of each number in x
            out.append(self._drawn(rows, generator, (count,), self.mean[at], self.inverse[at]))
        if self.has_categories:
            draws = [
                torch.randint(0, max(1, len(levels)), (rows, 1), generator=generator)
                for levels in self.inputs[-1].categories
            ]
            codes = torch.cat(draws, dim=1)
            codes[-1, 0] = -1
            out.append(codes)
        return tuple(out)


class Pixels(Prepared):
    """Images (B, C, H, W), bytes or floating-point, with the data set's mean and deviation taken out."""

    def __init__(self, about: Preprocessing, dtype: torch.dtype) -> None:
        super().__init__([Input("images", about.type, about.input_shape)], dtype)
        kind = about.type if about.type.is_floating_point else torch.float32
        for name, values in (("mean", about.mean), ("std", about.std)):
            self.register_buffer(name, torch.tensor(values, dtype=kind)[:, None, None])
        self.mean: Tensor
        self.std: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """The same arithmetic as `ClientData.normalised`."""
        values = x if self.inputs[0].dtype.is_floating_point else x.float() / 255.0
        return ((values - self.mean) / self.std).to(self.dtype)

    def example(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noise."""
        shape, dtype = (rows, *self.inputs[0].shape), self.inputs[0].dtype
        if not dtype.is_floating_point:
            return (torch.randint(0, 256, shape, generator=generator).to(dtype),)
        return (self.mean + self.std * torch.randn(shape, generator=generator, dtype=dtype),)


class Tokens(Prepared):
    """Whole numbers (B, T) that stand for words or codes, as they are."""

    def __init__(self, about: Preprocessing, dtype: torch.dtype) -> None:
        super().__init__([Input("tokens", torch.int64, about.input_shape)], dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers."""
        return x

    def example(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The number 0, which every vocabulary has."""
        return (torch.zeros((rows, *self.inputs[0].shape), dtype=torch.int64),)


def prepared(about: Preprocessing, stats: Standardise | None, dtype: torch.dtype) -> Prepared:
    """Return the module for a kind of rows.

    Args:
        about: the preprocessing of the run.
        stats: how features or series are standardised; None for other kinds.
        dtype: the type in which the network computes.
    """
    if about.kind == "image":
        return Pixels(about, dtype)
    if stats is None:
        return Tokens(about, dtype)
    if about.columns:
        return Tabular(about, stats, dtype)
    name = "series" if about.kind == "series" else "numbers"
    return Standardised([Input(name, torch.float64, about.input_shape)], stats, dtype)
