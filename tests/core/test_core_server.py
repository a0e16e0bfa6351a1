"""What a server trains by itself, the generator it may train, and a step on paper."""

from copy import deepcopy

import pytest
import torch
import toy

from polyfed.base.errors import DivergedError, ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.classwise import gaps, stack_rows
from polyfed.blocks.feature_generator import draw_classes, ensemble, generate, sameness
from polyfed.blocks.server_training import run_two_layers, train_at_server, two_layers
from polyfed.core.clients import Cohort
from polyfed.core.net import Net
from polyfed.core.plan import LocalSGD, Step
from polyfed.models.compatibility import check_head_linear
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build


def cohort(round_: int = 1) -> Cohort:
    return Cohort((), round_, 9, Rng((0, "round", round_, "server")))


def quadratic(weights, step):
    return (weights["w"] - step.rows.double().mean()).square().sum()


@pytest.mark.parametrize(
    ("plan", "optimizer"),
    [
        (LocalSGD(steps=7, batch_size=2, lr=0.1), lambda w: torch.optim.SGD([w], lr=0.1)),
        (
            LocalSGD(epochs=2, batch_size=3, lr=0.1, momentum=0.9, weight_decay=0.1),
            lambda w: torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=0.1),
        ),
        (LocalSGD(steps=5, batch_size=4, lr=0.1, optimizer="adam"), lambda w: torch.optim.Adam([w], lr=0.1)),
    ],
)
def test_a_server_trains_by_its_plan(plan, optimizer):
    """Catches weights that are written to, another optimizer or order, and gradients that add up over steps."""
    start = {"w": torch.tensor([3.0, -1.0], dtype=torch.float64)}
    with torch.no_grad():  # whatever the mode outside
        got = train_at_server(start, quadratic, plan, 8, cohort())
    w = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    stepper = optimizer(w)
    for step in plan.schedule(8, Rng((0, "round", 1, "server", "training"))):
        stepper.zero_grad()
        quadratic({"w": w}, step).backward()
        stepper.step()
    assert torch.equal(got["w"], w.detach())
    assert not got["w"].requires_grad
    assert start["w"].tolist() == [3.0, -1.0]
    assert not torch.equal(got["w"], train_at_server(start, quadratic, plan, 8, cohort(2))["w"])


def test_a_server_clips_and_names_its_divergence():
    """Catches a limit that is ignored, and NaN that is sent to everyone."""
    start = {"w": torch.tensor([100.0])}
    short = train_at_server(start, quadratic, LocalSGD(steps=1, batch_size=2, lr=1.0, clip=0.5), 2, cohort())
    assert float(start["w"] - short["w"]) == pytest.approx(0.5, rel=1e-4)
    with pytest.raises(DivergedError, match=r"round 3: tensor 'server.w' .*server_lr"):
        train_at_server(start, quadratic, LocalSGD(steps=40, batch_size=2, lr=1e9), 2, cohort(3))


def test_two_layers_are_two_layers():
    """Catches a missing ReLU, and draws from the global generator."""
    w = two_layers(3, 5, 2, Rng((1,)))
    assert {name: tuple(v.shape) for name, v in w.items()} == {
        "fc1.weight": (5, 3), "fc1.bias": (5,), "fc2.weight": (2, 5), "fc2.bias": (2,),
    }  # fmt: skip
    x = torch.randn(4, 3)
    expected = torch.relu(x @ w["fc1.weight"].T + w["fc1.bias"]) @ w["fc2.weight"].T + w["fc2.bias"]
    assert torch.allclose(run_two_layers(w, x), expected, atol=1e-6)
    assert all(torch.equal(v, w[n]) for n, v in two_layers(3, 5, 2, Rng((1,))).items())


def test_a_generator_is_asked_by_key():
    """Catches classes that are not known, noise that is uniform, and draws that depend on when they happen."""
    step = Step(torch.arange(4000), 3, 0)
    drawn = draw_classes((1, 6), 5, Rng((2,)), step)
    assert set(drawn["y"].tolist()) == {1, 6}
    assert 1800 < int((drawn["y"] == 1).sum()) < 2200
    assert drawn["eps"].shape == (2, 4000, 5)
    assert abs(float(drawn["eps"].mean())) < 0.03
    assert float(drawn["eps"].std()) == pytest.approx(1, abs=0.02)
    assert float((drawn["eps"].abs() > 2).double().mean()) == pytest.approx(0.0455, abs=0.01)
    again = draw_classes((1, 6), 5, Rng((2,)), step)
    assert torch.equal(drawn["eps"], again["eps"])
    other = draw_classes((1, 6), 5, Rng((2,)), Step(torch.arange(4000), 4, 0))
    assert not torch.equal(drawn["eps"], other["eps"])
    assert set(draw_classes((), 5, Rng((2,)), step)["y"].tolist()) == {0}


