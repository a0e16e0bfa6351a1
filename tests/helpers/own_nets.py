"""Networks as users write them, of plain features (12,) or tokens: those that train, and those that are refused."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable as Function
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint


class Own(nn.Module):
    """Two layers; the subclasses have one peculiarity each."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(input_shape[0], width)
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


# ------------------------------------------------------------------------------------------------ those that train


class Query(Own):
    """A learned query, which is a parameter fed to a submodule."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.query = nn.Parameter(torch.randn(1, 8) * 0.1)
        self.project = nn.Linear(8, 8)

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * self.project(self.query)


class Blank(nn.Module):
    """A layer whose bias begins at 0, and as ``what`` says its weights, or a factor of it, too; between two others."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, what: str = "weight") -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(input_shape[0], 5), nn.Linear(5, 5), nn.Linear(5, num_classes)
        self.alpha = nn.Parameter(torch.tensor(float(what != "alpha")))
        nn.init.zeros_(self.fc2.bias)
        if what == "weight":
            nn.init.zeros_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3((self.alpha * self.fc2(self.fc1(x))).tanh())


class Halves(nn.Module):
    """The first layer's weights are bfloat16."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(input_shape[0], 5).bfloat16(), nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x.bfloat16()).to(x.dtype).relu())


class Doubled(Own):
    """The first layer computes with a function of its weight."""

    def features(self, x: Tensor) -> Tensor:
        return functional.linear(x, 2 * self.first.weight, self.first.bias).relu()


class Norms(nn.Module):
    """Nothing but normalisation is trained."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(input_shape), nn.Linear(input_shape[0], num_classes).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


class Attention(nn.Module):
    """Learned queries attend to a series."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.query = nn.Parameter(torch.randn(1, 2, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        series = self.embed(x.reshape(x.shape[0], -1, 3))
        found = self.attention(self.query.expand(x.shape[0], -1, -1), series, series, need_weights=False)[0]
        return self.head(found.flatten(1))


class WeightNorm(Own):
    """The weight is a direction and a length."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.first = parametrizations.weight_norm(self.first)


class SpectralNorm(Own):
    """Buffers hold the singular vectors, which move in training."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.first = parametrizations.spectral_norm(self.first)


class Lazy(Own):
    """Layers that take their widths from the first input."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__(input_shape, num_classes)
        self.first = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())


class Normed(Own):
    """BatchNorm, whose statistics are buffers."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.first = nn.Sequential(self.first, nn.BatchNorm1d(8))


class Counting(Own):
    """A buffer of the user's own that moves in training."""

    seen: Tensor

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.register_buffer("seen", torch.zeros(8))

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        if self.training:
            self.seen.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.seen


class Dropout(Own):
    """Dropout as a layer."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.drop = nn.Dropout(0.3)

    def features(self, x: Tensor) -> Tensor:
        return self.drop(super().features(x))


class FunctionalDropout(Own):
    """Dropout as a function."""

    def features(self, x: Tensor) -> Tensor:
        return functional.dropout(super().features(x), 0.3, training=self.training)


class Noise(Own):
    """Noise on the features, in training."""

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        return h + 0.1 * torch.rand_like(h) if self.training else h


class Inner(nn.Module):
    """Branches on values and takes a number out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale if h.sum().item() > 0 else h * self.scale**2


class Branching(Own):
    """Control flow that depends on the data."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.inner = Inner()

    def features(self, x: Tensor) -> Tensor:
        return self.inner(super().features(x))


class Tied(Own):
    """A module that is used twice, and a weight of two modules."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.twice, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.twice.weight

    def features(self, x: Tensor) -> Tensor:
        return self.other(torch.relu(self.twice(torch.relu(self.twice(super().features(x))))))


class Listed(Own):
    """Parameters in lists, one of them not contiguous."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.scales = nn.ParameterList([torch.ones(8), torch.zeros(8)])
        self.named = nn.ParameterDict({"mix": nn.Parameter(torch.randn(8, 8).t())})

    def features(self, x: Tensor) -> Tensor:
        return (super().features(x) * self.scales[0] + self.scales[1]) @ self.named["mix"]


class Hooked(Own):
    """A hook of the user doubles what a layer gives."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.first.register_forward_hook(lambda _layer, _given, out: 2 * out)


