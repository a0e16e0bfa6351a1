"""One round of FedMRL without labels against a loop written from its equations, on images and on signals."""

from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
import toy
from auxiliary_by_hand import AUXILIARY, DRIVERS, MODELS, SETTINGS, SIZES, TRAIN, WIDTHS, forward, leaves, privates
from torch import Tensor

from polyfed.algorithms.fedmrl_ssl import FedMRLSSL
from polyfed.blocks.views import draw_views
from polyfed.rounds.federation import Federation

SHAPES = {"image": (3, 6, 5), "signal": (3, 8), "signal, channels last": (8, 3)}


def start(algorithm: FedMRLSSL, kind: str, driver: str) -> toy.Game:
    """Three clients with images, or with signals."""
    train = {**TRAIN, "epochs": 1}
    fed = toy.federation(algorithm, models=MODELS, sizes=SIZES, shape=(3, 6, 5), train=train, augment=False)
    shape = SHAPES[kind]
    if len(shape) == 2:
        x = torch.randn(len(fed.dataset), *shape, generator=torch.Generator().manual_seed(0))
        data = replace(fed.dataset, x=x, mean=(), std=(), declared="series", channels_first=kind == "signal")
        fed = Federation(fed.config, data, fed.partition, algorithm)
    return toy.play(fed, driver=driver, precision="fp64")


def by_hand(x: Tensor, drawn: dict[str, Tensor], kind: str) -> Tensor:
    """Both views, example by example."""
    found = []
    for which in (0, 1):
        for i, example in enumerate(x):
            gain, bias = drawn["gain"][which, i], drawn["bias"][which, i]
            if kind == "image":
                view = example[:, drawn["axis-2"][which, i]][:, :, drawn["axis-3"][which, i]]
                view = view * gain[:, None, None] + bias[:, None, None]
                if drawn["grey"][which, i, 0]:
                    view = ((view[0] + view[1] + view[2]) / 3).repeat(3, 1, 1)
            elif kind == "signal":
                view = example[:, drawn["axis-2"][which, i]] * gain[:, None] + bias[:, None] + drawn["noise"][which, i]
            else:
                view = example[drawn["axis-1"][which, i]] * gain + bias + drawn["noise"][which, i]
            found.append(view)
    return torch.stack(found)


def simclr(z: Tensor, temperature: float) -> Tensor:
    """Row by row."""
    z = z / z.norm(dim=1, keepdim=True)
    half, total = len(z) // 2, torch.zeros(())
    for i in range(len(z)):
        e = {j: torch.exp(z[i] @ z[j] / temperature) for j in range(len(z)) if j != i}
        total = total - torch.log(e[(i + half) % len(z)] / torch.stack([*e.values()]).sum())
    return total / len(z)


def barlow(z: Tensor, weight: float) -> Tensor:
    """Number by number."""
    a, b = ((v - v.mean(0)) / (v.var(0, correction=0) + 1e-6).sqrt() for v in z.chunk(2))
    total = torch.zeros(())
    for i in range(a.shape[1]):
        for j in range(a.shape[1]):
            c = (a[:, i] * b[:, j]).mean()
            total = total + ((1 - c) ** 2 if i == j else weight * c**2)
    return total / a.shape[1]


def fedmrl_ssl(cls: type[FedMRLSSL], kind: str = "image", driver: str = "sequential", **keys: Any) -> None:
    """One round of it is one by hand."""
    algorithm = cls(auxiliary=AUXILIARY, rep_dim=5, head_dim=4, weights=(0.5, 2.0), grey=0.5, **keys)
    game = start(algorithm, kind, driver)
    before, theta = privates(game), toy.copy(game.server.G)
    game.round()
    sent = []
    for k in range(3):
        begun = theta if algorithm.share else before[k].G
        G, F, P, H = (leaves(part) for part in (begun, before[k].F, before[k].P, before[k].H))  # noqa: N806
        params = [tensor for part in (G, F, P, H) for tensor in part.values()]
        optimizer, local = SETTINGS.optimizer(params), game.local(k)
        with game.driver.placement.defaults():
            for step in local.plan.schedule(len(local.train), local.rng.at("batches")):
                x, _ = local.train.batch(step.rows, dtype=torch.float64)
                x = by_hand(x, draw_views(algorithm, SHAPES[kind], kind == "signal", local.rng, step), kind)
                small, large = forward(G, x.flatten(1), 2), forward(F, x.flatten(1), len(WIDTHS[k]))
                fused = torch.cat([small, large], 1) @ P["fc1.weight"].T + P["fc1.bias"]
                coarse = fused[:, :5] @ G["fc3.weight"].T + G["fc3.bias"]
                fine = fused @ H["fc1.weight"].T + H["fc1.bias"]
                loss, key = (simclr, 0.5) if algorithm.contrast == "simclr" else (barlow, 0.005)
                total = 0.5 * loss(coarse, key) + 2.0 * loss(fine, key)
                grads = torch.autograd.grad(total, params, materialize_grads=True, allow_unused=True)
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
                optimizer.step()
        trained = [{n: v.detach() for n, v in part.items()} for part in (G, F, P, H)]
        for name, expected in zip("FPH", trained[1:], strict=True):
            toy.close(getattr(game.private(k), name), expected, 1e-9)
        toy.close(game.private(k).G, {} if algorithm.share else trained[0], 1e-9)
        sent.append(trained[0])
    toy.close(game.server.G, plain.mean(sent, SIZES) if algorithm.share else {}, 1e-9)


@DRIVERS
@pytest.mark.parametrize("kind", SHAPES)
def test_rounds_are_those_of_the_equations(kind: str, driver: str) -> None:
    fedmrl_ssl(FedMRLSSL, kind, driver)


@pytest.mark.parametrize("keys", [{"contrast": "barlow"}, {"share": False}], ids=str)
def test_the_other_loss_and_the_control_are_those_of_the_equations(keys: dict[str, Any]) -> None:
    fedmrl_ssl(FedMRLSSL, **keys)


class SliceOfTheInput(FedMRLSSL):
    """The coarse part is G's representation, not the first numbers of the fused one."""

    def loss(self, nets: Any, batch: Any) -> Tensor:
        class Bypassed:
            def classify(self, _: Tensor) -> Tensor:
                return nets["G"].classify(nets["G"].represent(self.x))

            def represent(self, x: Tensor) -> Tensor:
                self.x = x
                return nets["G"].represent(x)

        return super().loss({**nets, "G": Bypassed()}, batch)  # type: ignore[dict-item]


def test_a_coarse_part_that_is_not_fused_is_seen() -> None:
    with pytest.raises(AssertionError):
        fedmrl_ssl(SliceOfTheInput)
