"""Slices of channels: small tensors and back, nested, averaged where they are held; the network that runs on them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import pytest
import slice_nets as nets
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import gathered
from torch import Tensor, nn

from polyfed.base import tree
from polyfed.base.errors import MessageError, ModelError
from polyfed.base.rng import Rng
from polyfed.base.types import Params, Parts
from polyfed.blocks.aggregate import CoverageMean, MeanByName
from polyfed.blocks.losses import supervised
from polyfed.blocks.submodel import Layout, Slice, coverage, leading, portion, put, take
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.clients import ClientInfo, Cohort, LocalClient
from polyfed.core.message import Message, Nothing, State, flatten, size, unflatten
from polyfed.core.net import Net
from polyfed.core.requests import ClientResult, Steps, exchange, fit
from polyfed.models.catalogue import MODELS as CATALOGUE
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build
from polyfed.rounds.federation import check_networks

PROPERTY = settings(max_examples=25, deadline=None)
SHARES = st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1.0])
SEEDS = st.integers(0, 10**6)


def image(spec: str) -> SplitModel:
    return build(spec, input_shape=(3, 32) if "-1d" in spec else (3, 16, 16), num_classes=5)


#: The networks of images and signals in which a channel without weights is as good as none: all without LayerNorm.
OTHERS = ("mlp", "vit", "vit-1d", "text-transformer", "bilstm", "roberta")
ZOO = [
    f"{name}({'rep_dim=20' if name[:3] == 'cnn' and name != 'cnn-1d' else 'width=4'})"
    for name in CATALOGUE
    if name not in OTHERS
]
MODELS: dict[str, Callable[[], SplitModel]] = {
    "mlp": lambda: build("mlp(hidden=(7, 5))", input_shape=(6,), num_classes=3),
    "resnet": lambda: image("resnet8(width=4)"),
    "group": lambda: image("resnet8(width=8, norm=group)"),
    "static": lambda: image("resnet8(width=4, norm=static)"),
    "cnn": lambda: image("cnn5(rep_dim=9)"),
    "vit": lambda: image("vit(width=16, depth=1)"),
    "dense": lambda: nets.net(nets.Dense, nets.IMAGE),
    "mobile": lambda: nets.net(nets.Mobile, nets.IMAGE),
    "up": lambda: nets.net(nets.Up, nets.IMAGE),
    "gate": lambda: nets.net(nets.Gate, nets.ROW),
    "places": lambda: nets.net(nets.Places, nets.ROW),
    **{spec: partial(image, spec) for spec in ZOO},
}
FEW = st.sampled_from(["mlp", "resnet", "vit", "dense"])


@cache
def model(name: str) -> SplitModel:
    return MODELS[name]()


@cache
def layout(name: str) -> Layout:
    return Layout.of(model(name))


def params(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Weights of which no two are alike, statistics of BatchNorm included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: v
        if not v.is_floating_point()
        else torch.rand(v.shape, generator=generator) - (-0.5 if "running" in n else 0.5)
        for n, v in model(name).init(Rng((seed,))).items()
    }


def sliced(name: str, kind: str, share: float, seed: int) -> Slice:
    if kind == "prefix":
        return Slice.prefix(layout(name), share)
    if kind == "window":
        return Slice.window(layout(name), share, seed)
    return Slice.random(layout(name), share, Rng(("slice", seed)))


KINDS = st.sampled_from(["prefix", "window", "random"])


# ------------------------------------------------------------------------------------------------------- take and put


@PROPERTY
@given(FEW, KINDS, SHARES, SEEDS)
def test_what_is_put_back_is_what_was_taken_and_nothing_else_moves(
    name: str, kind: str, share: float, seed: int
) -> None:
    """Catches values in wrong places, and places beside the slice that are written."""
    own, other = params(name, 1), params(name, 2)
    part = sliced(name, kind, share, seed)
    small, held = part.take(own), part.coverage()
    back, zeros = part.put(small, other), part.put(small)
    assert tree.same(other, params(name, 2))
    assert tree.shapes(small) == {n: tuple(s) for n, s in part.network(model(name)).shapes.items()}
    for n, where in held.items():
        assert torch.equal(back[n], torch.where(where, own[n], other[n]))
        assert torch.equal(zeros[n], torch.where(where, own[n], torch.zeros_like(own[n])))
        assert int(where.sum()) == small[n].numel()
    assert tree.same(take(own, held), {n: v.reshape(-1) for n, v in small.items()})  # the same part as a mask


@PROPERTY
@given(FEW, KINDS, SHARES, SHARES, SEEDS)
def test_slices_of_smaller_shares_are_inside(name: str, kind: str, a: float, b: float, seed: int) -> None:
    """Catches windows that begin elsewhere at another share, and draws that depend on it."""
    inner, outer = (sliced(name, kind, share, seed) for share in sorted((a, b)))
    small, large = inner.coverage(), outer.coverage()
    assert all(bool((large[n] | ~small[n]).all()) for n in small)
    own = params(name)
    assert tree.same(take(outer.take(own), inner.inside(outer)), inner.take(own))


def test_a_slice_that_is_not_inside_another_is_refused() -> None:
    """Catches channels that another client's tensors do not have, taken for their neighbours."""
    with pytest.raises(ModelError, match=r"holds channels of 'fc1\.weight' that the other does not"):
        Slice.window(layout("mlp"), 0.5, 3).inside(Slice.prefix(layout("mlp"), 0.7))


