"""The generator of features that a server may train."""

import pytest
import torch

from polyfed.base.rng import Rng
from polyfed.blocks.feature_generator import draw_classes, ensemble, generate, sameness
from polyfed.blocks.server_training import run_two_layers, two_layers
from polyfed.core.plan import Step


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
