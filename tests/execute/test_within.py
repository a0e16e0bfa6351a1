"""Training of some coordinates alone: the numbers of training whole tensors whose other coordinates are held."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fits import FP64, PLANS, Data, check, model, normed, request
from torch import Tensor, nn
from torch.nn import functional

from polyfed.base.rng import Rng
from polyfed.base.types import Parts
from polyfed.blocks.losses import supervised
from polyfed.core.clients import ClientInfo, LocalClient
from polyfed.core.net import Batch
from polyfed.core.plan import LocalSGD
from polyfed.core.requests import Fit, fit
from polyfed.execute.local_training import run_fit
from polyfed.execute.stacked import kind_of, replayable, run_stacked, signature
from polyfed.models.split import SplitModel

MASKED = ("fc1.weight", "fc2.weight", "fc2.bias")


def some(parts: Parts, seed: int = 0) -> Parts:
    """Half of the coordinates of all dense layers, others for each seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parts["model"][name].shape for name in MASKED}
    order = {name: torch.randperm(shape.numel(), generator=generator) for name, shape in shapes.items()}
    return {"model": {n: (order[n] < shape.numel() // 2).reshape(shape) for n, shape in shapes.items()}}


def held_by_hand(asked: Fit, masks: Parts) -> dict[str, Tensor]:
    """The same training of whole tensors: gradients are masked, and after each step the rest is put back."""
    plan, module = asked.client.plan, normed().double()
    module.load_state_dict(dict(asked.parts["model"]))
    params = dict(module.named_parameters())
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer: Any = (
        torch.optim.SGD(module.parameters(), plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay)
        if plan.optimizer == "sgd"
        else adam[plan.optimizer](module.parameters(), plan.lr, weight_decay=plan.weight_decay)
    )
    for step in plan.schedule(len(asked.client.train), asked.client.rng.at("batches")):
        x, y = asked.client.train.batch(step.rows, dtype=torch.float64)
        optimizer.zero_grad()
        functional.cross_entropy(module(x), y).backward()
        for name, mask in masks["model"].items():
            params[name].grad.mul_(mask)  # type: ignore[union-attr]
        if plan.clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), plan.clip)
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks["model"].items():
                params[name].copy_(torch.where(mask, params[name], asked.parts["model"][name]))
    return module.state_dict()


@pytest.mark.parametrize("plan", ["plain", "decay", "clip", "adam with decay", "adamw"])
def test_some_coordinates_train_as_if_the_others_were_held(plan: str) -> None:
    """Catches values in wrong places, a norm over more than they are, and others that move: alone and in a stack."""
    net = model()
    fits = [
        replace(asked, within=some(asked.parts, k))
        for k, n in enumerate((11, 10, 6))
        for asked in [request(PLANS[plan], k=k, n=n, net=net, dtype=torch.float64)]
    ]
    for asked, stacked in zip(fits, run_stacked(fits, FP64), strict=True):
        alone, start = run_fit(asked, FP64).parts, asked.parts["model"]
        check(alone, {"model": held_by_hand(asked, asked.within)}, 1e-11)
        check(stacked.parts, alone, 1e-11)
        for name, mask in asked.within["model"].items():
            for ended in (alone["model"][name], stacked.parts["model"][name]):
                assert torch.equal(ended[~mask], start[name][~mask])
                assert not torch.equal(ended[mask], start[name][mask])


class Kernels(nn.Module):
    """Two convolutions and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


class Images(Data):
    """Examples of 3 x 4 x 5."""

    def __init__(self, n: int) -> None:
        super().__init__(n, 0)
        self.x = torch.randn(n, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_layout_of_kernels_changes_nothing() -> None:
    """Catches places in another order than the memory of the tensor, whose channels may be innermost."""
    net = SplitModel("kernels", Kernels, input_shape=(3, 4, 5), classifier="fc")
    start = {n: v.double() for n, v in net.init(Rng((3,))).items()}
    data: Any = Images(9)
    client = LocalClient(ClientInfo(0), {"model": net}, data, LocalSGD(epochs=2, batch_size=4, lr=0.3), Rng((0,)), 1)
    masks = {n: torch.rand(v.shape, generator=torch.Generator().manual_seed(2)) < 0.4 for n, v in start.items()}
    seen: list[tuple[int, ...]] = []

    def gradient(grad: Any, nets: Any, batch: Batch, due: bool) -> Parts:
        seen.append(tuple(nets["model"]["conv1.weight"].shape))
        return grad(supervised, model={n: 1.0 * v for n, v in nets["model"].params.items()})

    asked: Any = next(fit(client, {"model": start}, gradient=gradient, within={"model": masks}))
    usual, last = (run_fit(asked, replace(FP64, channels_last=way)).parts["model"] for way in (False, True))
    for name, mask in masks.items():
        assert torch.allclose(usual[name], last[name], rtol=1e-11, atol=1e-13)
        assert torch.equal(last[name][~mask], start[name][~mask])
        assert not torch.equal(last[name][mask], start[name][mask])
    assert set(seen) == {(int(masks["conv1.weight"].sum()),)}, "a gradient sees the values alone"


def test_other_coordinates_are_another_kind_only_if_their_number_differs() -> None:
    """Catches a stack of tensors of unlike lengths, a trace of them, and a step that is counted anew each round."""
    asked = request(PLANS["plain"])
    one, other, more = (replace(asked, within={"model": {"fc2.bias": torch.tensor(held)}}) for held in _HELD)
    assert signature(one) == signature(other)
    assert len({signature(fit) for fit in (asked, one, more)}) == 3
    assert kind_of(one) == kind_of(more) != kind_of(asked)
    assert replayable(asked) is not None
    assert replayable(one) is None


def test_a_mask_of_another_shape_is_refused() -> None:
    """Catches a mask that is broadcast in silence."""
    for mask in (torch.tensor([True, False]), torch.ones(4)):
        with pytest.raises(TypeError, match=r"the mask of 'fc2\.bias' has shape"):
            request(PLANS["plain"], within={"model": {"fc2.bias": mask}})


_HELD = ([True, False, False, True], [False, True, True, False], [True, True, True, False])


def test_a_correction_of_whole_tensors_is_refused() -> None:
    """Catches a correction that would be subtracted from the wrong coordinates."""
    asked = request(PLANS["plain"])
    with pytest.raises(TypeError, match="within or correction"):
        request(PLANS["plain"], within=some(asked.parts), correction=asked.parts)