@pytest.mark.parametrize("name", MODELS)
def test_all_channels_are_the_identity(name: str) -> None:
    """Catches a full client that loses a weight, or runs another network."""
    own = params(name)
    for whole in (Slice.prefix(layout(name), 1.0), Slice.window(layout(name), 1.0, 5)):
        assert len(whole) == 0
        assert whole.network(model(name)) is model(name)
        assert all(value is own[n] for n, value in whole.take(own).items())
        assert tree.same(whole.put(own), own)


def test_how_many_channels_are_a_share() -> None:
    """Catches a product such as 0.07 * 100 = 7.000000000000001 that costs a channel more, and a group without any."""
    assert [portion(0.07, 100), portion(0.28, 25), portion(0.5, 7), portion(0.001, 7), portion(1.0, 7)] == [
        7,
        7,
        4,
        1,
        7,
    ]
    for wrong in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected a fraction in"):
            portion(wrong, 4)


def test_a_window_rolls_round_every_group_and_trains_all_evenly() -> None:
    """Catches a window that stops at the end, or moves by another step in another group."""
    held = Slice.window(layout("mlp"), 0.5, 5)
    assert {group: some.tolist() for group, some in held.chosen.items()} == {
        "fc1.weight[0]": [0, 1, 5, 6],
        "fc2.weight[0]": [0, 1, 2],
    }
    counts = sum(Slice.window(layout("mlp"), 0.5, j).coverage()["fc2.weight"].long() for j in range(7 * 5))
    assert torch.equal(counts, torch.full((5, 7), 4 * 3))


def test_a_draw_is_that_of_its_key() -> None:
    """Catches groups of equal size that draw alike, and a draw that two rounds share."""
    first, again, other = (Slice.random(layout("resnet"), 0.5, Rng((seed,))) for seed in (1, 1, 2))
    assert {g: n.tolist() for g, n in first.chosen.items()} == {g: n.tolist() for g, n in again.chosen.items()}
    assert any(not torch.equal(first.chosen[g], other.chosen[g]) for g in first.chosen)
    assert not torch.equal(first.chosen["layer3.0.conv1.weight[0]"], first.chosen["layer3.0.conv2.weight[0]"])


def test_a_choice_of_ones_own_and_sums_over_channels() -> None:
    """Catches sums that are taken along columns, or without the biases."""
    own, known = params("mlp"), layout("mlp")
    sums = known.totals({n: v.square() for n, v in own.items()})
    rows = own["fc1.weight"].double().square().sum(1) + own["fc1.bias"].double().square()
    assert torch.allclose(sums["fc1.weight[0]"], rows, rtol=1e-6)
    best = sums["fc1.weight[0]"].topk(2).indices.sort().values
    held = Slice(known, {"fc1.weight[0]": best})
    assert torch.equal(held.take(own)["fc2.weight"], own["fc2.weight"][:, best])
    assert torch.allclose(known.totals(own, dim=1)["fc1.weight[0]"].float(), own["fc2.weight"].sum(0), rtol=1e-5)
    heads = layout("vit").totals({"block1.attention.qkv.weight": torch.ones(48, 16)})
    assert heads["block1.attention.qkv.weight[0]"].tolist() == [3 * 4 * 16] * 4