def test_a_generator_makes_of_class_and_noise():
    """Catches a class that lands at another's place, and an ensemble that forgets whose class it is."""
    w = two_layers(3 + 4, 6, 2, Rng((1,)))
    eps, y = torch.randn(2, 3), torch.tensor([3, 0])
    x = torch.cat([eps, torch.tensor([[0.0, 0, 0, 1], [1.0, 0, 0, 0]])], dim=1)
    assert torch.allclose(generate(w, eps, y), run_two_layers(w, x))
    heads = [{"weight": torch.randn(4, 2), "bias": torch.randn(4)}, {"weight": torch.randn(4, 2)}]
    counts = torch.tensor([[3.0, 0, 0, 0], [1.0, 0, 0, 5.0]])
    z = generate(w, eps, y)
    first = z @ heads[0]["weight"].T + heads[0]["bias"]
    second = z @ heads[1]["weight"].T
    expected = torch.stack([second[0], 0.75 * first[1] + 0.25 * second[1]])
    assert torch.allclose(ensemble(heads, counts, z, y), expected, atol=1e-6)


def test_sameness_falls_as_answers_differ():
    """Catches the opposite sign, which would reward a generator that ignores its noise."""
    eps = torch.randn(6, 3)
    same = torch.ones(6, 2)
    assert float(sameness(same, eps)) == 1.0
    assert float(sameness(torch.randn(6, 2), eps)) < 1.0
    assert float(sameness(9 * torch.randn(6, 2), eps)) < float(sameness(eps[:, :2] / 9, eps))


def test_rows_are_pooled_with_their_classes():
    """Catches rows that lose their class, an order that depends on how a mapping was made, and unequal widths."""
    row = {c: torch.full((2,), float(c)) for c in range(12)}
    rows, labels = stack_rows([{"10": row[10], "2": row[2]}, {}, {"3": row[3]}])
    assert labels.tolist() == [2, 10, 3]
    assert rows[:, 0].tolist() == [2, 10, 3]
    with pytest.raises(ModelError, match=r"2 rows by class came with the shapes \[\(2,\), \(3,\)\]"):
        stack_rows([{"0": torch.zeros(2)}, {"0": torch.zeros(3)}])
    with pytest.raises(ModelError, match="0 rows"):
        stack_rows([{}])
    assert gaps(torch.tensor([[0.0], [3.0], [4.0]]), "nearest").tolist() == [3.0, 1.0, 1.0]
    assert gaps(torch.tensor([[0.0], [3.0], [4.0]]), "farthest").tolist() == [4.0, 3.0, 4.0]


def test_a_step_on_paper_moves_nothing_and_can_be_differentiated():
    """Catches weights that are written to, and a step whose dependence on the loss's inputs is cut off."""
    net = build(toy.MLP, input_shape=(7,), num_classes=4)
    params = net.init(Rng((0,)))
    before = toy.copy(params)
    x, scale = torch.randn(5, 7), torch.tensor(2.0, requires_grad=True)
    after = Net(net, params).stepped(lambda model: scale * model(x).square().mean(), 0.1)
    toy.close(params, before, 0.0)
    leaves = {n: v.clone().requires_grad_() for n, v in params.items()}
    grads = torch.autograd.grad(net(leaves, x).square().mean(), list(leaves.values()))
    for (name, value), g in zip(params.items(), grads, strict=True):
        assert torch.allclose(after[name], value - 0.2 * g, atol=1e-7)
    (found,) = torch.autograd.grad(after["fc1.weight"].sum(), scale)
    assert torch.allclose(found, -0.1 * grads[0].sum(), atol=1e-6)


class Squashed(torch.nn.Linear):
    """A linear layer's tensors, and something else computed from them."""

    def forward(self, input):
        return super().forward(input).tanh()


@pytest.mark.parametrize("last", [Squashed(3, 2), torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))])
def test_heads_that_are_not_linear_are_refused(last):
    """Catches a server that computes another function than its clients."""
    net = SplitModel(
        "odd", lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), deepcopy(last)), input_shape=(4,), classifier="1"
    )
    with pytest.raises(ModelError, match=r"'odd' has a classifier .* not one linear layer .* width 3"):
        check_head_linear(net)
    for spec in ("cnn5", "resnet8(width=4)", toy.MLP):
        check_head_linear(build(spec, input_shape=(1, 16, 16), num_classes=4))
