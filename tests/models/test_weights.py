"""Weights of a client's own network from a file."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.models.split import SplitModel
from polyfed.models.weights import load_weights, weights_digest


class Net(nn.Module):
    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.fc1.requires_grad_(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.bn(self.fc1(x)))


def model(frozen: bool = False) -> SplitModel:
    return SplitModel("net", lambda: Net(frozen), input_shape=(4,), classifier="fc2")


def test_a_network_starts_with_the_weights_of_the_file(tmp_path: Path) -> None:
    """Catches another draw, tensors that two clients share, and a model that keeps the weights of another client."""
    net, path = model(), tmp_path / "w.safetensors"
    saved = Net()
    saved.half().bn.num_batches_tracked += 7
    save_file(saved.state_dict(), path)
    started = net.starting_with(load_weights(path, net))
    first, second = started.init(Rng((0,))), started.init(Rng((1,)))
    for name, value in saved.state_dict().items():
        assert torch.equal(first[name], value.to(first[name].dtype))
        assert first[name].data_ptr() != second[name].data_ptr()
    assert first["fc1.weight"].dtype == torch.float32
    assert first["bn.num_batches_tracked"].dtype == torch.int64
    assert not torch.equal(net.init(Rng((0,)))["fc1.weight"], first["fc1.weight"])
    assert started.signature == net.signature


def test_every_difference_is_told_at_once(tmp_path: Path) -> None:
    """Catches a file that is taken in part."""
    path, state = tmp_path / "w.safetensors", dict(Net().state_dict())
    state["fc1.weight"] = torch.zeros(5, 4)
    state["fc2.bias"] = torch.tensor([0.0, float("nan")])
    state["bn.num_batches_tracked"] = torch.tensor(1.0)
    state["head.weight"] = state.pop("fc2.weight")
    save_file(state, path)
    with pytest.raises(ModelError) as caught:
        load_weights(path, model())
    for told in (
        "fc2.weight: missing",
        "head.weight: not in the network",
        "fc1.weight: shape (5, 4), expected (3, 4)",
        "fc2.bias: NaN or infinity",
        "bn.num_batches_tracked: torch.float32, expected whole numbers",
    ):
        assert told in str(caught.value)


def test_frozen_weights_are_the_networks_own(tmp_path: Path) -> None:
    """Catches frozen weights of a file that are passed over without a word."""
    net, path = model(frozen=True), tmp_path / "w.safetensors"
    state = {**Net(frozen=True).state_dict(), **net.constants}
    save_file(state, path)
    assert load_weights(path, net).keys() == set(net.shapes)
    save_file({**state, "fc1.bias": state["fc1.bias"] + 1}, path)
    with pytest.raises(ModelError, match=r"fc1\.bias: other values than the network's own, which are frozen"):
        load_weights(path, net)


@pytest.mark.parametrize("made", ["pickle", "missing"])
def test_what_is_no_such_file(made: Any, tmp_path: Path) -> None:
    """Catches a pickle that is read, and an error of another library."""
    path = tmp_path / "w.safetensors"
    if made == "pickle":
        path.write_bytes(pickle.dumps({"fc1.weight": [1.0]}))
    told = "is no safetensors file" if made == "pickle" else "cannot be read: No such file"
    with pytest.raises(ModelError, match=told):
        load_weights(path, model())


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    """Catches a digest that a file keeps when it is written anew."""
    path = tmp_path / "w.safetensors"
    save_file(Net().state_dict(), path)
    before = weights_digest(path)
    save_file({**Net().state_dict(), "x": torch.ones(1)}, path)
    assert weights_digest(path) != before
