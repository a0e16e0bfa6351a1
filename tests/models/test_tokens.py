"""Networks of tokens run on int64 wherever a network is tried or counted."""

from __future__ import annotations

import pytest
import torch
from sequence_nets import Series, Tokens

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
