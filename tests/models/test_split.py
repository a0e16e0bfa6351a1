from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from peculiar_nets import (
    Branches,
    ControlFlow,
    FunctionalDropout,
    InPlace,
    Norm,
    Plain,
    Recurrent,
    Residual2,
    Tied,
    batch,
    split,
    weights,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from polyfed.base.rng import Rng
from polyfed.core.net import Net
from polyfed.models.compatibility import check_cuts_fit
from polyfed.models.split import SplitModel, keep_statistics

CUTS = [
    (Plain, "a"),
    (Residual2, "b"),
    (Branches, "join"),
    (FunctionalDropout, "a"),
    (Norm, "bn"),
    (InPlace, "a"),
    (Tied, None),
    (Recurrent, None),
]


def cut_model(net: type[nn.Module], extractor: str | None) -> SplitModel:
    return split(net, extractor=extractor, input_shape=(1, 8, 8) if net is Norm else (6,))


@pytest.fixture(params=CUTS, ids=lambda case: case[0].__name__)
def case(request: pytest.FixtureRequest) -> tuple[type[nn.Module], SplitModel]:
    net, extractor = request.param
    return net, cut_model(net, extractor)


@pytest.mark.parametrize("mode", [False, True])
def test_the_whole_is_functional_call_bitwise(case: tuple[type[nn.Module], SplitModel], mode: bool) -> None:
    net, model = case
    reference = net().train(mode)
    model.train(mode)
    for number in range(2):  # a second mapping replaces the first
        params, x = weights(model, number), batch(model)
        with Rng((1,)).fork():
            expected = functional_call(reference, {k: v.clone() for k, v in params.items()}, x.clone())
        with Rng((1,)).fork():
            assert torch.equal(model(params, x), expected)


@pytest.mark.parametrize("mode", [False, True])
def test_the_pieces_in_a_row_are_the_whole_bitwise(case: tuple[type[nn.Module], SplitModel], mode: bool) -> None:
    _, model = case
    model.train(mode)
    params, x = weights(model), batch(model)
    kept = x.clone()
    with Rng((1,)).fork():
        expected = model(keep_statistics(model, params), x)
    with Rng((1,)).fork():
        r = model.represent(keep_statistics(model, params), x)
        assert r.shape == (5, model.rep_dim)
        before = r.clone()
        assert torch.equal(model.classify(params, r), expected)
    assert torch.equal(x, kept), "the input was written to"
    assert torch.equal(r, before), "the representation was written to"


@pytest.mark.parametrize(("net", "extractor"), [c for c in CUTS if c[1]])
def test_represent_is_intermediate_of_extract(net: type[nn.Module], extractor: str) -> None:
    model = cut_model(net, extractor)
    params, x = weights(model), batch(model)
    s_in = model.extract(params, x)
    assert tuple(s_in.shape[1:]) == model.s_in_shape
    assert torch.equal(model.intermediate(params, s_in), model.represent(params, x))
    assert model.s_out_shape == (model.rep_dim,)


def test_each_name_belongs_to_one_piece() -> None:
    model = split(Residual2, extractor="b")
    assert model.extractor_names == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert model.classifier_names == {"fc.weight", "fc.bias"}
    assert {"scale", "shift", "bn.running_mean", "c.weight"} <= model.intermediate_names
    assert model.extractor_names | model.intermediate_names | model.classifier_names == set(model.shapes)
    assert model.norm_names == {"bn.weight", "bn.bias"}
    assert model.buffer_names == {"shift", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert model.parameter_names | model.buffer_names == set(model.shapes)


def test_a_parameter_of_the_root_is_looked_up_at_each_call() -> None:
    model = split(Residual2, extractor="b")
    x, one = batch(model), weights(model)
    other = {**one, "scale": one["scale"] + 1, "shift": one["shift"] + 1}
    model.represent(one, x)
    expected = functional_call(Residual2().eval(), other, x)
    assert torch.equal(model.classify(other, model.represent(other, x)), expected)


def test_gradients_of_leaves_and_of_func_grad_agree() -> None:
    model = split(Plain, extractor="a")
    leaves = {name: tensor.requires_grad_() for name, tensor in weights(model).items()}
    x = batch(model)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return model.classify(params, model.represent(params, x)).square().mean()

    loss(leaves).backward()
    detached = {name: tensor.detach() for name, tensor in leaves.items()}
    functional = grad(loss)(detached)
    reference = grad(lambda p: functional_call(Plain(), p, x).square().mean())(detached)
    for name, leaf in leaves.items():
        assert torch.equal(functional[name], reference[name])
        torch.testing.assert_close(leaf.grad, functional[name])
    assert torch.equal(loss(detached), loss(leaves)), "wrapped tensors must not stay bound"


@pytest.mark.parametrize("net", [Plain, Residual2, Norm])
def test_pieces_under_vmap_equal_a_loop(net: type[nn.Module]) -> None:
    model = cut_model(net, {Plain: "a", Residual2: "b", Norm: "bn"}[net])
    several = [weights(model, number) for number in range(3)]
    xs = torch.stack([batch(model, number=number) for number in range(3)])
    stacked = {name: torch.stack([params[name] for params in several]) for name in model.shapes}

    def step(params: dict[str, Tensor], x: Tensor) -> Tensor:
        r = model.intermediate(params, model.extract(params, x))
        return torch.cat([model.classify(params, r), model(params, x)])

    together = vmap(step)(stacked, xs)
    for params, x, row in zip(several, xs, together, strict=True):
        torch.testing.assert_close(row, step(params, x))

    def loss(trained: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor) -> Tensor:
        return step({**rest, **trained}, x).square().sum()  # integer buffers have no gradient

    def parts(params: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trained = {name: params[name] for name in model.parameter_names}
        return trained, {name: params[name] for name in model.buffer_names}

    grads = vmap(grad(loss))(*parts(stacked), xs)
    for number, params in enumerate(several):
        alone = grad(loss)(*parts(params), xs[number])
        for name, value in alone.items():
            torch.testing.assert_close(grads[name][number], value)


def test_statistics_move_in_the_bound_tensors_in_training_only() -> None:
    model = cut_model(Norm, "bn")
    params, x = weights(model), batch(model)
    fresh = {name: tensor.clone() for name, tensor in params.items()}

    def moved() -> set[str]:
        return {name for name in params if not torch.equal(params[name], fresh[name])}

    model(params, x)
    assert moved() == set()
    model.train(True)
    model.represent(keep_statistics(model, params), x)
    assert moved() == set()
    model(params, x)
    assert moved() == set(model.buffer_names)
    assert params["bn.num_batches_tracked"] == 1
    assert model.training


def test_keep_statistics_shares_the_parameters() -> None:
    model = cut_model(Norm, "bn")
    params = weights(model)
    kept = keep_statistics(model, params)
    assert {name for name in params if kept[name] is params[name]} == model.parameter_names


def test_functional_dropout_follows_train() -> None:
    model = split(FunctionalDropout)
    params, x = weights(model), batch(model, 64)
    plain = split(Plain)
    assert model.random
    assert not plain.random
    assert torch.equal(model.represent(params, x), model.represent(params, x))
    assert not torch.any(model.classify(params, torch.ones(64, 4)) == 0)
    model.train(True)
    assert not torch.equal(model.represent(params, x), model.represent(params, x))
    assert torch.any(model.classify(params, torch.ones(64, 4)) == 0)
    model.train(False)
    assert torch.equal(model.represent(params, x), model.represent(params, x))


@pytest.mark.parametrize(
    ("layer", "random"),
    [(nn.Dropout(0.5), True), (nn.Dropout(0.0), False), (nn.RReLU(), True), (nn.AlphaDropout(0.1), True)],
    ids=str,
)
def test_random_tells_layers_that_draw(layer: nn.Module, random: bool) -> None:
    model = split(lambda: nn.Sequential(nn.Linear(6, 4), layer, nn.Linear(4, 3)), None)
    assert model.random is random


def test_binding_is_by_identity() -> None:
    model = split(Plain, extractor="a")
    one, two, x = weights(model), weights(model, 1), batch(model)
    binds = model._binding
    before = binds.binds  # the network was tried with its cuts
    for _ in range(3):
        model(one, x)
        model.classify(one, model.represent(one, x))
    assert binds.binds == before + 1
    model(two, x)
    model(one, x)
    assert binds.binds == before + 3
    one["a.weight"].zero_()  # in place, as an optimiser does
    assert torch.equal(model(one, x), functional_call(Plain(), one, x))
    assert binds.binds == before + 3


def test_init_is_a_function_of_its_rng() -> None:
    model = split(Norm, input_shape=(1, 8, 8))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    numbers = list(np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    one, again, other = weights(model), weights(model), weights(model, 1)
    split(Plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(np.random.get_state()[1]) == numbers  # type: ignore[index]  # noqa: NPY002
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["conv.weight"], other["conv.weight"])
    assert one["conv.weight"].data_ptr() != again["conv.weight"].data_ptr()
    assert set(one) == set(model.shapes)
    assert not any(tensor.requires_grad for tensor in one.values())
    assert all(tensor.is_contiguous() for tensor in one.values())


def test_tied_weights_have_one_name_and_both_places() -> None:
    model = split(Tied)
    assert "a.weight" in model.shapes
    assert "b.weight" not in model.shapes
    params, x = weights(model), batch(model)
    params["a.weight"] = torch.zeros(6, 6)
    expected = params["b.bias"].expand(5, 6)
    assert torch.equal(model.represent(params, x), expected)


def test_a_recurrent_layer_uses_the_bound_weights() -> None:
    model = split(Recurrent)
    one, two, x = weights(model), weights(model, 1), batch(model)
    first = model(one, x)
    assert not torch.equal(first, model(two, x))
    assert torch.equal(first, model(one, x))


def test_without_a_classifier_the_whole_works_even_with_control_flow() -> None:
    model = split(ControlFlow, None)
    params, x = weights(model), batch(model)
    assert torch.equal(model(params, x), functional_call(ControlFlow(), params, x))
    assert model.num_classes == 3


def test_control_flow_inside_an_uncut_submodule_is_no_matter() -> None:
    model = split(lambda: nn.Sequential(ControlFlow(), nn.Linear(3, 2)), "1")
    params, x = weights(model), batch(model)
    assert torch.equal(model.classify(params, model.represent(params, x)), model(params, x))


def test_a_cut_may_be_nested_and_may_be_a_whole_block() -> None:
    def net() -> nn.Module:
        return nn.Sequential(Plain(), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))))

    for classifier, rep_dim in (("1.1.1", 4), ("1.1", 3), ("1", 3)):
        model = split(net, classifier, "0.a")
        assert (model.rep_dim, model.s_in_shape) == (rep_dim, (5,))
        params, x = weights(model), batch(model)
        assert torch.equal(model.classify(params, model.represent(params, x)), model(params, x))


def test_the_extractor_may_end_at_the_representation() -> None:
    model = split(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), "1", "0")
    params, x = weights(model), batch(model)
    s_in = model.extract(params, x)
    assert model.intermediate(params, s_in) is s_in
    assert model.intermediate_names == frozenset()


