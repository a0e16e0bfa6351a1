"""What a module holds beside its parameters and buffers."""

from __future__ import annotations

import random
from collections import Counter, deque
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from polyfed.models.state import attributes


class Slots:
    __slots__ = ("__hidden", "value")

    def __init__(self, value: Any) -> None:
        self.value, self.__hidden = value, 0

    def move(self) -> None:
        self.__hidden += 1


class Both(Slots):
    """Slots and a ``__dict__``."""


class Counts:
    def __init__(self) -> None:
        self.calls = 0

    def move(self) -> None:
        self.calls += 1


def holding(value: Any) -> nn.Module:
    net = nn.Linear(2, 2)
    net.extra = value  # type: ignore[assignment]
    return net


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (Slots(1), Slots.move),
        (Both([1]), lambda it: it.value.append(2)),
        (Both(1), lambda it: setattr(it, "more", 2)),
        (SimpleNamespace(a=SimpleNamespace(b=Slots({"c": 1}))), lambda it: it.a.b.value.update(c=2)),
        ([Slots(k) for k in range(50)], lambda it: it[37].move()),
        (partial(print, counts := [1]), lambda _: counts.append(2)),
        (calling := Counts(), lambda it: it.move()),
        (calling.move, lambda it: it()),
        (deque([1], maxlen=2), lambda it: it.append(1)),
        (Counter("a"), lambda it: it.update("b")),
        (random.Random(0), lambda it: it.random()),
        (np.random.default_rng(0), lambda it: it.random()),
        (torch.Generator(), lambda it: torch.rand(1, generator=it)),
    ],
)
def test_a_change_of_state_is_seen_and_no_other(value: Any, change: Any) -> None:
    """Catches slots, arguments and bound objects that are not looked into, and objects that look new each time."""
    net = holding(value)
    before = attributes(net)
    assert all(attributes(net) == before for _ in range(5))
    change(value)
    assert attributes(net)["extra"] != before["extra"]


def test_an_iterator_always_counts_as_changed() -> None:
    """Catches one whose position cannot be read, taken for one that stands still."""
    for value in (cycle([1, 2]), iter([1]), (k for k in ()), {"a": [cycle([1])]}):
        net = holding(value)
        assert attributes(net)["extra"] != attributes(net)["extra"]
