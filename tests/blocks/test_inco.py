"""InCo Aggregation: the formulas against plain loops, and which layers are a stage's."""

import math
from functools import partial
from typing import Any, get_args

import pytest
import torch
import toy
from layers_by_hand import MAPS
from torch import Tensor, nn

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fednova import FedNova
from polyfed.algorithms.fedprox import FedProx
from polyfed.algorithms.fedrolex import FedRolex
from polyfed.algorithms.heterofl import HeteroFL
from polyfed.algorithms.inclusivefl import InclusiveFL
from polyfed.algorithms.moon import Moon
from polyfed.algorithms.scaffold import Scaffold
from polyfed.algorithms.scalefl import ScaleFL
from polyfed.base.errors import ConfigError, ModelError
from polyfed.blocks.inco import InCo, mixed, references
from polyfed.blocks.layerwise import Average
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(g_k: list[float], g_0: list[float], form: str) -> list[float]:
    """U_k of one vector, number by number."""
    a = sum(x * x for x in g_0)
    b = sum(x * y for x, y in zip(g_0, g_k, strict=True))
    n_0, n_k = math.sqrt(a), math.sqrt(sum(x * x for x in g_k))
    u = []
    for x, y in zip(g_k, g_0, strict=True):
        if form == "paper":
            u.append((x / n_k - b / a * y / n_0) * (n_k + n_0) / 2)
        else:
            value = (x / n_k + min(abs(b) / (a + 1e-7), 5) * y / n_0) * (n_k + n_0) / 2
            u.append(max(-0.1, min(0.1, value)))
    return u