class Cached(Own):
    """A mask that is made at the first forward and depends on shapes alone."""

    mask: Tensor | None = None

    def features(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.linspace(0, 1, 12)
        return super().features(x * self.mask)


class FrozenFirst(Own):
    """A frozen layer with BatchNorm, whose statistics a method ``train`` keeps still."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.first = nn.Sequential(self.first, nn.BatchNorm1d(8))
        self.first.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenFirst:
        super().train(mode)
        self.first.eval()
        return self


class Whole(Own):
    """An integer parameter, which is a constant."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.order = nn.Parameter(torch.arange(12).flip(0), requires_grad=False)

    def features(self, x: Tensor) -> Tensor:
        return super().features(x[:, self.order])


class Bilinear(Own):
    """A product of a vector with itself, which has weights."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.bilinear = nn.Bilinear(8, 8, 8)

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        return self.bilinear(h, h)


class Lstm(nn.Module):
    """A recurrent network over a series of three numbers."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, batch_first=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.reshape(x.shape[0], -1, 3))[0][:, -1])


class Optional(Own):
    """A second input that is never fed."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.features(x if mask is None else x * mask))


class MovingFrozen(Own):
    """A frozen BatchNorm whose statistics move."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.norm = nn.BatchNorm1d(8).requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(super().features(x))


class Unused(Own):
    """A layer that no forward uses."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.spare = nn.Linear(8, 8)


class Orthogonal(Own):
    """An orthogonal weight, by a parametrization."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.first = parametrizations.orthogonal(self.first)


class BackwardHook(Own):
    """A hook of the user doubles the gradient that leaves a layer."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.second = nn.Linear(8, 8)
        self.second.register_full_backward_hook(lambda _layer, given, _out: tuple(2 * g for g in given))

    def features(self, x: Tensor) -> Tensor:
        return self.second(super().features(x))


class Checkpointed(Own):
    """Computes activations again in the backward pass, to save memory."""

    def features(self, x: Tensor) -> Tensor:
        return checkpoint(super().features, x, use_reentrant=False)


class BatchOnly(Own):
    """BatchNorm that uses the batch's own statistics in evaluation, too."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(super().features(x))


class Switch(nn.Module):
    """A buffer of truth values, which training moves: the first unit goes off, and the last one on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("on", torch.tensor([True] * 7 + [False]))

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.on.copy_(torch.arange(8, device=h.device) > 0)
        return h * self.on


class Switches(Own):
    """A layer with a buffer of truth values."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.switch = Switch()

    def features(self, x: Tensor) -> Tensor:
        return self.switch(super().features(x))


class Few(Own):
    """Needs more than two examples to train."""

    def features(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 4:
            raise ValueError("four or more")
        return super().features(x)


class Leaves(Own):
    """Asks for gradients of tensors that a forward makes: of its input, and of a new one."""

    def forward(self, x: Tensor) -> Tensor:
        at, step = x.detach().requires_grad_(torch.is_grad_enabled()), torch.zeros(8, requires_grad=True)
        return self.head(self.features(at) + step)


class Logging(Own):
    """Plain attributes that do not matter: a logger, a table, an object that refers to the network."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.log = logging.getLogger("own_nets")
        self.table = SimpleNamespace(widths=[12, 8], owner=(self, [self]), empty=((), [], {}))

    def features(self, x: Tensor) -> Tensor:
        self.log.debug("a batch of %s", x.shape[0])
        return super().features(x)


TRAIN = [
    *(Own, Query, Attention, WeightNorm, SpectralNorm, Lazy, Normed, Counting, Dropout, FunctionalDropout, Noise),
    *(Branching, Tied, Listed, Hooked, Cached, FrozenFirst, Whole, Bilinear, Lstm, Optional, MovingFrozen),
    *(Unused, Orthogonal, BackwardHook, Checkpointed, BatchOnly, Logging, Switches),
]


# ------------------------------------------------------------------------------------------ those that are refused


class Leaky(Own):
    """Remembers its last batch."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.memory = torch.zeros(8)

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x) - self.memory
        self.memory = h.detach().mean(0)
        return h


class Written(Leaky):
    """The same, in place."""

    def features(self, x: Tensor) -> Tensor:
        h = Own.features(self, x)
        self.memory.copy_(h.detach().mean(0))
        return h - self.memory


class Counter(Own):
    """A number that counts forwards."""

    calls = 0

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().features(x) / self.calls


class History(Own):
    """A list that grows, inside a mapping."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.history: dict[str, list[float]] = {"means": []}

    def features(self, x: Tensor) -> Tensor:
        self.history["means"].append(float(x.mean()))
        return super().features(x)


class Statistics:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.mean = 0.0


class Nested(Own):
    """State inside an object."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.statistics = Statistics()

    def features(self, x: Tensor) -> Tensor:
        self.statistics.mean = 0.9 * self.statistics.mean + float(x.detach().mean())
        return super().features(x)


class OfClass(Own):
    """State of the class, in a mapping."""

    table: dict[str, Tensor] = {}

    def features(self, x: Tensor) -> Tensor:
        self.table["mean"] = x.detach().mean(0)
        return super().features(x)


class FirstBatch(Own):
    """A cache of the first batch that it sees, which never changes afterwards."""

    mean: Tensor | None = None

    def features(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.detach().mean(0)
        return super().features(x - self.mean)


class FirstWeights(Own):
    """A cache of the first client's weights."""

    norm: Tensor | None = None

    def features(self, x: Tensor) -> Tensor:
        if self.norm is None:
            self.norm = self.first.weight.detach().norm()
        return super().features(x) / self.norm


_SEEN: list[float] = [0.0]


class Global(Own):
    """State in a global."""

    def features(self, x: Tensor) -> Tensor:
        _SEEN[0] += float(x.detach().abs().mean())
        return super().features(x) + _SEEN[0]


class NumpyNoise(Own):
    """Random numbers that are not torch's."""

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) + float(np.random.rand())  # noqa: NPY002 - that is the mistake


class NumpyWeights(Own):
    """A weight that no seed of torch's repeats."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.scale = nn.Parameter(torch.tensor(np.random.rand(8), dtype=torch.float32))  # noqa: NPY002

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * self.scale


class EvalBuffer(Own):
    """A buffer that moves in evaluation, too."""

    seen: Tensor

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.register_buffer("seen", torch.zeros(()))

    def features(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return super().features(x)


class LateBuffer(Own):
    """A buffer that a forward registers."""

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        if not hasattr(self, "mean"):
            self.register_buffer("mean", h.detach().mean(0))
        return h - self.get_buffer("mean")


class Clamped(Own):
    """Changes its own weight."""

    def features(self, x: Tensor) -> Tensor:
        self.first.weight.data.clamp_(-0.05, 0.05)
        return super().features(x)


class Teacher(Own):
    """A frozen average of its own weights."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.teacher = nn.Linear(12, 8).requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        if self.training:
            self.teacher.weight.data = 0.9 * self.teacher.weight.data + 0.1 * self.first.weight.data
        return super().features(x) + self.teacher(x)


class MaxNorm(nn.Module):
    """torch's embedding with a largest norm, which it enforces by writing into the weight."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8, max_norm=1.0)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x.long().clamp(0, 4)).mean(1))


class OldWeightNorm(Own):
    """The older weight normalisation, by a hook."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(self.first)


class OldSpectralNorm(Own):
    """The older spectral normalisation."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        nn.utils.spectral_norm(self.first)


class Pruned(Own):
    """A pruned layer."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        prune.l1_unstructured(self.first, "weight", amount=0.5)


class TwoInputs(Own):
    """Needs a second input."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.features(x * mask))


class NoInput(Own):
    """Takes no input."""

    def forward(self) -> Tensor:
        return self.head.bias.expand(2, -1)


class LazyUnused(Own):
    """A lazy layer that no forward calls."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.unused = nn.LazyLinear(3)


class Complex(Own):
    """A complex weight."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def features(self, x: Tensor) -> Tensor:
        return (super().features(x) * self.phase).real


class Placed(Own):
    """Moves itself to another device."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.head = self.head.to("meta")


class NotANumber(Own):
    """NaN in a new weight."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.scale = nn.Parameter(torch.full((8,), float("nan")))


class OneInfinity(Own):
    """One infinity in a new weight."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.scale = nn.Parameter(torch.tensor([1.0, float("inf")]))


class PlainList(Own):
    """Layers in a list that torch does not look into."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.blocks = [nn.Linear(8, 8), nn.Linear(8, 8)]

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        for block in self.blocks:
            h = torch.relu(block(h))
        return h


class PlainQuery(Own):
    """A learned query that is no nn.Parameter."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.query = torch.randn(8, requires_grad=True)

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) + self.query


