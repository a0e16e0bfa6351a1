"""Channels: which belong together, found by following a forward; the network with fewer; refusals that say why."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import slice_nets as nets
import torch
from torch import nn

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.models.binding import places
from polyfed.models.catalogue import MODELS
from polyfed.models.channels import channels, narrowed
from polyfed.models.flops import multiplications
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build

#: A small version of each network of the catalogue.
SMALL = {
    **{name: f"{name}(rep_dim=20)" for name in MODELS if name.startswith("cnn")},
    **{name: f"{name}(width=4)" for name in MODELS if "resnet" in name},
    "mlp": "mlp(hidden=(8, 6))",
    "vit": "vit(width=16, depth=2, heads=4)",
    "text-transformer": "text-transformer(vocabulary=9, width=16, depth=1, heads=2)",
    "bilstm": "bilstm(vocabulary=9, width=8, state=6)",
    "cnn-1d": "cnn-1d(width=8)",
    "gru-1d": "gru-1d(width=8)",
    "vit-1d": "vit-1d(width=16)",
}
TEXT = ("text-transformer", "bilstm")


@cache
def zoo(spec: str) -> SplitModel:
    if spec.startswith(TEXT):
        return build(spec, input_shape=(4,), num_classes=10, dtype=torch.int64)
    return build(spec, input_shape=(3, 32) if "-1d" in spec else (3, 32, 32), num_classes=10)


def sizes(model: SplitModel, share: float) -> tuple[tuple[str, int], ...]:
    return tuple((group, max(1, int(share * n))) for group, n in channels(model).groups.items())


def numbers(model: SplitModel, name: str, dim: int) -> list[int]:
    return channels(model).positions[name][dim].tolist()


@pytest.mark.parametrize("name", [*SMALL])
def test_every_network_of_the_catalogue_runs_with_half_of_its_channels(name: str) -> None:
    """Catches a group that lacks a member, so that shapes do not fit, or one that reaches inputs or outputs."""
    model = zoo(SMALL[name])
    small = narrowed(model, sizes(model, 0.5))
    assert small(small.init(Rng((0,))), model.inputs(1)).shape == (2, 10)
    for full in channels(model).positions:
        assert small.shapes[full] == model.shapes[full] or small.shapes[full].numel() < model.shapes[full].numel()
    assert small.input_shape == model.input_shape
    assert sum(s.numel() for s in small.shapes.values()) < 0.51 * sum(s.numel() for s in model.shapes.values())


def test_a_residual_stream_is_one_group_and_a_block_inside_has_its_own() -> None:
    """Catches convolutions that add into one stream and choose their channels apart, as FedRolex's random mode does."""
    model = zoo("resnet8")
    assert dict(channels(model).groups) == {
        "conv1.weight[0]": 16,
        "layer1.0.conv1.weight[0]": 16,
        "layer2.0.conv1.weight[0]": 32,
        "layer2.0.conv2.weight[0]": 32,
        "layer3.0.conv1.weight[0]": 64,
        "layer3.0.conv2.weight[0]": 64,
    }
    for name in ("bn1.running_var", "layer1.0.conv2.weight", "layer1.0.bn2.bias"):
        assert numbers(model, name, 0) == numbers(model, "conv1.weight", 0) == list(range(16))
    for name in ("layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer2.0.downsample.0.weight"):
        assert numbers(model, name, 1) == list(range(16))
    assert numbers(model, "layer2.0.downsample.0.weight", 0) == numbers(model, "layer2.0.conv2.weight", 0)
    assert [axis.numel() for axis in channels(model).positions["conv1.weight"]] == [16, 0, 0, 0]
    assert [axis.numel() for axis in channels(model).positions["fc.weight"]] == [0, 64]
    assert channels(model).positions["fc.bias"][0].numel() == 0


def test_a_flattened_map_has_a_block_of_columns_for_each_channel() -> None:
    """Catches columns that are taken one by one, or by place before channel."""
    own = numbers(zoo("cnn5"), "conv2.weight", 0)
    assert numbers(zoo("cnn5"), "fc1.weight", 1) == [number for number in own for _ in range(25)]


def test_a_group_of_groupnorm_is_one_channel() -> None:
    """Catches statistics over a part of a group, which is another network's."""
    model = zoo("resnet8(norm=group)")  # 8 groups of 2
    assert channels(model).groups["conv1.weight[0]"] == 8
    assert numbers(model, "bn1.weight", 0) == [number for number in range(8) for _ in range(2)]
    module: Any = narrowed(model, (("conv1.weight[0]", 3),)).new_module()
    assert (module.bn1.num_groups, module.bn1.num_channels, module.conv1.out_channels) == (3, 6, 6)


def test_a_head_is_one_channel_apart_from_the_stream() -> None:
    """Catches heads that lose a part, or a query without its key and value."""
    model = zoo("vit")
    heads = numbers(model, "block1.attention.qkv.weight", 0)
    of_one = [number for number in sorted(set(heads)) for _ in range(16)]
    assert heads == of_one * 3
    assert numbers(model, "block1.attention.out.weight", 1) == of_one
    stream = numbers(model, "patches.places", 2)
    assert len(set(stream)) == 64
    for name, dim in (("patches.map.weight", 0), ("block4.fc2.weight", 0), ("norm.bias", 0), ("fc.weight", 1)):
        assert numbers(model, name, dim) == stream
    assert channels(model).positions["patches.places"][1].numel() == 0  # as many tokens as there are patches