def test_an_optional_argument_of_forward_keeps_its_default() -> None:
    class Optional(Plain):
        def forward(self, x: Tensor, mask: Tensor | None = None, times: int = 2) -> Tensor:
            h = self.b(self.a(x))
            return self.fc(h * times if mask is None else h * mask)

    model = split(Optional)
    params, x = weights(model), batch(model)
    assert torch.equal(model.classify(params, model.represent(params, x)), model(params, x))


def test_cuts_that_fit_and_signatures() -> None:
    one, two = split(Plain, extractor="a"), split(Plain, extractor="a")
    check_cuts_fit({"one": one, "two": two})
    assert one.signature == two.signature
    assert one.signature != split(Plain, extractor="b").signature
    assert split(Plain, signature=("mine",)).signature == ("mine",)
    assert repr(one) == "SplitModel('net', (6,) -> 3, 74 parameters)"


def test_a_net_evaluates_in_a_block_and_then_behaves_as_before() -> None:
    """Catches a mode that stays, also where the block fails, and an evaluation that is none."""
    model = cut_model(Norm, "bn")
    params, x = weights(model), batch(model)
    net = Net(model, params)
    expected = net(x)
    for training in (True, False):
        model.train(training)
        with suppress(ZeroDivisionError), net.evaluating():
            assert torch.equal(net(x), expected)
            raise ZeroDivisionError
        assert model.training is training