class InHelper(Own):
    """A layer that torch does not know: in an object of one's own."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.hidden = self.hide(nn.Linear(8, 8))

    def hide(self, layer: nn.Module) -> Any:
        return SimpleNamespace(layer=layer)

    def shown(self) -> Function[[Tensor], Tensor]:
        return self.hidden.layer

    def features(self, x: Tensor) -> Tensor:
        return self.shown()(super().features(x))


class InSet(InHelper):
    """Likewise in a set."""

    def hide(self, layer: nn.Module) -> Any:
        return {layer}

    def shown(self) -> Function[[Tensor], Tensor]:
        return next(iter(self.hidden))


class InDeque(InSet):
    """Likewise in a queue."""

    def hide(self, layer: nn.Module) -> Any:
        return deque([layer])


class InPartial(InHelper):
    """Likewise in a function with an argument."""

    def hide(self, layer: nn.Module) -> Any:
        return partial(lambda layer, x: layer(x), layer)

    def shown(self) -> Function[[Tensor], Tensor]:
        return self.hidden


class InClosure(InPartial):
    """Likewise in a function's closure."""

    def hide(self, layer: nn.Module) -> Any:
        return lambda x: layer(x)


class InMethod(InPartial):
    """Likewise behind a bound method."""

    def hide(self, layer: nn.Module) -> Any:
        return layer.forward


