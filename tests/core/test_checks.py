"""What a client sent, before it is aggregated: shapes, types and names are those that are expected, or it is told."""

import pytest
import torch
from torch import Tensor

from polyfed.base.errors import MessageError
from polyfed.base.types import Params
from polyfed.core.checks import check_counterparts, check_numbers, check_tensor
from polyfed.core.message import Message


class Down(Message):
    model: Params
    control: Params


class Up(Message):
    model: Params
    num_examples: int


class Bare(Message):
    logits: Tensor


DOWN = Down({"w": torch.ones(2, 3), "b": torch.ones(2)}, {"c": torch.ones(1)})


@pytest.mark.parametrize("model", [DOWN.model, DOWN.control])
def test_a_counterpart_is_what_has_the_same_names(model: Params) -> None:
    check_counterparts(DOWN, Up(model, 1))


@pytest.mark.parametrize(
    ("up", "reason"),
    [
        (Up({**DOWN.model, "b": torch.ones(3)}, 1), r"Up.model\['b'\] has shape \(3,\)"),
        (Up({**DOWN.model, "b": torch.ones(2).double()}, 1), "float64"),
        (Up({"w": torch.ones(2, 3)}, 1), "other names than what was sent: 'b'"),
        (Up({"x": torch.ones(2, 3)}, 1), "no counterpart"),
        (Up({}, 1), "no counterpart"),
        (Bare(torch.ones(2, 3)), "Bare.logits has no counterpart"),
    ],
)
def test_other_names_shapes_and_types_and_what_cannot_be_compared_are_refused(up: Message, reason: str) -> None:
    """Catches a tensor that nobody looks at: an algorithm says what it expects, or has nothing to expect."""
    with pytest.raises(MessageError, match=reason):
        check_counterparts(DOWN, up)
    with pytest.raises(MessageError, match="no counterpart"):
        check_counterparts(None, up)


def test_a_range_allows_any_length_in_it() -> None:
    for rows in (0, 4):
        check_tensor("prototypes", torch.zeros(rows, 8), range(5), 8)
    check_tensor("classes", torch.zeros(4, dtype=torch.int64), range(5), dtype=torch.int64)
    for wrong in (torch.zeros(5, 8), torch.zeros(4, 7), torch.zeros(4), torch.zeros(4, 8, 1), torch.zeros(4, 8).half()):
        with pytest.raises(MessageError, match=r"prototypes has shape .* expected \(0 to 4, 8\) and torch.float32"):
            check_tensor("prototypes", wrong, range(5), 8)


@pytest.mark.parametrize("examples", [0, -1, 2**53])
def test_a_weight_that_is_none_is_refused(examples: int) -> None:
    with pytest.raises(MessageError, match="num_examples"):
        check_numbers(Up(DOWN.model, examples))
