"""FedNova: FedAvg at equal steps, effective steps, p_k of each key, and bytes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from layers_by_hand import federation, numel

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fednova import FedNova, effective_steps
from polyfed.base.errors import MessageError
from polyfed.core.message import size
from polyfed.core.plan import LocalSGD

AVERAGES = ("architecture", "layer")


@pytest.mark.parametrize(("train", "tolerance"), [({}, 1e-6), ({"momentum": 0.9, "lr": 0.02}, 1e-6)])
@pytest.mark.parametrize("average", AVERAGES)
def test_at_equal_steps_it_is_fedavg(average: Any, train: Any, tolerance: float) -> None:
    """Catches a coefficient or shares of other clients: a_k cancels out whatever it is, for each key."""
    settings = {"epochs": None, "steps": 4, **train}
    ours, theirs = (
        toy.play(federation(a, train=settings), precision="fp64")
        for a in (FedNova(average=average), FedAvg(average=average))
    )
    for _ in range(3):
        toy.close(ours.round().server.model, theirs.round().server.model, tolerance)


@pytest.mark.parametrize("average", AVERAGES)
def test_at_unlike_steps_it_is_not_fedavg_and_buffers_are(average: Any) -> None:
    """Catches a server that undoes what the clients divided by, and statistics that are normalised."""
    ours, theirs = (toy.play(federation(a), 1) for a in (FedNova(average=average), FedAvg(average=average)))
    model, other = ours.server.model, theirs.server.model
    statistics = [key for key in model if "running_" in key or key.endswith("num_batches_tracked")]
    assert statistics
    assert all(torch.equal(model[key], other[key]) for key in statistics)
    if average == "layer":
        # A bias before a normalisation has no gradient; what client 1 alone owns moves by its own steps.
        both = model.keys() - {*statistics, "fc1.bias", "fc2.weight", "fc2.bias"}
        assert all(not torch.allclose(model[key], other[key], rtol=1e-6, atol=1e-9) for key in both)
        toy.close({"fc2.weight": model["fc2.weight"]}, {"fc2.weight": other["fc2.weight"]}, 1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_effective_steps_are_what_momentum_adds_up_to(rho: float, steps: int) -> None:
    """Catches the geometric sum with one step too many; Adam's count is the plain one."""
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=rho)
    for _ in range(steps):
        optimizer.zero_grad()
        (-weight).sum().backward()
        optimizer.step()
    assert effective_steps(LocalSGD(steps=steps, momentum=rho), steps) == pytest.approx(weight.item(), rel=1e-12)
    assert effective_steps(LocalSGD(steps=steps, momentum=rho, optimizer="adam"), steps) == steps


@pytest.mark.parametrize("average", AVERAGES)
def test_bytes_are_those_of_the_network(average: Any) -> None:
    """Catches weights sent beside their direction."""
    game = toy.play(federation(FedNova(average=average)), 1)
    for k in range(3):
        floats, counters = numel(k % 2 + 1)
        assert size(game.sent[0][k]).values == size(game.got[0][k]).values == 4 * floats + 8 * counters
        assert game.got[0][k].steps == (6, 4, 4)[k]


def test_uploads_that_would_harm_are_refused() -> None:
    """Catches a direction of a buffer, a weight among buffers, and steps that turn the direction round."""
    game = toy.play(federation(FedNova(average="layer")), 1)
    algorithm, task, info = game.federation.algorithm, game.federation.task, game.federation.info(0)
    down, up = game.sent[0][0], game.got[0][0]
    algorithm.check_upload(task, info, down, up)
    for wrong in (
        replace(up, direction={**up.direction, "bn1.running_mean": up.buffers["bn1.running_mean"]}),
        replace(up, buffers={**up.buffers, "fc.bias": up.direction["fc.bias"]}),
        replace(up, steps=0.0),
        replace(up, steps=-1.0),
    ):
        with pytest.raises(MessageError, match=r"other names|positive number of effective steps"):
            algorithm.check_upload(task, info, down, wrong)