@pytest.mark.parametrize(
    "wrong", [{"fc1.weight": torch.zeros(7, 6)}, {"fc1.weight": torch.zeros(24)}, {"fc9.weight": torch.zeros(1)}]
)
def test_values_that_do_not_fit_a_slice_are_a_message_error(wrong: dict[str, Tensor]) -> None:
    """Catches an upload of a client that trained at another width, and a name that there is not."""
    with pytest.raises(MessageError, match="came with shape"):
        Slice.prefix(layout("mlp"), 0.5).put(wrong)


def test_tensors_that_a_slice_does_not_fit_are_refused() -> None:
    """Catches a slice of another network, whose first values would be taken."""
    with pytest.raises(ModelError, match="in which there are no places up to"):
        Slice.prefix(layout("mlp"), 0.7).take({"fc1.weight": torch.zeros(3, 6)})


def test_a_slice_can_be_differentiated_and_stacked() -> None:
    """Catches a copy that cuts the gradient, and one that fails for many clients at once."""
    own = {n: v.requires_grad_() for n, v in params("mlp").items()}
    held = Slice.random(layout("mlp"), 0.5, Rng((3,)))
    (grad,) = torch.autograd.grad(held.take(own)["fc2.weight"].sum(), own["fc2.weight"])
    assert torch.equal(grad.bool(), held.coverage()["fc2.weight"])
    many = {n: torch.stack([v.detach(), v.detach() + 1]) for n, v in own.items()}
    both = torch.func.vmap(held.take)(many)
    assert torch.equal(both["fc2.weight"][1], held.take(tree.map_leaves(lambda v: v + 1, own))["fc2.weight"])


