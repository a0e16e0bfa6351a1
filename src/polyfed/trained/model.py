"""``TrainedModel``: an algorithm's predictor as a module that holds everything that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, nn

from polyfed.base.errors import ConfigError
from polyfed.base.text import hint
from polyfed.base.types import Params, Parts
from polyfed.blocks.losses import probabilities
from polyfed.core.algorithm import Algorithm
from polyfed.core.net import Net
from polyfed.models.split import SplitModel
from polyfed.trained.inputs import Input, Prepared


class Part(nn.Module):
    """The tensors of a part, under the names that its network gives them.

    Args:
        tensors: by name.
        parameters: the names that are parameters; the others are buffers.
    """

    def __init__(self, tensors: Params, parameters: frozenset[str]) -> None:
        super().__init__()
        self._places: list[tuple[str, nn.Module, str]] = []
        for name, value in tensors.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            own = value.detach().cpu().clone()
            if name in parameters:
                owner.register_parameter(leaf, nn.Parameter(own, requires_grad=False))
            else:
                owner.register_buffer(leaf, own)
            self._places.append((name, owner, leaf))

    def params(self) -> dict[str, Tensor]:
        """The tensors as they are now, which may be on another device, or symbols of an export."""
        return {name: getattr(owner, leaf) for name, owner, leaf in self._places}


def _attribute(part: str) -> str:
    """Return a part's name as that of an attribute: FedAPEN's "lambda" is a word of Python."""
    return part if part.isidentifier() and not iskeyword(part) else f"{part.replace('.', '_')}_"


class TrainedModel(nn.Module):
    """A predictor of a trained run: from rows as a file has them to probabilities, or predictions of a regression.

    It is always in evaluation mode: `train` has no effect. Parameters do not require gradients unless
    ``requires_grad_()`` is called. Only one thread at a time may use it.

    Args:
        algorithm: the algorithm that trained it; its ``predict`` is the forward pass.
        models: the networks by part.
        parts: the tensors by part; a part without a network has tensors alone.
        preparation: makes the networks' input.
        predictor: a predictor's name; None takes the default one.
        classes: the classes' names; empty for a regression.
        target: offset and scale of a regression's targets.
        about: whose model it is, as JSON values for the description of an export.
        reads: the columns of a table that the networks read, by name; empty for other data.

    Attributes:
        predictor: the name of the predictor whose output `forward` returns.
        predictors: the names of all, the default first.
        classes: the classes' names, in the order of the columns of the output.

    Raises:
        ConfigError: there is no such predictor.
        ModelError: a network cannot be built.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        models: Mapping[str, SplitModel],
        parts: Parts,
        preparation: Prepared,
        *,
        predictor: str | None,
        classes: Sequence[str],
        target: tuple[float, float],
        about: Mapping[str, Any],
        reads: Sequence[str],
    ) -> None:
        super().__init__()
        self.algorithm, self.classes, self.about = algorithm, tuple(classes), dict(about)
        self.offset, self.scale = target
        self.reads = tuple(reads)
        self.preparation = preparation
        # Networks of its own: those of a task are shared with everybody who builds the same architecture.
        self.networks = {part: models[part].fresh() for part in parts if part in models}
        self.parts = nn.ModuleDict()
        self.constants = nn.ModuleDict()  # frozen parameters, which are part of the architecture
        #: The name of each part's submodule: an export writes Python that names it.
        self.keys = {part: _attribute(part) for part in parts}
        for part, tensors in parts.items():
            network = self.networks.get(part)
            names = frozenset[str]() if network is None else network.parameter_names
            self.parts.add_module(self.keys[part], Part(tensors, names))
            if network is not None and network.constants:
                form = next((value.dtype for value in tensors.values() if value.is_floating_point()), torch.float32)
                fixed = {n: v.to(form) if v.is_floating_point() else v for n, v in network.constants.items()}
                self.constants.add_module(self.keys[part], Part(fixed, frozenset()))
        self.eval()
        with torch.no_grad():
            found = self.outputs(*self.example())
        self.predictors = tuple(found)
        if predictor is not None and predictor not in found:
            raise ConfigError(
                f"predictor: got {predictor!r}{hint(predictor, found)} {algorithm.name} has {', '.join(found)} here"
            )
        self.predictor = predictor or self.predictors[0]

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What `forward` takes, in order."""
        return self.preparation.inputs

    def example(self, rows: int = 2) -> tuple[Tensor, ...]:
        """Return inputs of some rows that are made up, the same at each call."""
        device = next((value.device for value in (*self.parameters(), *self.buffers())), None)
        generator = torch.Generator().manual_seed(0)
        home = self.preparation.to("cpu")
        made = home.example(rows, generator)
        self.preparation.to(device)
        return tuple(value.to(device) for value in made)

    def outputs(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        """Return each predictor's logits (B, L), or outputs (B, 1) of a regression in the networks' unit, by name."""
        x = self.preparation(*inputs)
        nets: dict[str, Net] = {}
        for part, key in self.keys.items():
            network = self.networks.get(part)
            if network is not None and key in self.constants:
                network.lend(self._tensors(self.constants, key))
            nets[part] = Net(network, self._tensors(self.parts, key))
        found = self.algorithm.predict(nets, x)
        for network in self.networks.values():
            network.release()
        return found

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the predictor's probabilities (B, L) float64, or predictions (B, 1) in the unit of the targets.

        Args:
            inputs: as `inputs` lists them.
        """
        found = self.outputs(*inputs)[self.predictor].double()
        return probabilities(found) if self.classes else found * self.scale + self.offset

    def named_tensors(self) -> dict[str, Tensor]:
        """Return all tensors: a network's by its own names, behind the part's name where there are several parts.

        Names that begin with "preprocessing." are those of the preprocessing.
        """
        out: dict[str, Tensor] = {}
        for part, key in self.keys.items():
            prefix = f"{part}." if len(self.keys) > 1 else ""
            for group in (self.parts, self.constants):
                if key in group:
                    out |= {prefix + name: value for name, value in self._tensors(group, key).items()}
        return out | {f"preprocessing.{name}": value for name, value in self.preparation.state_dict().items()}

    @staticmethod
    def _tensors(group: nn.ModuleDict, key: str) -> dict[str, Tensor]:
        held = group[key]
        assert isinstance(held, Part)
        return held.params()

    def train(self, mode: bool = True) -> TrainedModel:
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)
