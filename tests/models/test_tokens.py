"""Networks of tokens run on int64 wherever a network is tried or counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sequence_nets import VOCABULARY, Series, Tokens, tokens
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.execute.choice import forward_flops
from polyfed.models.split import SplitModel


def made(factory, shape=(10,), dtype: torch.dtype | None = torch.int64) -> SplitModel:
    return SplitModel("own", factory, input_shape=shape, classifier="head", extractor="front", dtype=dtype)


def test_a_network_of_tokens_is_probed_with_tokens() -> None:
    """Catches a probe of numbers, on which an embedding fails, and a count of FLOPs that gives up."""
    model = made(lambda: Tokens(3))
    assert (model.num_classes, model.rep_dim, model.s_in_shape) == (3, 6, (8,))
    assert forward_flops({"model": model}, (10,)) == 2 * (8 * 6 + 6 * 3)
    model.check_tokens(torch.tensor([[19] * 10]))
    with pytest.raises(ModelError, match="fails on tokens from 20 to 20, as the data have: IndexError"):
        model.check_tokens(torch.tensor([[20] * 10]))


def test_a_network_of_the_other_kind_is_refused() -> None:
    with pytest.raises(ModelError, match=r"fails on an input of shape \(2, 10\) and type float32"):
        made(lambda: Tokens(3), dtype=None)
    with pytest.raises(ModelError, match=r"fails on an input of shape \(2, 12, 3\) and type int64"):
        made(lambda: Series(2), (12, 3))


class Text(nn.Module):
    """Embeddings with a vector per text; the subclasses differ in what they do with the padding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 8)
        self.front = nn.Linear(8, 6)
        self.head = nn.Linear(6, num_classes)

    def read(self, x: Tensor) -> Tensor:
        return self.table(x).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.front(self.read(x)))


class Packed(Text):
    """A GRU over what is not padding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.gru = nn.GRU(8, 8, batch_first=True)

    def read(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.table(x), (x != 0).sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        return self.gru(packed)[1][0]


class Masked(Text):
    """A transformer that attends to what is not padding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def read(self, x: Tensor) -> Tensor:
        return self.encoder(self.table(x), src_key_padding_mask=x == 0).mean(1)


class MaskKept(Text):
    """Keeps the mask of the first batch."""

    mask: Tensor | None = None

    def read(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[:2] != x.shape:
            self.mask = (x != 0).float().unsqueeze(-1)
        return (self.table(x) * self.mask).sum(1)


class TopKept(Text):
    """Keeps the largest token of all batches, which the tokens 0 and 1 do not show."""

    top = 0.0

    def read(self, x: Tensor) -> Tensor:
        self.top = max(self.top, float(x.max()))
        return self.table(x).mean(1) * (1 + self.top / 10)


class TrainedTopKept(TopKept):
    """Likewise in training alone."""

    def read(self, x: Tensor) -> Tensor:
        return super().read(x) if self.training else Text.read(self, x)


_TOP = [0.0]


class TopOutside(Text):
    """Keeps the largest token where no attribute shows it."""

    def read(self, x: Tensor) -> Tensor:
        _TOP[0] = max(_TOP[0], float(x.max()))
        return self.table(x).mean(1) * (1 + _TOP[0] / 10)


@pytest.mark.parametrize("net", [Text, Packed, Masked])
def test_networks_that_read_the_padding_are_taken(net: type[Text]) -> None:
    """Catches a probe of nothing but padding, on which these fail or give NaN."""
    model = SplitModel("own", lambda: net(3), input_shape=(10,), classifier=None, dtype=torch.int64)
    assert (model.num_classes, model.caches, model.notes) == (3, False, [])
    assert (forward_flops({"model": model}, (10,)) or 0) > 0
    model.check_tokens(tokens().extremes)


def test_a_padding_mask_that_is_kept_is_refused() -> None:
    with pytest.raises(ModelError, match=r"changes 'mask' in its forward \(MaskKept, .*use a buffer"):
        SplitModel("own", lambda: MaskKept(3), input_shape=(10,), classifier=None, dtype=torch.int64)


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (TopKept, r"changes 'top' in its forward \(TopKept, "),
        (TrainedTopKept, r"changes 'top' in its forward"),
        (TopOutside, "another output for the same weights and input after it has seen other data"),
    ],
)
def test_state_that_only_the_data_show_is_refused_on_the_data(net: type[Text], text: str) -> None:
    """Catches a leak from client to client by tokens that no probe draws."""
    _TOP[0] = 0.0
    model = SplitModel("own", lambda: net(3), input_shape=(10,), classifier=None, dtype=torch.int64)
    model.check_tokens(torch.tensor([[1, 0] * 5]))
    with pytest.raises(ModelError, match=text):
        model.check_tokens(tokens().extremes)


def test_the_input_of_a_test_has_padding_and_no_empty_row() -> None:
    x = np.stack([made(lambda: Tokens(3)).inputs(number, 16).numpy() for number in range(3)])
    assert (x[:, :, 0] == 1).all()
    assert set(x[:, :, 1:].ravel()) == {0, 1}
    assert len(np.unique(x, axis=0)) == 3
