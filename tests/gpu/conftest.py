"""Where the tests that want a GPU compute: on it, or, to try the tests themselves, where $POLYFED_TEST_DEVICE says."""

import os

import pytest
import torch

from polyfed.execute.placement import Placement


@pytest.fixture(scope="session")
def device() -> str:
    """A GPU; the test is skipped where torch sees none."""
    device = os.environ.get("POLYFED_TEST_DEVICE", "cuda")
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    return device


@pytest.fixture
def fp32(device: str) -> Placement:
    """Single precision on it."""
    return Placement.of(device, "fp32")


@pytest.fixture
def fp64(device: str) -> Placement:
    """Double precision on it, in which only the order of sums tells it from a CPU."""
    return Placement.of(device, "fp64")