class InDefault(InPartial):
    """Likewise in a default of an argument."""

    def hide(self, layer: nn.Module) -> Any:
        return lambda x, layer=layer: layer(x)


_OUTSIDE = nn.Linear(8, 8)


class Outside(Own):
    """A layer of the file, which no attribute holds."""

    def features(self, x: Tensor) -> Tensor:
        return _OUTSIDE(super().features(x))


class Unfrozen(Own):
    """Frozen when it is new, but not in training."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.first.requires_grad_(False)

    def train(self, mode: bool = True) -> Unfrozen:
        self.first.requires_grad_(mode)
        return super().train(mode)


class ManyHidden(PlainQuery):
    """Needs more than two examples to train, and has a weight that torch does not know."""

    def features(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 4:
            raise ValueError("four or more")
        return super().features(x)


class AtLeastFour(nn.Module):
    """Takes no training batch of less than four examples."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 4:
            raise ValueError("four or more")
        return x


class Slots:
    """A counter without ``__dict__``."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Slotted(Own):
    """State in a slot, of which the first passes show no effect."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.state = Slots()

    def features(self, x: Tensor) -> Tensor:
        self.state.calls += 1
        return super().features(x) * (1 if self.state.calls < 1000 else 2)


class Cycling(Own):
    """State in an iterator; each pass takes four steps, after which it begins again."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.factors = cycle([1.0, 2.0, 3.0, 4.0])

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * sum(next(self.factors) for _ in range(4))


class Sequences(Own):
    """Returns a row of logits at each of five places."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unsqueeze(1).expand(-1, 5, -1)


class NamedInput(Own):
    """Takes its input by name alone."""

    def forward(self, **given: Tensor) -> Tensor:
        return super().forward(given["x"])


class Squeezed(Own):
    """Drops the dimension of the batch where it is 1."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.unsqueeze(1))).squeeze()


class AlwaysDropping(Own):
    """Dropout that forgets the mode."""

    def features(self, x: Tensor) -> Tensor:
        return functional.dropout(super().features(x), 0.3)


class TrainingFails(Own):
    """A fault that only training has."""

    def features(self, x: Tensor) -> Tensor:
        h = super().features(x)
        return h @ torch.zeros(3, 3) if self.training else h


class BackwardFails(Own):
    """Writes over a value that the backward pass needs."""

    def features(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.first(x))
        h.mul_(2)
        return h


class LastShape(Own):
    """Stores a size in each forward, which a trace cannot."""

    size: object = None

    def features(self, x: Tensor) -> Tensor:
        self.size = x.shape[1]
        return super().features(x)


class Warmed:
    """A function with a memory."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h


class Callable(Own):
    """State inside an object that is called."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.warm = Warmed()

    def features(self, x: Tensor) -> Tensor:
        return self.warm(super().features(x))


class AllFrozen(Own):
    """Nothing to train."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.requires_grad_(False)


class Detached(Own):
    """Runs without gradients."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class SparseGradient(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8, sparse=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x.long().clamp(0, 4)).mean(1))


class SparseBuffer(Own):
    """A sparse buffer, such as the edges of a graph."""

    edges: Tensor

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.register_buffer("edges", torch.eye(12).to_sparse())

    def features(self, x: Tensor) -> Tensor:
        return super().features(torch.sparse.mm(self.edges, x.t()).t())


class EvalInForward(Own):
    """Puts a layer into evaluation mode, again in each forward."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.norm = nn.BatchNorm1d(8).requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return self.norm(super().features(x))


