"""Networks of users whose channels meet in unlike ways; each classifies, and ends with ``head``."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyfed.models.split import SplitModel


class Dense(nn.Module):
    """Two maps side by side, as in a DenseNet; a flattened map before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.c = nn.Conv2d(10, 8, 1)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        h = torch.cat([h, self.b(h)], 1)
        return self.head(functional.max_pool2d(self.c(self.norm(h)), 2).flatten(1))


class Mobile(nn.Module):
    """A depthwise convolution with two outputs per input, a grouped one, and weights for whole maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.point = nn.Conv2d(16, 12, 1)
        self.grouped = nn.Conv2d(12, 24, 3, groups=4, padding=1)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 6, 1), nn.ReLU(), nn.Conv2d(6, 24, 1), nn.Sigmoid()
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu6(self.point(functional.hardswish(self.depthwise(self.a(x)))))
        h = self.grouped(h)
        h = h * self.squeeze(h)
        return self.head(functional.adaptive_avg_pool2d(h, 1).flatten(1))


class Up(nn.Module):
    """Transposed convolutions, one of them grouped, InstanceNorm, and a buffer with a number for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.grouped = nn.ConvTranspose2d(6, 12, 2, 2, groups=3)
        self.norm = nn.InstanceNorm2d(12, affine=True)
        self.register_buffer("scale", torch.linspace(1, 2, 12)[:, None, None])
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.norm(self.grouped(self.up(self.a(x)))) * self.scale).mean((2, 3)))


class Encoder(nn.Module):
    """A class token, places, and PyTorch's own transformer layer."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.places = nn.Parameter(torch.randn(1, 8, 32))
        self.block = nn.TransformerEncoderLayer(32, heads, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], 1) + self.places
        return self.head(self.block(h)[:, 0])


class Tokens(nn.Module):
    """An embedding of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.hidden = nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(x).mean(1)).tanh())


class Recurrent(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.into = nn.Linear(12, 10)
        self.gru = nn.GRU(10, 9, batch_first=True)
        self.hidden = nn.Linear(9, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.gru(self.into(self.embed(x).relu()))[0][:, -1]).relu())


class Declared(Recurrent):
    """The same, with the recurrent layer named as whole."""

    unsliced = ("gru",)


class Heads(nn.Module):
    """Attention whose forward views with a stored number: of heads, which is wrong with fewer, or of their size."""

    def __init__(self, heads: int = -1, size: int = -1) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.embed = nn.Linear(6, 32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / 2.0).softmax(-1) @ v
        return self.head((h + self.out(mixed.transpose(1, 2).flatten(2))).mean(1))


class Frozen(nn.Module):
    """A frozen layer in the middle: what it reads and gives has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 9)
        self.b.requires_grad_(False)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))).relu())


class Fixed(nn.Module):
    """A forward with a number of channels that it stored."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).view(-1, 12))


class Sorted(nn.Module):
    """An operation of which nobody knows what it couples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).sort(1)[0])


class Straight(nn.Module):
    """A residual on the input itself, whose channels therefore stay; then a second layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(x + self.a(x)).relu())


IMAGE, SERIES, ROW = (3, 8, 8), (7, 6), (6,)


class Backwards(nn.Module):
    """Layers of equal shapes that are made in another order than they run in: what runs first is in the middle."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.third, self.second, self.first = (nn.Linear(6, 6) for _ in range(3))
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.third(self.second(self.first(x).tanh()).tanh()).tanh())


def net(
    factory: Callable[..., nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    *,
    empty: bool = False,
    **keys: int,
) -> SplitModel:
    """A network of this file."""
    made = partial(factory, **keys)
    return SplitModel(factory.__name__, made, input_shape=shape, classifier="head", dtype=dtype, empty=empty)


class Places(nn.Module):
    """A convolution, a pooling or BatchNorm that reads a layer's features as places."""

    def __init__(self, how: int = 0) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        convolution = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.AdaptiveAvgPool1d(4))
        self.read = (convolution, nn.MaxPool1d(2), nn.BatchNorm1d(1), nn.MaxPool2d(2))[how]
        self.how = how
        self.b = nn.Linear((16, 8, 16, 8)[how], 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        h = h if self.how == 1 else torch.stack([h, -h], 2) if self.how == 3 else h.unsqueeze(1)
        h = self.read(h)
        return self.head(self.b(h.flatten(1)).relu())


class Mixer(nn.Module):
    """A convolution over (B, T, C), whose channels are the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.mix = nn.Conv1d(7, 7, 1)
        self.head = nn.Linear(7 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.head((h + self.mix(h)).flatten(1))


class Queries(nn.Module):
    """Learned queries attend to a series by PyTorch's attention; what they find is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.query = nn.Parameter(torch.randn(1, 2, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(16, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        series = self.embed(x)
        found = self.attention(self.query.expand(x.shape[0], -1, -1), series, series, need_weights=False)[0]
        return self.head(self.hidden(found.flatten(1)).relu())


class Grown(nn.Module):
    """Zeros beside the channels of a shortcut, a number of groups of 1, and a series that is normalised by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 8, 3, padding=1)
        self.one = nn.GroupNorm(1, 8)
        self.c = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.one(self.b(h) + functional.pad(h, (0, 0, 0, 0, 0, 4)))
        h = self.c(h)
        return self.head((h - h.mean(1, keepdim=True)).amax((2, 3)))


class Gate(nn.Module):
    """The first channel opens and shuts the others, so it always stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.head(h * h[:, :1].sigmoid())


class Sorting(nn.Module):
    """An operation of which nobody knows what it couples, in a submodule."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1)[0]


class Kept(nn.Module):
    """The same, named as whole; what it reads stays, and what follows can be sliced."""

    unsliced = ("block",)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.block, self.b, self.head = nn.Linear(6, 12), Sorting(), nn.Linear(12, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.block(self.a(x))).relu())


class Scales(nn.Module):
    """PReLU with a slope for each channel, a layer scale, a norm of one's own; two dense layers classify."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(7, 12)
        self.slope = nn.PReLU(12)
        self.b = nn.Linear(12, 12, bias=False)
        self.gamma = nn.Parameter(torch.full((12, 1), 0.5))
        self.norm = OwnNorm(12)
        self.head = nn.Linear(12, num_classes)
        self.out = nn.Linear(num_classes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.slope(self.a(x))
        h = self.norm(h + self.b(h) * self.gamma[:, 0])
        return self.out(self.head(h).relu())


class OwnNorm(nn.Module):
    """A scale and a shift for each channel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Wide(nn.Module):
    """A hidden layer of which at least four channels are there."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if h.shape[1] < 4:
            raise ValueError("four channels at least")
        return self.head(h)
