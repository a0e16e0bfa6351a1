"""Networks by key: who owns what, what a client gets, and the mean of each key over its owners."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.layerwise import MeanByKey, by_architecture, counted, first_layers, held, keys
from polyfed.core.clients import ClientInfo, Cohort
from polyfed.core.message import Message
from polyfed.models.zoo import build

LAYERS = {"small": ("a", "b"), "large": ("a", "b", "c")}
APART = {"small": ("small: a", "small: b"), "large": ("large: a", "large: b", "large: c")}


class Up(Message):
    w: dict[str, Tensor]
    n: int


@dataclass(frozen=True)
class Case:
    owns: Any
    keys: tuple[str, ...]


CASES = {"layer": Case(LAYERS, ("a", "b", "c")), "architecture": Case(APART, APART["small"] + APART["large"])}


@pytest.mark.parametrize("case", CASES)
def test_a_client_gets_its_own_tensors_under_its_own_names(case: str) -> None:
    """Catches keys that reach a client, and another architecture's tensors."""
    params = {key: torch.tensor(float(place)) for place, key in enumerate(CASES[case].keys)}
    for name, own in (("small", "ab"), ("large", "abc")):
        found = held(params, CASES[case].owns, name)
        assert list(found) == list(own)
        assert all(found[n] is params[keys(CASES[case].owns, name)[n]] for n in own)
    with pytest.raises(ModelError, match=r"the server has no network 'other', .* it has small, large"):
        held(params, CASES[case].owns, "other")
    assert held(params, {}, "other") == params


@pytest.mark.parametrize("case", CASES)
def test_owners_are_counted(case: str) -> None:
    """Catches K of all clients for a tensor that some have."""
    found = counted(CASES[case].keys, CASES[case].owns, {"small": 3, "large": 2})
    shared = {"a": 5, "b": 5, "c": 2}
    apart = {key: 3 if key.startswith("small") else 2 for key in CASES[case].keys}
    assert found == (shared if case == "layer" else apart)
    assert counted("ab", {}, {"x": 3, "y": 2}) == {"a": 5, "b": 5}


@pytest.mark.parametrize("case", CASES)
def test_the_mean_of_a_key_is_over_its_owners(case: str) -> None:
    """Catches weights of all clients, a mean over architectures that are apart, and a key that vanishes."""
    default = {key: torch.tensor(-1.0) for key in CASES[case].keys}
    mean = MeanByKey("n", default, CASES[case].owns)
    total = mean.init()
    for number, (name, n) in enumerate((("small", 1), ("small", 3))):
        up = Up({k: torch.tensor(float(number + 1)) for k in "ab"}, n)
        total = mean.add(total, ClientInfo(number, architecture=name), up.w, up)
    got = mean.finish(total)
    assert got.keys() == default.keys()
    for key, value in got.items():
        owned = key in CASES[case].owns["small"]
        assert float(value) == ((1 * 1 + 3 * 2) / 4 if owned else -1.0), key
    of = MeanByKey("n", {}, CASES[case].owns, lambda up: {"a": torch.tensor(float(up.n))})
    total = of.add(of.init(), ClientInfo(2, architecture="large"), {}, Up({}, 7))
    assert of.finish(total) == {keys(CASES[case].owns, "large")["a"]: torch.tensor(7.0)}


def test_a_message_is_made_once_for_an_architecture() -> None:
    """Catches a message for each client, which a large cohort pays for."""
    made: list[int] = []

    def make(client: ClientInfo) -> Message:
        made.append(client.id)
        return Up({}, client.id)

    clients = tuple(ClientInfo(k, architecture="xy"[k % 2]) for k in range(6))
    down = by_architecture(Cohort(clients, 1, 1, Rng((0,))), make)
    assert len(made) == 2
    assert down(clients[0]) is down(clients[4]) is not down(clients[1])


def test_a_layer_starts_as_in_the_largest_network_that_has_it() -> None:
    """Catches an order of names or of clients in place of sizes."""
    family = {
        n: build(f"layers_by_hand:Chain(classifier=fc, depth={n})", input_shape=(7,), num_classes=4) for n in (2, 1)
    }
    found, large = first_layers({str(n): m for n, m in family.items()}, Rng((3,))), family[2].init(Rng((3,)))
    assert found.keys() == large.keys()
    assert all(torch.equal(found[name], value) for name, value in large.items())