# ------------------------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("kind", ["prefix", "window", "random"])
@pytest.mark.parametrize("name", sorted({*MODELS} - {"vit"}))
def test_a_slice_computes_what_the_full_network_does_without_the_other_channels(name: str, kind: str) -> None:
    """Catches columns or statistics of another channel: in these networks zeros are as good as nothing."""
    own, held = params(name), sliced(name, kind, 0.5, 5)
    x = torch.randn(4, *model(name).input_shape)
    small = held.network(model(name))(held.take(own), x)
    full = model(name)(held.put(held.take(own)), x)
    assert torch.allclose(small, full, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(small, model(name)(own, x), rtol=1e-2)


def test_heads_and_units_of_a_transformer_can_be_left_out() -> None:
    """Catches a head that takes its query from another, beside a stream that stays whole."""
    own, known = params("vit"), layout("vit")
    inner = {group: torch.tensor([1, 3]) for group in known.groups if "patches" not in group}
    held = Slice(known, inner)
    x = torch.randn(4, 3, 16, 16)
    small = held.network(model("vit"))(held.take(own), x)
    assert torch.allclose(small, model("vit")(held.put(held.take(own)), x), rtol=1e-4, atol=1e-5)


def test_a_narrower_transformer_is_one_that_was_built_so() -> None:
    """Catches a LayerNorm that divides by the full width, and heads of another size."""
    held = Slice.prefix(layout("vit"), 0.5)
    own = held.take(params("vit"))
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(held.network(model("vit"))(own, x), image("vit(width=8, depth=1, heads=2)")(own, x))


def test_a_slice_trains_its_own_statistics() -> None:
    """Catches running statistics of the full width, or of another client, that a small network moves."""
    held = Slice.window(layout("resnet"), 0.5, 3)
    small, own = held.network(model("resnet")), held.take(params("resnet"))
    before = tree.map_leaves(torch.clone, own)
    small.train(True)
    small(own, torch.randn(4, 3, 16, 16))
    small.train(False)
    moved = {n for n, v in own.items() if not torch.equal(v, before[n])}
    assert moved == set(small.buffer_names)
    assert small.buffer_names == model("resnet").buffer_names


# ---------------------------------------------------------------------------------------------------------- the mean


@PROPERTY
@given(FEW, st.lists(st.tuples(KINDS, SHARES, SEEDS, st.integers(1, 9)), min_size=1, max_size=4), st.randoms())
def test_the_mean_is_over_those_who_hold_a_coordinate(
    name: str, clients: list[tuple[str, float, int, int]], shuffle: object
) -> None:
    """Catches zeros averaged in, a favoured place, and coordinates of nobody's that move by a bit."""
    parts = [sliced(name, *client[:3]) for client in clients]
    weights = [client[3] for client in clients]
    sent = [part.take(params(name, seed)) for seed, part in enumerate(parts)]
    default = params(name, 99)
    out = gathered(CoverageMean(lambda client: parts[client.id], "n", default), sent, weights)
    order = list(range(len(clients)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    again = gathered(
        CoverageMean(lambda client: parts[order[client.id]], "n", default),
        [sent[i] for i in order],
        [weights[i] for i in order],
    )
    for n, value in default.items():
        held = torch.stack([part.coverage()[n] for part in parts]).double()
        full = torch.stack([part.put(values)[n] for part, values in zip(parts, sent, strict=True)]).double()
        w = torch.tensor(weights, dtype=torch.float64).reshape(-1, *([1] * value.dim()))
        total = (w * held).sum(0)
        nobody = total == 0
        assert torch.equal(out[n][nobody], value[nobody])
        expected = (w * full).sum(0) / total.clamp(min=1)
        close = torch.isclose(out[n].double(), expected, rtol=1e-6, atol=0.5 * (not value.is_floating_point()))
        assert bool((close | nobody).all())
        assert torch.allclose(out[n], again[n], rtol=1e-6, atol=0)


def test_changes_of_slices_are_zero_where_nobody_holds() -> None:
    """Catches a mean of changes that has no full shape, or one that begins with weights."""
    parts = [Slice.window(layout("mlp"), 0.3, j) for j in (0, 1)]
    out = gathered(CoverageMean(lambda client: parts[client.id]), [part.take(params("mlp", 1)) for part in parts])
    held = parts[0].coverage()["fc2.weight"] | parts[1].coverage()["fc2.weight"]
    assert torch.equal(out["fc2.weight"], torch.where(held, params("mlp", 1)["fc2.weight"], 0))
    with pytest.raises(TypeError, match="give CoverageMean a default"):
        gathered(CoverageMean(lambda client: leading({"w": (1,)})), [{"w": torch.ones(1)}])


def test_all_at_full_size_is_the_mean_by_name() -> None:
    """Catches a denominator or a rounding of its own: bitwise, and over unlike depths, too."""
    sent = [params("resnet", seed) for seed in range(3)]
    sent[1] = {n: v for n, v in sent[1].items() if not n.startswith("layer3")}
    default, whole = params("resnet", 9), Slice.prefix(layout("resnet"), 1.0)
    got = gathered(CoverageMean(lambda client: whole, "n", default), sent, [1, 2, 5])
    assert tree.same(got, gathered(MeanByName("n", default), sent, [1, 2, 5]))


def test_unlike_depths_and_widths_together() -> None:
    """Catches a layer that a shallow client lacks and that counts as covered by it."""
    half, full = Slice.prefix(layout("mlp"), 0.5), Slice.prefix(layout("mlp"), 1.0)
    a, b, default = params("mlp", 1), params("mlp", 2), params("mlp", 3)
    shallow = tree.pick(half.take(a), ("fc1.weight", "fc1.bias"))
    out = gathered(CoverageMean(lambda client: (half, full)[client.id], None, default), [shallow, b])
    assert torch.equal(out["fc2.weight"], b["fc2.weight"])
    assert torch.equal(out["fc1.bias"][4:], b["fc1.bias"][4:])
    assert torch.allclose(out["fc1.bias"][:4], (a["fc1.bias"] + b["fc1.bias"])[:4] / 2)


# ------------------------------------------------------------------------------------------------------- an algorithm


@dataclass(frozen=True, kw_only=True)
class Widths(Algorithm):
    """Each client trains the leading channels that its capacity allows."""

    name = "fedavg"  # a name that a configuration knows

    class Server(State):
        """The full model and its channels."""

        model: Params
        layout: Layout

    class Update(Message):
        """The tensors of a slice."""

        model: Params

    def models_at(self, task: Task, own: SplitModel, capacity: float) -> Mapping[str, SplitModel]:
        """The network of the client's width."""
        return {"model": Slice.prefix(Layout.of(own), capacity).network(own)}

    def init_server(self, task: Task, rng: Rng) -> Server:
        """A draw."""
        own = task.common(self.name)
        return self.Server(own.init(rng.at("model")), Layout.of(own))

    def server_round(self, server: Server, cohort: Cohort) -> Steps[State]:
        """Average each coordinate over those who hold it."""
        mean = CoverageMean(lambda client: Slice.prefix(server.layout, client.capacity), None, server.model)
        got = yield from exchange(cohort, lambda client: self.message_for(server, client), gather={"model": mean})
        return self.Server(got["model"], server.layout)

    def client_round(self, private: Nothing, msg: Update, client: LocalClient) -> Steps[ClientResult]:
        """Train."""
        fitted = yield from fit(client, {"model": msg.model}, loss=supervised)
        return private, self.Update(fitted.parts["model"])

    def message_for(self, server: Server, client: ClientInfo) -> Update:
        """The client's slice."""
        return self.Update(Slice.prefix(server.layout, client.capacity).take(server.model))

    def predictor_parts(self, private: Nothing, msg: Update, client: LocalClient) -> Parts:
        """The slice."""
        return {"model": msg.model}


@pytest.mark.parametrize("driver", ["sequential", "stacked"])
def test_clients_train_networks_of_their_own_widths(driver: str) -> None:
    """Catches a client that gets the full network, and a weight of nobody's that moves."""
    capacities = [0.5, 0.25, 0.5]
    game = toy.play(toy.federation(Widths(), clients={"capacities": capacities}), driver=driver)
    first = game.server.model
    game.round()
    for client, capacity in enumerate(capacities):
        held = Slice.prefix(game.server.layout, capacity)
        assert tree.shapes(game.sent[0][client].model) == tree.shapes(held.take(first))
        assert game.local(client).models["model"] is held.network(game.federation.own(client))
    held = coverage(Slice.prefix(game.server.layout, 0.5), tree.shapes(first))
    for name, value in game.server.model.items():
        moved = value != first[name]
        assert not bool((moved & ~held[name]).any())
        assert bool(moved.any())


def test_a_layout_survives_a_checkpoint() -> None:
    """Catches positions that a resumed server reads otherwise."""
    state = Widths.Server(params("vit"), layout("vit"))
    skeleton, tensors = flatten(state)
    back = unflatten(skeleton, [tensor for _, tensor in tensors], Widths.Server)
    held, again = (Slice.window(one.layout, 0.5, 3) for one in (state, back))  # type: ignore[attr-defined]
    assert tree.same(held.take(state.model), again.take(state.model))


def test_a_slice_travels_without_positions() -> None:
    """Catches index bytes: all bytes but the header are values."""
    held = Slice.window(layout("mlp"), 0.5, 5)
    sent = Widths.Update(held.take(params("mlp")))
    assert size(sent).indices == 0
    assert size(sent).values == 4 * sum(value.numel() for value in sent.model.values())


def test_networks_of_every_capacity_are_built_before_the_run() -> None:
    """Catches a network that fails when its first small client trains."""
    fed = toy.federation(
        Widths(), models=("slice_nets:Fixed",), shape=(6,), classes=5, clients={"capacities": [1.0, 0.5]}
    )
    with pytest.raises(ModelError, match="does not run"):
        check_networks(fed.algorithm, fed.task)


def test_a_net_runs_several_widths_in_one_loss() -> None:
    """Catches gradients that do not reach the shared tensors from a narrower width."""
    outer, inner = Slice.prefix(layout("mlp"), 0.7), Slice.prefix(layout("mlp"), 0.3)
    small = {n: v.requires_grad_() for n, v in outer.take(params("mlp")).items()}
    narrow = Net(inner.network(model("mlp")), take(small, inner.inside(outer)))
    grads = torch.autograd.grad(
        nn.functional.mse_loss(narrow(torch.randn(3, 6)), torch.zeros(3, 3)), list(small.values())
    )
    for (name, _), grad in zip(small.items(), grads, strict=True):
        inside = put({name: torch.ones_like(inner.take(params("mlp"))[name])}, inner.inside(outer), tree.shapes(small))
        assert bool((grad[inside[name] == 0] == 0).all())
        assert bool((grad != 0).any())