class GradientHook(Own):
    """Changes the gradient of a weight by a hook."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.first.weight.register_hook(lambda g: 2 * g)


class CompiledForward(Own):
    """A forward that torch compiles."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.first.compile()


_BACKBONE = nn.Linear(12, 8)


class Shared(Own):
    """A submodule that all networks share."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.first = _BACKBONE


class SharedWeight(Own):
    """A parameter that all networks share."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.first.weight = _BACKBONE.weight


class NoGradient(Own):
    """Runs a layer without gradients, which a trace does not see."""

    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().features(x)


class Autocast(Own):
    """Runs a layer in bfloat16."""

    def features(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().features(x).float()


class Energy(Own):
    """Takes a gradient in its forward."""

    def features(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(super().features(x).sum(), x, create_graph=True)
        return super().features(x.detach() + g)


class ManyNoGradient(NoGradient):
    """Needs more than two examples to train, and its first layer has a gradient in pieces alone."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.four = AtLeastFour()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.four(x))


class Auxiliary(Own):
    """A second output, in training only."""

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return (out, out) if self.training else out


class Namespace(Own):
    """State in a namespace, by name."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.state = SimpleNamespace(last=None)

    def features(self, x: Tensor) -> Tensor:
        self.state.last = x.detach()
        return super().features(x)


def scripted(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Own(input_shape, num_classes), torch.zeros(2, 12))


def compiled(input_shape: tuple[int, ...], num_classes: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(Own(input_shape, num_classes))


def parallel(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.DataParallel(Own(input_shape, num_classes))


class Needy(Own):
    """Needs an argument that only the user knows."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, depth: int) -> None:
        super().__init__(input_shape, num_classes, depth)


#: The network, what the error says, and the cut.
REFUSED = [
    ("Leaky", "changes 'memory' in its forward (Leaky, own_nets.py, line ", "use a buffer"),
    ("Written", "changes 'memory' in its forward (Written, own_nets.py, line ", "use a buffer"),
    ("Counter", "changes 'calls' in its forward (Counter, ", "leak from client to client"),
    ("History", "changes 'history' in its forward (History, ", "use a buffer"),
    ("Nested", "changes 'statistics' in its forward", "use a buffer"),
    ("OfClass", "changes 'OfClass.table' in its forward (OfClass, ", "use a buffer"),
    ("FirstBatch", "changes 'mean' in its forward (FirstBatch, ", "use a buffer"),
    ("FirstWeights", "changes 'norm' in its forward (FirstWeights, ", "use a buffer"),
    ("Global", "another output for the same weights and input", "not in globals, closures or hooks"),
    ("NumpyNoise", "another output for the same weights and input", "draw random numbers by torch"),
    ("NumpyWeights", "'scale' differs between two new modules of one seed", "torch.nn.init"),
    ("EvalBuffer", "writes into its buffer 'seen' in evaluation mode (EvalBuffer, ", "if self.training"),
    ("LateBuffer", "adds 'mean' in its forward", "register it in __init__"),
    ("Clamped", "writes into its parameter 'first.weight' during its forward (Clamped, own", "a changed copy"),
    ("Teacher", "writes into 'teacher.weight' during its forward (Teacher, own_nets.py", "make it a buffer"),
    ("MaxNorm", "'embed' is an Embedding with max_norm", "leave max_norm out"),
    ("OldWeightNorm", "'first' (Linear) is changed by torch.nn.utils.weight_norm", "parametrizations.weight_norm"),
    ("OldSpectralNorm", "changed by torch.nn.utils.spectral_norm", "parametrizations.spectral_norm"),
    ("Pruned", "changed by torch.nn.utils.prune", "prune.remove"),
    ("TwoInputs", "TwoInputs.forward(x, mask) needs 2 inputs (x, mask), but polyfed feeds one", "tokens is x != 0"),
    ("NoInput", "NoInput.forward takes no input", "expected forward(self, x)"),
    ("LazyUnused", "still has no shape for 'unused.weight'", "does the forward call the layer"),
    ("Complex", "'phase' is complex64", "torch.view_as_real"),
    ("Placed", "puts 'head.weight' on the device 'meta'", "run.device"),
    ("NotANumber", "'scale' holds NaN or infinity when it is new", "torch.nn.init"),
    ("OneInfinity", "'scale' holds NaN or infinity when it is new", "torch.nn.init"),
    ("PlainList", "'blocks' is a list of a Linear that torch does not register", "nn.ModuleList"),
    ("PlainQuery", "of shape (8,) with requires_grad in 'query' (Tensor) that torch does not", "an nn.Parameter"),
    ("InHelper", "with requires_grad in 'hidden' (SimpleNamespace) that torch does not register", "an attribute of"),
    ("InSet", "'hidden' is a set of a Linear that torch does not register", "nn.ModuleList"),
    ("InDeque", "'hidden' is a deque of a Linear that torch does not register", "nn.ModuleList"),
    ("InPartial", "with requires_grad in 'hidden' (partial) that torch does not register", "an attribute of"),
    ("InClosure", "with requires_grad in 'hidden' (function) that torch does not register", "an attribute of"),
    ("InMethod", "with requires_grad in 'hidden' (method) that torch does not register", "an attribute of"),
    ("InDefault", "with requires_grad in 'hidden' (function) that torch does not register", "an attribute of"),
    ("Outside", "with requires_grad that torch does not register, so it would not be trained", "an attribute of"),
    ("Unfrozen", "'first.weight' requires a gradient in training, but did not in the new", "in __init__ alone"),
    ("ManyHidden", "of shape (8,) with requires_grad in 'query' (Tensor) that torch does not", "an nn.Parameter"),
    ("ManyNoGradient(classifier=head)", "the gradient of 'first.bias' in its pieces differs", "a submodule that"),
    ("Slotted", "changes 'state' in its forward (Slotted, own_nets.py, line ", "use a buffer"),
    ("Cycling", "changes 'factors' in its forward", "use a buffer"),
    ("Sequences", "returned (2, 5, 4) for an input of shape (2, 12), expected one tensor (2, L)", "a row of logits"),
    ("Sequences(classifier=head)", "returned (2, 5, 4) for an input", "a row of logits per sample"),
    ("NamedInput", "NamedInput.forward takes no input", "expected forward(self, x)"),
    ("Squeezed", "for a batch of one example in evaluation mode, expected (1, 4)", "squeeze()"),
    ("AlwaysDropping", "draws random numbers in evaluation mode", "training=self.training"),
    ("TrainingFails", "type float32, in training mode: RuntimeError: ", "(TrainingFails, own_nets.py, line "),
    ("BackwardFails", "in training mode: RuntimeError: one of the variables needed for gradient", "inplace operation"),
    ("LastShape(classifier=head)", "stores a value in an attribute", "a submodule that contains no cut"),
    ("Callable", "changes 'warm' in its forward", "use a buffer"),
    ("AllFrozen", "its output depends on no parameter that could be trained (it has 0)", "freeze all"),
    ("Detached", "its output depends on no parameter that could be trained (it has 4)", "torch.no_grad()"),
    ("SparseGradient", "the gradient of 'embed.weight' is sparse", "leave out sparse=True"),
    ("SparseBuffer", "'edges' is sparse", "make the sparse tensor of them in the forward"),
    ("EvalInForward", "switches 'norm' between training and evaluation mode", "a method train(self, mode)"),
    ("GradientHook", "a hook on 'first.weight' would be lost", "torch.autograd.Function"),
    ("CompiledForward", "its submodule 'first' is compiled (Linear)", "the plain nn.Module"),
    ("Shared", "put the same 'first' into two new modules", "copy.deepcopy"),
    ("SharedWeight", "put the same 'first.weight' into two new modules", "copy.deepcopy"),
    ("NoGradient(classifier=head)", "the gradient of 'first.bias' in its pieces differs", "a submodule that contains"),
    ("Autocast(classifier=head)", "its pieces in a row differ from its forward", "autocast(): put it into the forward"),
    ("Energy(classifier=head)", "its pieces fail (RuntimeError: ", "enable_grad() or autocast(): put it into"),
    ("Auxiliary", "returns tuple per sample in training mode and (4,) in evaluation mode", "the logits only"),
    ("Namespace", "changes 'state' in its forward (Namespace, ", "use a buffer"),
    ("scripted", "it is compiled (TopLevelTracedModule)", "the plain nn.Module"),
    ("compiled", "it is compiled (OptimizedModule)", "the plain nn.Module"),
    ("parallel", "it is a DataParallel", "return the network inside it"),
    ("Needy", "needs 'depth', which clients.models does not give", '{ name = "own_nets:Needy", depth = ... }'),
]
