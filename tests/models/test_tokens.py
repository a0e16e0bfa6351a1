"""Networks of tokens run on int64 wherever a network is tried or counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sequence_nets import (
    TOP,
    Masked,
    MaskKept,
    Packed,
    Series,
    Text,
    Tokens,
    TopKept,
    TopOutside,
    TrainedTopKept,
    tokens,
)

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
    TOP[0] = 0.0
    model = SplitModel("own", lambda: net(3), input_shape=(10,), classifier=None, dtype=torch.int64)
    model.check_tokens(torch.tensor([[1, 0] * 5]))
    with pytest.raises(ModelError, match=text):
        model.check_tokens(tokens().extremes)


def test_the_input_of_a_test_has_padding_and_no_empty_row() -> None:
    x = np.stack([made(lambda: Tokens(3)).inputs(number, 16).numpy() for number in range(3)])
    assert (x[:, :, 0] == 1).all()
    assert set(x[:, :, 1:].ravel()) == {0, 1}
    assert len(np.unique(x, axis=0)) == 3
