"""Networks of tokens are found by trying, and run on int64 wherever a network is tried or counted."""

from __future__ import annotations

import pytest
import torch
from sequence_nets import Series, Tokens
from torch import nn

from polyfed.base.errors import ModelError
from polyfed.execute.choice import forward_flops
from polyfed.models.split import SplitModel


def made(factory, shape=(10,)) -> SplitModel:
    return SplitModel("own", factory, input_shape=shape, classifier="head", extractor="front")


def test_a_network_of_tokens_is_probed_with_tokens() -> None:
    """Catches a probe of numbers, on which an embedding fails, and a count of FLOPs that gives up."""
    model = made(lambda: Tokens(3))
    assert (model.takes_tokens, model.num_classes, model.rep_dim, model.s_in_shape) == (True, 3, 6, (8,))
    assert forward_flops({"model": model}, (10,)) == 2 * (8 * 6 + 6 * 3)
    model.check_input(torch.tensor([[19] * 10]))
    with pytest.raises(ModelError, match="fails on tokens from 20 to 20, as the data have: IndexError"):
        model.check_input(torch.tensor([[20] * 10]))
    with pytest.raises(ModelError, match=r"takes tokens \(int64\)"):
        model.check_input(torch.zeros(2, 10))


def test_a_network_of_numbers_is_probed_with_numbers() -> None:
    model = made(lambda: Series(2), (12, 3))
    assert not model.takes_tokens
    model.check_input(torch.zeros(2, 12, 3))
    with pytest.raises(ModelError, match="fails on tokens"):
        model.check_input(torch.zeros(2, 12, 3, dtype=torch.int64))


def test_a_network_that_takes_neither_is_refused_with_its_first_error() -> None:
    """Catches the error of the second try, which has nothing to do with the fault."""
    with pytest.raises(ModelError, match="mat1 and mat2 shapes cannot be multiplied"):
        SplitModel("own", lambda: nn.Linear(3, 2), input_shape=(4,), classifier=None)