@pytest.mark.parametrize("scale", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("opposed", [True, False])
def test_the_papers_form_is_its_formula_for_each_tensor(opposed: bool, scale: float) -> None:
    """Catches another sign, a step for one sign of b only, norms left out, and a formula for each kernel."""
    g_0, g_k = draw(1, 3, 3, 3, 3), draw(2, 3, 3, 3, 3) * scale
    if (float((g_0 * g_k).sum()) < 0) is not opposed:
        g_k = -g_k
    found = mixed({"k": g_k, "0": g_0, "other": g_k}, {"k": "0"})
    expected = by_hand(g_k.flatten().tolist(), g_0.flatten().tolist(), "paper")
    assert found["k"].flatten().tolist() == pytest.approx(expected, rel=1e-10)
    assert torch.equal(found["0"], g_0)
    assert torch.equal(found["other"], g_k)


@pytest.mark.parametrize("scale", [0.02, 0.2, 20.0])
def test_the_released_form_is_its_formula_for_each_kernel(scale: float) -> None:
    """Catches the paper's sign, a missing cap or clamp, and a formula for the whole tensor."""
    g_0, g_k = draw(3, 3, 4, 3, 3) * 0.02, draw(4, 3, 4, 3, 3) * 0.02 * scale
    found = mixed({"k": g_k, "0": g_0}, {"k": "0"}, "released")["k"]
    for o in range(3):
        for i in range(4):
            expected = by_hand(g_k[o, i].flatten().tolist(), g_0[o, i].flatten().tolist(), "released")
            assert found[o, i].flatten().tolist() == pytest.approx(expected, rel=1e-9)
    if scale == 20.0:
        assert float(found.abs().max()) == 0.1
        ratio = (g_0 * g_k).sum((2, 3)).abs() / (g_0 * g_0).sum((2, 3))
        assert bool((ratio > 5).any())


@pytest.mark.parametrize("form", ["paper", "released"])
def test_what_did_not_move_moves_nothing(form: str) -> None:
    """Catches 0 / 0, a layer without owner that moves, and an update that a dead reference halves."""
    g, zero = draw(5, 2, 2, 3, 3) * 0.01, torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    assert torch.equal(mixed({"k": zero, "0": g}, {"k": "0"}, form)["k"], zero)  # type: ignore[arg-type]
    assert torch.equal(mixed({"k": g, "0": zero}, {"k": "0"}, form)["k"], g)  # type: ignore[arg-type]
    assert mixed({"k": g}, {"k": "0", "x": "k"}, form) == {"k": g}  # type: ignore[arg-type]


def image(spec: str) -> SplitModel:
    return build(spec, input_shape=(3, 32, 32), num_classes=10)


def test_the_layers_of_the_family_are_those_of_the_card() -> None:
    """Catches block 0, shortcuts, stem or norms that are mixed, and references that are not block 0's second layer."""
    found = references(image("in-resnet26"))
    expected = {
        f"layer{stage}.{block}.conv{conv}.weight": f"layer{stage}.0.conv2.weight"
        for stage in (1, 2, 3, 4)
        for block in (1, 2)
        for conv in (1, 2)
    }
    assert found == expected
    assert references(image("in-resnet10")) == {}
    assert set(references(image("in-resnet14"))) == {n for n in expected if n[:8] in ("layer3.1", "layer4.1")}
    assert references(image("in-resnet26"), ["layer2"]) == {k: r for k, r in expected.items() if k.startswith("layer2")}


class Straight(nn.Module):
    """Convolutions in a row, without names for stages; the second pair works on smaller maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 4, 3, padding=1)
        self.late = nn.Conv1d(4, 4, 3, padding=1)
        self.b = nn.Conv1d(4, 4, 3, padding=1)
        self.c = nn.Conv1d(4, 4, 3, padding=1, stride=2)
        self.d = nn.Conv1d(4, 4, 3, padding=1)
        self.e = nn.Conv1d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, T) -> (B, 3)."""
        x = self.d(self.c(self.late(self.b(self.a(x)))))
        return self.fc(self.e(x).mean(2))


class Turned(Straight):
    """The same, but ``late`` runs before ``b``."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(self.c(self.b(self.late(self.a(x)))))
        return self.fc(self.e(x).mean(2))


def straight() -> SplitModel:
    return SplitModel("straight", Straight, input_shape=(2, 8), classifier="fc")


def test_without_names_stages_are_layers_of_one_shape_and_size_in_the_order_of_the_forward() -> None:
    """Catches the order of registration, another size of maps or of kernels in a stage, and 2-D alone."""
    assert references(straight()) == {"late.weight": "b.weight", "d.weight": "c.weight"}


def test_all_stages_that_there_are_not_are_told_at_once() -> None:
    with pytest.raises(ModelError, match=r"'layer7', 'fc'.*in-resnet18"):
        references(image("in-resnet18"), ["layer1", "layer7", "fc"])


def test_a_family_has_the_references_of_its_deepest_network() -> None:
    """Catches references of the first network alone, and an option that mixes although it is off."""
    family = {name: image(name) for name in ("in-resnet10", "in-resnet14", "in-resnet18")}
    assert InCo(inco="paper").mixes(family) == references(family["in-resnet18"])
    assert InCo().mixes(family) == {}
    with pytest.raises(ModelError, match=r"in-resnet10.*deeper"):
        InCo(inco="paper").mixes({"in-resnet10": family["in-resnet10"]})


def test_networks_that_disagree_on_a_reference_are_refused() -> None:
    """Catches the silent choice of one of them."""

    other = SplitModel("turned", Turned, input_shape=(2, 8), classifier="fc")
    assert references(other)["b.weight"] == "late.weight"

    class Third(Straight):
        def forward(self, x: Tensor) -> Tensor:
            x = self.d(self.c(self.late(self.e(self.b(self.d(self.a(x)))))))
            return self.fc(x.mean(2))

    third = SplitModel("third", partial(Third), input_shape=(2, 8), classifier="fc")
    with pytest.raises(ModelError, match=r"'late.weight'.*'b.weight' in 'one'.*'d.weight' in 'three'"):
        InCo(inco="paper").mixes({"one": straight(), "three": third})


def test_the_mean_is_mixed_where_there_is_a_reference_and_kept_elsewhere() -> None:
    """Catches changes that are weights, weights that are changes, and layers that leave the mean."""
    before = {n: draw(k, 2, 2, 3) for k, n in enumerate(("0", "k", "fc"))} | {"n": torch.tensor(3)}
    mean = {n: v + draw(k + 9, *v.shape) if n != "n" else v + 1 for k, (n, v) in enumerate(before.items())}
    found = InCo(inco="paper").incorporated(before, mean, {"k": "0"})
    expected = before["k"] + mixed({n: mean[n] - before[n] for n in ("k", "0")}, {"k": "0"})["k"]
    assert torch.allclose(found["k"], expected, rtol=1e-12)
    assert all(found[n] is mean[n] for n in ("0", "fc", "n"))
    assert InCo().incorporated(before, mean, {"k": "0"}) is mean


def small(cls: Any, models: tuple[str, ...] = MAPS, **keys: Any) -> Any:
    return pytest.param(cls, models, keys, id="-".join((cls.name, *map(str, keys.values()))))


@pytest.mark.parametrize(
    ("cls", "models", "keys"),
    [
        *(small(FedAvg, MAPS[1:] if average == "all" else MAPS, average=average) for average in get_args(Average)),
        *(small(cls, average="layer") for cls in (FedProx, Scaffold, FedNova, Moon)),
        small(InclusiveFL),
        *(small(cls, MAPS[1:]) for cls in (HeteroFL, FedRolex)),
        small(ScaleFL, MAPS[1:], exits=("stage1",)),
    ],
)
def test_every_layerwise_mean_is_mixed_after_it_is_taken(cls: Any, models: tuple[str, ...], keys: Any) -> None:
    """Catches an algorithm that takes the key and mixes nothing, other layers or changes of another start."""

    def play(form: Any) -> tuple[Any, Any]:
        capacities = {"capacities": [1.0, 0.5]} if len(models) == 1 and "average" not in keys else {}
        fed = toy.federation(
            cls(inco=form, **keys),
            models=models,
            shape=(2, 6, 6),
            sizes=(8, 5),
            train={"epochs": 1},
            clients=capacities,
        )
        fed.algorithm.check(fed.task)
        game = toy.play(fed)
        before = game.server.model
        return before, game.round().server

    before, mean = play("none")
    again, mixed_ = play("paper")
    assert all(torch.equal(before[key], again[key]) for key in before)
    assert mean.mixes == {}
    prefix = {"architecture": f"{models[-1]}: "}.get(keys.get("average"), "net." if cls is ScaleFL else "")
    deeper = {f"{prefix}stage2.{block}.0.weight": f"{prefix}stage2.0.0.weight" for block in (1, 2)}
    assert mixed_.mixes == deeper
    changes = {key: mean.model[key] - before[key] for key in {*deeper, *deeper.values()}}
    expected = mixed(changes, deeper)
    for key, value in mixed_.model.items():
        if key not in deeper:
            assert torch.equal(value, mean.model[key]), key
            continue
        assert torch.allclose(value, before[key] + expected[key], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(value, mean.model[key], rtol=1e-3)


@pytest.mark.parametrize("cls", [FedAvg, Moon, HeteroFL])
def test_networks_without_layers_to_mix_are_refused_before_the_run(cls: Any) -> None:
    """Catches InCo that is asked for and does nothing; a transformer's blocks have no convolutions of one shape."""
    vit = "vit(patch=8, width=8, depth=2, heads=2)"
    for models, shape in (((toy.MLP,), (7,)), ((vit,), (1, 16, 16)), ((MAPS[0],), (2, 6, 6))):
        fed = toy.federation(cls(inco="paper"), models=models, shape=shape)
        with pytest.raises(ModelError, match=r"algorithm\.inco mixes convolutions .* choose deeper networks"):
            fed.algorithm.check(fed.task)


@pytest.mark.parametrize("cls", [FedNova, InclusiveFL, FedRolex, ScaleFL])
def test_stages_without_a_mixture_are_refused(cls: Any) -> None:
    with pytest.raises(ConfigError, match=r"inco_stages: got \('stage2',\).*mixes nothing; leave it at \(\)"):
        cls(inco_stages=("stage2",))


def test_architectures_that_are_apart_may_differ_in_their_references() -> None:
    """Catches references compared between networks that share no key."""
    models = {"one": straight(), "three": SplitModel("t", Turned, input_shape=(2, 8), classifier="fc")}
    apart = InCo(inco="paper").mixes(models, lambda k: {name: f"{k}: {name}" for name in models[k].shapes})
    assert apart["one: late.weight"] == "one: b.weight"
    assert apart["three: b.weight"] == "three: late.weight"
    assert {key.partition(":")[0] for key in (*apart, *apart.values())} == {"one", "three"}
