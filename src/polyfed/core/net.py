"""Networks as a loss sees them, and the shapes of losses and gradients."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from polyfed.base.types import Params, Parts
from polyfed.models.split import SplitModel, keep_statistics

#: (x, y): inputs (B, ...) and labels (B,), int64, or for a regression targets of the inputs' type. A `WeightedBatch`
#: where ``train.class_weights`` or ``train.label_smoothing`` is set.
Batch: TypeAlias = tuple[Tensor, Tensor]


class WeightedBatch(tuple[Tensor, Tensor]):
    """(x, y) with what a supervised loss needs beside them; `polyfed.blocks.losses` reads it.

    Attributes:
        weights: the weight of each class at this client, (L,); None weighs all alike.
        smoothing: the share of each label that is divided among all classes.
    """

    weights: Tensor | None
    smoothing: float

    def __new__(cls, x: Tensor, y: Tensor, weights: Tensor | None, smoothing: float) -> WeightedBatch:
        """Make the pair."""
        made = super().__new__(cls, (x, y))
        made.weights, made.smoothing = weights, smoothing
        return made


def alike(batch: Batch, x: Tensor, y: Tensor) -> Batch:
    """Return other examples of the same client, with the class weights and the label smoothing of ``batch``."""
    return WeightedBatch(x, y, batch.weights, batch.smoothing) if isinstance(batch, WeightedBatch) else (x, y)


@dataclass(frozen=True)
class Net:
    """A model bound to weights, as a loss sees it; or, where a part has no model, the tensors alone."""

    model: SplitModel | None
    params: Params

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called ``name``."""
        return self.params[name]

    def _model(self) -> SplitModel:
        if self.model is None:
            raise TypeError("this part has tensors but no model: Algorithm.models() does not name it")
        return self.model

    def names(self, piece: Literal["extractor", "intermediate", "classifier"]) -> frozenset[str]:
        """The names of a piece's weights and buffers."""
        return getattr(self._model(), f"{piece}_names")

    def __call__(self, x: Tensor) -> Tensor:
        """The whole network: (B, ...) -> (B, L)."""
        return self._model()(self.params, x)

    def represent(self, x: Tensor) -> Tensor:
        """Everything before the classifier: (B, ...) -> (B, rep_dim)."""
        return self._model().represent(self.params, x)

    def classify(self, r: Tensor) -> Tensor:
        """The classifier: (B, rep_dim) -> (B, L)."""
        return self._model().classify(self.params, r)

    def still(self) -> Net:
        """The same weights, with running statistics of its own: a training-mode forward moves nobody else's."""
        return Net(self.model, keep_statistics(self._model(), self.params))

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """In the block the network behaves as in evaluation, such as by running statistics; then as before."""
        model = self._model()
        before = model.training
        model.train(False)
        try:
            yield
        finally:
            model.train(before)

    def batch_statistics(self, x: Tensor) -> dict[str, Tensor]:
        """The statistics of the normalisation layers on (B, ...) alone: `SplitModel.batch_statistics`."""
        return self._model().batch_statistics(self.params, x)

    def extract(self, x: Tensor) -> Tensor:
        """The extractor: (B, ...) -> s_in (B, ...)."""
        return self._model().extract(self.params, x)

    def intermediate(self, s_in: Tensor) -> Tensor:
        """What lies between extractor and classifier: s_in -> (B, rep_dim)."""
        return self._model().intermediate(self.params, s_in)

    def stepped(self, loss: Callable[[Net], Tensor], lr: float) -> Net:
        """The network after one plain step ``w - lr * d loss(w) / dw``, differentiable by whatever else ``loss`` reads.

        Only the step's own gradient is kept for that: no second derivative by w is taken.
        """
        weights = self._model().parameter_names
        w = {name: value.detach().requires_grad_(name in weights) for name, value in self.params.items()}
        leaves = {name: value for name, value in w.items() if value.requires_grad}
        found = torch.autograd.grad(
            loss(Net(self.model, w)), list(leaves.values()), create_graph=True, materialize_grads=True
        )
        moved = {name: leaf - lr * g for (name, leaf), g in zip(leaves.items(), found, strict=True)}
        return Net(self.model, {**w, **moved})


Nets: TypeAlias = Mapping[str, Net]
#: ``loss(nets, batch)`` -> scalar. Pure: the same for one client and, under vmap, for many.
Loss: TypeAlias = Callable[[Nets, Batch], Tensor]


class Grad(Protocol):
    """``grad(loss)``: the gradient of ``loss`` for every trainable part, at its current weights.

    ``grad(loss, model=w)`` takes it at the weights ``w`` of the part ``model`` instead. What a loss does not touch
    has gradient zero.
    """

    def __call__(self, loss: Loss, **replace: Params) -> dict[str, dict[str, Tensor]]:
        """The gradient, by part and name."""
        ...


#: ``gradient(grad, nets, batch, due)`` -> the gradients to step with. Pure, like a loss; ``due`` is a bool, or a whole
#: number where `polyfed.core.requests.fit` has a function for ``every``.
Gradient: TypeAlias = Callable[[Grad, Nets, Batch, Any], Parts]