def test_what_is_joined_keeps_two_groups() -> None:
    """Catches a concatenation whose parts are mixed up, or coupled."""
    model = nets.net(nets.Dense, nets.IMAGE)
    assert dict(channels(model).groups) == {"a.weight[0]": 6, "b.weight[0]": 4, "c.weight[0]": 8}
    both = [*numbers(model, "a.weight", 0), *numbers(model, "b.weight", 0)]
    assert numbers(model, "norm.weight", 0) == numbers(model, "c.weight", 1) == both
    assert numbers(model, "b.weight", 1) == numbers(model, "a.weight", 0)


def test_groups_of_convolutions_stand_and_fall_together() -> None:
    """Catches a depthwise filter without its input, and a grouped convolution of uneven groups."""
    model = nets.net(nets.Mobile, nets.IMAGE)
    assert dict(channels(model).groups) == {"a.weight[0]": 8, "point.weight[0]": 4, "squeeze.1.weight[0]": 6}
    own = numbers(model, "a.weight", 0)
    assert numbers(model, "depthwise.weight", 0) == [number for number in own for _ in range(2)]
    assert numbers(model, "grouped.weight", 0) == [8 + number for number in range(4) for _ in range(6)]
    module: Any = narrowed(model, (("a.weight[0]", 3), ("point.weight[0]", 2))).new_module()
    assert (module.depthwise.groups, module.depthwise.in_channels, module.grouped.groups) == (3, 3, 2)


@pytest.mark.parametrize(
    ("model", "groups"),
    [
        (nets.net(nets.Encoder, nets.SERIES), {"token[2]": 4, "block.linear1.weight[0]": 48}),
        (nets.net(nets.Encoder, nets.SERIES, heads=1), {"block.linear1.weight[0]": 48}),
        (nets.net(nets.Gate, nets.ROW), {"a.weight[0]": 11}),
        (nets.net(nets.Kept, nets.ROW), {"b.weight[0]": 7}),
        (nets.net(nets.Queries, nets.SERIES), {"hidden.weight[0]": 7}),
        (nets.net(nets.Grown, nets.IMAGE), {"c.weight[0]": 6}),
        (nets.net(nets.Tokens, (5,), torch.int64), {"embed.weight[1]": 16, "hidden.weight[0]": 8}),
        (nets.net(nets.Declared, nets.SERIES), {"embed.weight[0]": 12, "hidden.weight[0]": 12}),
        (nets.net(nets.Heads, nets.SERIES, size=16), {"embed.weight[0]": 32, "qkv.weight[0]": 2}),
        (nets.net(nets.Frozen, nets.ROW), {"c.weight[0]": 9}),
        (nets.net(nets.Straight, nets.ROW), {"b.weight[0]": 8}),
        (nets.net(nets.Up, nets.IMAGE), {"scale[0]": 3, "a.weight[0]": 8}),
        (nets.net(nets.Places, nets.ROW), {"read.0.weight[0]": 4, "b.weight[0]": 10}),
        (nets.net(nets.Places, nets.ROW, how=1), {"b.weight[0]": 10}),
        (nets.net(nets.Places, nets.ROW, how=2), {"b.weight[0]": 10}),
        (nets.net(nets.Places, nets.ROW, how=3), {"b.weight[0]": 10}),
    ],
    ids=lambda value: value.name if isinstance(value, SplitModel) else "",
)
def test_networks_of_users(model: SplitModel, groups: dict[str, int]) -> None:
    """Catches attention, embeddings, frozen and recurrent layers, or the input, that lose what they need."""
    assert dict(channels(model).groups) == groups
    for share in (0.5, 0.3, 0.01):
        small = narrowed(model, sizes(model, share))
        assert small.num_classes == 5
        assert narrowed(model, sizes(model, share)) is small
        assert small.signature == narrowed(model, tuple(reversed(sizes(model, share)))).signature


def test_a_smaller_network_begins_with_a_part_of_the_full_draw() -> None:
    """Catches weights that are drawn for the small shapes, whose scale is another one."""
    model = zoo("resnet8")
    full, small = (net.init(Rng((7,))) for net in (model, narrowed(model, sizes(model, 0.25))))
    assert torch.equal(small["layer2.0.conv1.weight"], full["layer2.0.conv1.weight"][:8, :4])
    assert torch.equal(small["fc.bias"], full["fc.bias"])


