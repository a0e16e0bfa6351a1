"""Networks for text: a compact transformer and a BiLSTM over tokens ``(B, T)``, of which 0 is padding.

No mask travels beside a batch: a network finds the padding in its input. Behind the embedding a padded place is a
vector of zeros, and each layer leaves it so; the next layer, or the pooling, reads the mask off its own input. So a
single tensor passes wherever a network is cut, and batches, stacks and messages stay what they are.

References:
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, https://arxiv.org/abs/1706.03762;
    Graves and Schmidhuber, "Framewise phoneme classification with bidirectional LSTM", Neural Networks 18, 2005.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyfed.base.errors import ModelError
from polyfed.models.vit import Block

_FAR = (
    1e4  # taken off the scores of padding: finite, so that a row of padding alone has no NaN, and fits half precision
)


def seen(h: Tensor) -> Tensor:
    """``(B, T, C)`` -> ``(B, T)``, 1 where a token is and 0 where padding is, a vector of zeros; of ``h``'s type."""
    return (h != 0).any(-1).to(h.dtype)


class Embedding(nn.Module):
    """A vector for each token, and with ``length`` another for each place; zeros for padding, token 0."""

    def __init__(self, vocabulary: int, width: int, length: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.places = None if length is None else nn.Parameter(0.02 * torch.randn(1, length, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T)`` int64 -> ``(B, T, width)``, T up to ``length``."""
        h = self.words(x)
        h = h if self.places is None else h + self.places[:, : x.shape[1]]
        return h * (x != 0).to(h.dtype)[..., None]


class Layer(Block):
    """A block of the vision transformer whose attention passes over padding."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` -> the same shape, with zeros in the same places."""
        here = seen(x)
        x = x + self.attention(self.norm1(x), (here - 1)[:, None, None] * _FAR)
        return (x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))) * here[..., None]


class Pool(nn.Module):
    """One vector for a text: the mean over its tokens, or its last token."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, C)`` -> ``(B, C)``; zeros for a row of padding."""
        counts = seen(x)
        if self.kind == "last":
            so_far = counts.long().cumsum(1)  # zeros may also stand between tokens, where a mask took all of a token
            counts = counts * (so_far == so_far[:, -1:]).to(counts.dtype)
        return (x * counts[..., None]).sum(1) / counts.sum(1, keepdim=True).clamp_min(1)


class TextTransformer(nn.Module):
    """Embeddings of tokens and places, blocks ``block1`` ..., one vector for the text, a LayerNorm, ``fc``.

    Args:
        input_shape: ``(T,)``, the most tokens of a text; a batch may be shorter.
        vocabulary: number of tokens, padding (0) included.
        width: width of a token.
        depth: number of blocks.
        heads: heads of each attention; a divisor of ``width``.
        pool: "mean" or "last".
        rep_dim: width of the representation, by a dense layer with tanh more; None: ``width``, without it.
        num_classes: width of ``fc``.
    """

    zero_padding = True  # behind each stage, so that a classifier there knows it

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        pool: str,
        rep_dim: int | None,
        num_classes: int,
    ) -> None:
        _check("text-transformer", input_shape)
        if width % heads:
            raise ModelError(
                f"text-transformer has width = {width} and heads = {heads}; set heads to a divisor of width"
            )
        super().__init__()
        self.embed = Embedding(vocabulary, width, input_shape[0])
        self.stages = [f"block{number}" for number in range(1, depth + 1)]
        for name in self.stages:
            self.add_module(name, Layer(width, heads))
        self.pool = Pool(pool)
        self.norm = nn.LayerNorm(width)
        self.rep = _dense(width, rep_dim)
        self.fc = nn.Linear(rep_dim or width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, T)`` -> logits ``(B, L)``."""
        x = self.embed(x)  # (B, T, width)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(self.rep(self.norm(self.pool(x))))  # (B, L)


class Recurrence(nn.Module):
    """An LSTM in one direction, of dense layers: so its gates can be followed, sliced and stacked as those are.

    Args:
        width: width of the input.
        hidden: width of the state.
        backwards: whether it starts at the end.
    """

    def __init__(self, width: int, hidden: int, *, backwards: bool) -> None:
        super().__init__()
        self.backwards = backwards
        self.inputs = nn.Linear(width, 4 * hidden)
        self.state = nn.Linear(hidden, 4 * hidden, bias=False)
        with torch.no_grad():
            self.inputs.bias[hidden : 2 * hidden] += 1  # of the gate that forgets: at first it remembers

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` -> ``(B, T, hidden)``; at a padded place the state is 0 again."""
        here, into = seen(x)[..., None], self.inputs(x)
        out: list[Tensor] = []
        c, h = None, None
        for t in range(x.shape[1])[:: -1 if self.backwards else 1]:
            gates = into[:, t] if h is None else into[:, t] + self.state(h)  # (B, 4 hidden)
            i, f, g, o = gates.unflatten(1, (4, -1)).unbind(1)
            new = i.sigmoid() * g.tanh()
            c = (new if c is None else new + f.sigmoid() * c) * here[:, t]
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return torch.stack(out[:: -1 if self.backwards else 1], 1)


class Both(nn.Module):
    """Two recurrences, one from each end, side by side."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.forwards = Recurrence(width, hidden, backwards=False)
        self.backwards = Recurrence(width, hidden, backwards=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` -> ``(B, T, 2 hidden)``."""
        return torch.cat([self.forwards(x), self.backwards(x)], 2)


class BiLSTM(nn.Module):
    """Embeddings of tokens, an LSTM from each end, one vector for the text, ``fc``.

    Args:
        input_shape: ``(T,)``, the most tokens of a text; a batch may be shorter.
        vocabulary: number of tokens, padding (0) included.
        width: width of a token.
        state: width of the state of each direction.
        pool: "mean" or "last"; the last is where the backward direction begins.
        rep_dim: width of the representation, by a dense layer with tanh more; None: two ``state``, without it.
        num_classes: width of ``fc``.
    """

    zero_padding = True  # behind each stage, so that a classifier there knows it

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        vocabulary: int,
        width: int,
        state: int,
        pool: str,
        rep_dim: int | None,
        num_classes: int,
    ) -> None:
        _check("bilstm", input_shape)
        super().__init__()
        self.embed = Embedding(vocabulary, width)
        self.lstm = Both(width, state)
        self.pool = Pool(pool)
        self.rep = _dense(2 * state, rep_dim)
        self.fc = nn.Linear(rep_dim or 2 * state, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, T)`` -> logits ``(B, L)``."""
        return self.fc(self.rep(self.pool(self.lstm(self.embed(x)))))


def _dense(width: int, rep_dim: int | None) -> nn.Module:
    return nn.Identity() if rep_dim is None else nn.Sequential(nn.Linear(width, rep_dim), nn.Tanh())


def _check(name: str, input_shape: tuple[int, ...]) -> None:
    if len(input_shape) != 1:
        raise ModelError(
            f"{name} takes tokens (T,), got samples of shape {input_shape}; choose a data set of texts, such as "
            "agnews or a table with the option `text`, or another network"
        )
