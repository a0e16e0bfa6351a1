"""Every refusal says what was got, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peculiar_nets import Branches, ControlFlow, Norm, Plain, Residual, Tied, batch, split, weights
from torch import Tensor, nn
from torch.nn import functional

from polyfed.base.errors import ModelError
from polyfed.models.compatibility import check_cuts_fit
from polyfed.models.split import SplitModel


def says(error: pytest.ExceptionInfo[ModelError], *words: str) -> None:
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def net_with(forward: Callable[[Plain, Tensor], object]) -> type[nn.Module]:
    class Net(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)  # type: ignore[return-value]

    return Net


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: split(Plain, "fcc"), ["no submodule 'fcc'", "classifier", "nearest: 'fc'"]),
        (lambda: split(Plain, "fc", "aa"), ["no submodule 'aa'", "extractor", "'a'"]),
        (lambda: split(Plain, None, "a"), ["extractor ('a')", "no classifier"]),
        (lambda: split(Plain, "a", "b"), ["the extractor 'b' comes after", "'a'", "runs before"]),
        (lambda: split(Plain, "b", "b"), ["'b'", "two separate submodules"]),
        (lambda: split(ControlFlow), ["'fc'", "cannot be traced", "TraceError", "control flow", "branch"]),
        (
            lambda: split(Branches, "join", "left"),
            ["'left'", "the output of 'right'", "branches have joined"],
        ),
    ],
)
def test_cuts_that_cannot_be(build: Callable[[], SplitModel], words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        build()
    says(error, *words)


def test_a_skip_past_the_cut_names_what_crosses() -> None:
    with pytest.raises(ModelError) as error:
        split(net_with(lambda s, x: s.fc(torch.relu(s.b(s.a(x)))) + x[:, :3]))
    says(error, "the input of 'fc'", "getitem", "a single tensor may pass")


def test_the_input_itself_may_be_what_crosses() -> None:
    def forward(s: Plain, x: Tensor) -> Tensor:
        return s.fc(s.b(s.a(x))).view(x.size(0), 3)

    with pytest.raises(ModelError) as error:
        split(net_with(forward))
    says(error, ".size()")


def test_a_submodule_called_twice_or_never() -> None:
    with pytest.raises(ModelError) as error:
        split(net_with(lambda s, x: s.fc(s.b(s.a(x))) + s.fc(s.b(s.a(x + 1)))))
    says(error, "classifier 'fc' 2 times", "expected once")
    with pytest.raises(ModelError) as error:
        split(net_with(lambda s, x: s.b(s.a(x))))
    says(error, "classifier 'fc' 0 times")


def test_a_result_that_does_not_depend_on_the_cut() -> None:
    def forward(s: Plain, x: Tensor) -> Tensor:
        h = s.b(s.a(x))
        s.fc(h)
        return s.a(x)

    with pytest.raises(ModelError) as error:
        split(net_with(forward))
    says(error, "does not depend on", "the input of 'fc'")


def test_a_representation_that_is_not_flat() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))

    with pytest.raises(ModelError) as error:
        split(net, "1", input_shape=(1, 8, 8))
    says(error, "(2, 2, 6, 6)", "(2, rep_dim)", "flatten")


def test_weights_on_both_sides_of_a_cut() -> None:
    for net, name in ((Residual, "'scale'"), (lambda: TiedAcross(), "'a.weight'")):
        with pytest.raises(ModelError) as error:
            split(net)
        says(error, name, "two pieces", "untie")


class TiedAcross(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.fc.weight = self.a.weight


def test_two_tensors_into_the_classifier() -> None:
    class Net(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Bilinear(5, 4, 3)  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.fc(h, self.b(h))

    with pytest.raises(ModelError) as error:
        split(Net)
    says(error, "takes 2 tensors", "the output of 'a'", "the output of 'b'", "join")


def test_a_write_whose_result_is_dropped() -> None:
    def forward(s: Plain, x: Tensor) -> Tensor:
        h = s.b(s.a(x))
        functional.relu_(h)
        return s.fc(h)

    with pytest.raises(ModelError) as error:
        split(net_with(forward))
    says(error, "in place", "relu")


def test_a_random_constant_would_be_drawn_once() -> None:
    with pytest.raises(ModelError) as error:
        split(net_with(lambda s, x: s.fc(s.b(s.a(x))) + torch.rand(3)))
    says(error, "random", "would keep a single draw", "rand_like")


def test_outputs_that_are_not_logits() -> None:
    with pytest.raises(ModelError) as error:
        split(net_with(lambda s, x: (s.fc(s.b(s.a(x))), x)), None)
    says(error, "returned tuple", "(2, L)")
    with pytest.raises(ModelError) as error:
        split(net_with(lambda s, x: (s.fc(s.b(s.a(x))), x)))
    says(error, "returns tuple", "logits only")
    with pytest.raises(ModelError) as error:
        split(net_with(lambda s, x: s.fc(s.b(s.a(x))).sum()), None)
    says(error, "returned ()")


def test_factories_that_fail() -> None:
    one = Plain()
    with pytest.raises(ModelError) as error:
        weights(split(lambda: one))
    says(error, "the same module twice", "build a new module")
    with pytest.raises(ModelError) as error:
        split(lambda: "not a module")  # type: ignore[arg-type, return-value]
    says(error, "returned str")
    with pytest.raises(ModelError) as error:
        split(Plain, input_shape=(7,))
    says(error, "fails on an input of shape (2, 7)", "RuntimeError")


def test_a_buffer_that_is_replaced_would_be_lost() -> None:
    class Net(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return super().forward(x)

    with pytest.raises(ModelError) as error:
        split(Net, None, input_shape=(1, 8, 8))
    says(error, "replaces 'seen'", "copy_")


def test_pieces_of_a_model_that_has_no_cuts() -> None:
    whole, half = split(Plain, None), split(Plain)
    x = batch(whole)
    for use in (
        lambda: whole.rep_dim,
        lambda: whole.s_in_shape,
        lambda: whole.classifier_names,
        lambda: whole.represent(weights(whole), x),
        lambda: whole.classify(weights(whole), x),
    ):
        with pytest.raises(ModelError) as error:
            use()
        says(error, "no classifier cut", "classifier = ")
    for use in (
        lambda: half.s_in_shape,
        lambda: half.extract(weights(half), x),
        lambda: half.intermediate(weights(half), x),
    ):
        with pytest.raises(ModelError) as error:
            use()
        says(error, "no extractor cut", "extractor = ")


def test_weights_that_do_not_belong() -> None:
    model = split(Plain)
    good, x = weights(model), batch(model)
    without = {name: tensor for name, tensor in good.items() if name != "a.bias"}
    for bad, words in (
        (without, ["lack 'a.bias'", "expected exactly its 6"]),
        ({**good, "extra": torch.zeros(1)}, ["have 'extra'", "does not know"]),
        ({**without, "a.biass": torch.zeros(5)}, ["lack 'a.bias' (nearest: 'a.biass')", "have 'a.biass'"]),
        ({**good, "a.bias": torch.zeros(4)}, ["'a.bias'", "shape (4,), expected (5,)"]),
        ({}, ["'a.weight', 'a.bias', 'b.weight' and 3 more"]),
    ):
        with pytest.raises(ModelError) as error:
            model(bad, x)
        says(error, "'net'", *words)
        assert torch.equal(model(good, x), model(good, x)), "a refused mapping must leave no trace"


def test_cuts_that_do_not_fit() -> None:
    class Wide(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(8, 3)

    models = {"client 0": split(Plain, extractor="a"), "client 1": split(Wide, extractor="a")}
    for choice, words in (
        ({}, ["extractor output", "(5,)", "(7,)"]),
        ({"extractor": False}, ["representation width", "4", "8"]),
        ({"extractor": False, "representation": False}, ["classifier", "(3, 4)", "(3, 8)"]),
    ):
        with pytest.raises(ModelError) as error:
            check_cuts_fit(models, **choice)
        says(error, "'client 0'", "'client 1'", *words)
    check_cuts_fit(models, extractor=False, representation=False, classifier=False)