@pytest.mark.parametrize(
    ("whole", "empty"),
    [
        *(
            (zoo(SMALL[name]), build(SMALL[name], input_shape=(3, 32, 32), num_classes=10, empty=True))
            for name in ("cnn1", "resnet8", "vit")
        ),
        *(
            (nets.net(*net), nets.net(*net, empty=True))
            for net in ((nets.Declared, nets.SERIES), (nets.Tokens, (5,), torch.int64), (nets.Up, nets.IMAGE))
        ),
    ],
    ids=lambda value: value.name,
)
def test_a_network_without_values_is_sliced_as_one_with_values(whole: SplitModel, empty: SplitModel) -> None:
    """Catches a client and a server that cut other slices, and a slice that computes with what it was tested with."""
    own, other = channels(whole), channels(empty)
    assert (own.groups, own.outputs) == (other.groups, other.outputs)
    assert all(all(map(torch.equal, axes, other.positions[name])) for name, axes in own.positions.items())
    assert multiplications(whole) == multiplications(empty)
    assert {place.tensor.device.type for place in places(empty.new_module())} == {"meta"}
    small, cut = narrowed(whole, sizes(whole, 0.5)), narrowed(empty, sizes(empty, 0.5))
    assert cut.whole is empty
    assert not cut.empty
    assert (small.shapes, small.parameter_names, small.random) == (cut.shapes, cut.parameter_names, cut.random)
    params, x = small.init(Rng((0,))), small.inputs(1)
    assert torch.equal(small(params, x), cut(params, x))
    for model in (empty, cut):
        with pytest.raises(ModelError, match="was built without weights; the server sends them"):
            model.init(Rng((0,)))


class Apart(nn.Module):
    """A buffer that torch did not make, so that the meta device does not hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.from_numpy(np.ones(6, dtype=np.float32)))
        self.hidden = nn.Linear(6, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(x * self.scale).relu())


@pytest.mark.parametrize(
    ("net", "message"),
    [(nets.Frozen, "'b.bias', 'b.weight' belong to the architecture"), (Apart, "puts 'scale' on the device 'cpu'")],
)
def test_a_network_that_cannot_be_empty_says_why(net: type[nn.Module], message: str) -> None:
    """Catches constants, or values that torch did not make, that a client would lack."""
    with pytest.raises(ModelError, match=message):
        nets.net(net, nets.ROW, empty=True)


def test_all_channels_are_the_network_itself() -> None:
    """Catches a copy of the full network, which would not be stacked with it."""
    model = zoo("cnn5")
    assert narrowed(model, sizes(model, 1.0)) is model


class Misnamed(nets.Recurrent):
    unsliced = ("grru",)


class AString(nets.Recurrent):
    unsliced = "gru"


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nets.net(nets.Recurrent, nets.SERIES), r"'gru' is recurrent \(GRU\).*unsliced = \('gru',\)"),
        (nets.net(nets.Sorted, nets.ROW), r"calls 'sort' on channels.*attribute unsliced"),
        (nets.net(OneLayer, nets.ROW), "none of its channels can be left out"),
        (nets.net(nets.Mixer, nets.SERIES), r"can be left out.*a convolution, a pooling or .* reads as positions"),
        (nets.net(Misnamed, nets.SERIES), r"unsliced names 'grru', which is no submodule; nearest: .*gru"),
        (nets.net(AString, nets.SERIES), r"unsliced is 'gru'; expected a tuple of names, such as \('gru',\)"),
    ],
    ids=lambda value: value.name if isinstance(value, SplitModel) else "",
)
def test_what_cannot_be_followed_is_refused(model: SplitModel, message: str) -> None:
    """Catches a network that is sliced by a guess."""
    with pytest.raises(ModelError, match=message):
        channels(model)


def test_a_network_that_does_not_run_with_fewer_channels_is_refused() -> None:
    """Catches an error of PyTorch in the middle of a round."""
    with pytest.raises(ModelError, match=r"with 6 of 12 channels of a.weight\[0\] does not run.*__init__ stored\?"):
        narrowed(nets.net(nets.Fixed, nets.ROW), (("a.weight[0]", 6),))


@pytest.mark.parametrize(("heads", "kept"), [(4, 2), (4, 1), (2, 1)])
def test_a_network_that_runs_but_computes_something_else_is_refused(heads: int, kept: int) -> None:
    """Catches a stored number of heads, which cuts fewer rows into as many heads, each of another size."""
    model = nets.net(nets.Heads, nets.SERIES, heads=heads)
    with pytest.raises(ModelError, match=r"runs, but groups the channels of .*'qkv.weight' in another way"):
        narrowed(model, (("embed.weight[0]", 16), ("qkv.weight[0]", kept)))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"fc.weight[0]": [0]}, r"no group of channels 'fc.weight\[0\]'; nearest: 'fc2"),
        ({"fc1.weight[0]": []}, "chooses no channel, or one twice"),
        ({"fc1.weight[0]": [1, 1]}, "chooses no channel, or one twice"),
        ({"fc1.weight[0]": [3, 8]}, r"has the channels 0 to 7; \[3, 8\] are chosen"),
        ({"fc1.weight[0]": [-1]}, "has the channels 0 to 7"),
    ],
)
def test_a_choice_that_there_is_not_is_refused(chosen: dict[str, list[int]], message: str) -> None:
    """Catches a channel that counts twice, and one counted from the end."""
    with pytest.raises(ModelError, match=message):
        channels(zoo(SMALL["mlp"])).kept(
            {group: torch.tensor(some, dtype=torch.int64) for group, some in chosen.items()}
        )
