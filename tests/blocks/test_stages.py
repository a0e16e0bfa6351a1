"""Stages, blocks, and the last blocks that deeper networks stand beside."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.blocks.inco import references
from polyfed.blocks.stages import blocks, last_blocks, within
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build


def image(spec: str) -> SplitModel:
    return build(spec, input_shape=(1, 16, 16), num_classes=4)


class Own(nn.Module):
    """Blocks that no attribute names: two dense ones, and an activation behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList([nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU()])
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.trunk:
            x = layer(x)
        return self.fc(x)


def test_blocks_are_the_children_of_stages_or_in_a_transformer_the_stages_themselves() -> None:
    """Catches a transformer's block cut into its layers, a residual stage that is one block, activations as blocks."""
    assert blocks(image("in-resnet14-small(width=4)")) == (
        ("layer1.0",), ("layer2.0",), ("layer3.0", "layer3.1"), ("layer4.0", "layer4.1")
    )  # fmt: skip
    assert blocks(image("vit(patch=8, width=8, depth=3, heads=2)")) == (("block1", "block2", "block3"),)
    own = SplitModel("own", Own, input_shape=(3,), classifier="fc")
    assert blocks(own, ["trunk"]) == (("trunk.0", "trunk.2"),)
    with pytest.raises(ModelError, match=r"'own' names no blocks; .* attribute `stages`, .* algorithm\.stages"):
        blocks(own)
    with pytest.raises(ModelError, match=r"algorithm\.stages names 'fc', which 'own' lacks, or which has no blocks"):
        blocks(own, ["fc"])


def test_last_blocks_are_those_that_a_larger_network_goes_on_behind() -> None:
    """Catches donors of the largest network, one donor too few, and a last block that no network goes on behind."""
    sizes = {
        "a": (("x.0",), ("y.0",), ("z.0", "z.1")),
        "b": (("x.0",), ("y.0", "y.1"), ("z.0", "z.1")),
        "c": (("x.0", "x.1", "x.2"), ("y.0", "y.1"), ("z.0", "z.1")),
    }
    assert last_blocks(sizes) == {
        "a": {"x.0": ("x.0",), "y.0": ("y.0", "y.1")},
        "b": {"x.0": ("x.0", "x.1", "x.2")},
    }


@pytest.mark.parametrize("deeper", [(("x.0",), ("y.0",)), (("x.0", "x.1"),), (("x.0", "x.2"), ("y.0",))])
def test_networks_that_are_not_nested_are_refused(deeper: tuple[tuple[str, ...], ...]) -> None:
    """Catches a larger network that is shallower in a stage, lacks one, or has other blocks."""
    with pytest.raises(ModelError, match=r"'large' does not begin with the blocks of 'small'.*x\.0, x\.1 \| y\.0, got"):
        last_blocks({"small": (("x.0", "x.1"), ("y.0",)), "large": deeper})


def test_a_block_does_not_hold_what_begins_like_it() -> None:
    """Catches ``block10`` taken for a part of ``block1``."""
    assert within("block1", ["block1.w", "block10.w", "block1"]) == ["block1.w"]


@pytest.mark.parametrize("stages", [lambda: 2, lambda: nn.ModuleList([nn.Linear(3, 3)]), lambda: ["trunk", "gone"]])
def test_an_attribute_of_another_kind_names_no_stages(stages: Callable[[], Any]) -> None:
    """Catches a network of one's own whose `stages` is something else, and ends in a traceback."""

    class Other(Own):
        def __init__(self) -> None:
            super().__init__()
            self.stages = stages()

    other = SplitModel("other", Other, input_shape=(3,), classifier="fc")
    assert references(other) == {}
    with pytest.raises(ModelError, match="'other' names no blocks"):
        blocks(other)
