"""Rounds at unlike widths: which networks a client has, which rows are averaged by class, what asks and what scales."""

from typing import Any

import pytest
import toy

from polyfed.algorithms.fiarse_neuron import FIARSENeuron
from polyfed.algorithms.fjord import FjORD
from polyfed.algorithms.heterofl import HeteroFL
from polyfed.algorithms.scalefl import ScaleFL
from polyfed.core.algorithm import Algorithm

RESNET = "resnet8(width=4, norm=batch)"


def federation(algorithm: Algorithm, capacities: tuple[float, ...], net: str = RESNET, **keys: Any) -> Any:
    shape = (7,) if net == toy.MLP else (1, 8, 8)
    return toy.federation(algorithm, models=(net,), shape=shape, clients={"capacities": list(capacities)}, **keys)


@pytest.mark.parametrize("algorithm", [HeteroFL(), FIARSENeuron(), FjORD(widths=(0.2, 0.5)), ScaleFL(exits=2)])
def test_a_client_has_no_network_that_it_does_not_run(algorithm: Algorithm) -> None:
    """Catches the full network counted as a small client's work, by which its execution is chosen."""
    fed = federation(algorithm, (0.25, 0.25, 0.25))
    own = fed.own(0)
    models = algorithm.models_at(fed.task, own, 0.25)
    weights = sum(shape.numel() for shape in own.shapes.values())
    assert all(sum(s.numel() for s in net.shapes.values()) < 0.4 * weights for net in models.values())
    for net in models.values():
        assert net.whole is net.fresh().whole is own
    assert own.whole is own
