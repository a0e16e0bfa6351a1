"""Random streams: by key, the same on every machine."""

import numpy as np
import pytest
import torch

from polyfed.base.rng import Rng

RNG = Rng((0, "test"))


def test_keys_that_differ_give_streams_that_differ() -> None:
    """Catches keys that are joined without a separator, or whose types are confused: 1 and "1", (1, 23) and (12, 3)."""
    keys = [(1, 23), (12, 3), (123,), ("1", 23), ("12", "3"), (1, "23"), (1, 2, 3), (), ("",), (-1,)]
    assert len({Rng(key).seed() for key in keys}) == len(keys)
    assert Rng((1,)).at(2, "x") == Rng((1, 2, "x"))


def test_a_seed_is_the_same_on_every_machine() -> None:
    """Catches a seed made by hash(), which Python salts, and any change of the rule, which would void old results."""
    assert Rng((0,)).seed() == 2631537505891389924
    assert all(0 <= Rng((i,)).seed() < 2**63 for i in range(50))
    a, b = Rng((0, "x")), Rng((0, "x"))
    assert torch.equal(torch.rand(3, generator=a.torch()), torch.rand(3, generator=b.torch()))
    assert np.array_equal(a.numpy().random(3), b.numpy().random(3))


def test_inside_a_fork_the_global_generator_follows_the_key_and_is_given_back() -> None:
    """Catches module constructors and dropout that move everyone's stream, also when they raise."""
    before = torch.random.get_rng_state()
    with RNG.fork():
        one = torch.rand(3)
    torch.rand(1)
    with RNG.fork():
        two = torch.rand(3)
    assert torch.equal(one, two)
    torch.random.set_rng_state(before)
    with pytest.raises(RuntimeError), RNG.fork():
        torch.rand(1) @ torch.rand(2)
    assert torch.equal(before, torch.random.get_rng_state())
