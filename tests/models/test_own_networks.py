"""Networks as users write them train rightly, or are refused with the cause, the place and the mend."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_nets
import pytest
import torch
import toy
from torch import Tensor, nn

from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.config import load_algorithm
from polyfed.core.algorithm import Algorithm
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build
from polyfed.rounds.federation import check_networks

FEATURES = (12,)
PLAYED = ("standalone", "fedavg", "fedmrl", "fedproto")


def own(spec: str, shape: tuple[int, ...] = FEATURES) -> SplitModel:
    return build(f"own_nets:{spec}", input_shape=shape, num_classes=4)


def algorithm(name: str) -> Algorithm:
    assert name in ALGORITHMS
    return load_algorithm(name, {"rep_dim": 4, "auxiliary": "mlp(hidden=(8,))"} if name == "fedmrl" else {})


def both_drivers(name: str, spec: str, shape: tuple[int, ...]) -> None:
    """Assert that both drivers end with the same losses, and after two rounds of FedAvg with the same moved weights."""
    spec = f"{spec}(classifier=head)" if "(" not in spec else spec
    games = [
        toy.play(toy.federation(algorithm(name), models=(spec,), shape=shape), 1 + (name == "fedavg"), driver=driver)
        for driver in ("sequential", "batched")
    ]
    losses = [[r.work.loss for played in game.played for r in played.reports.values()] for game in games]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert all(loss is not None and math.isfinite(loss) for loss in losses[0])
    if name == "fedavg":
        model = games[0].federation.own(0)
        first = games[0].federation.algorithm.init_server(model_task(games[0]), games[0].federation.rng.at("server"))
        for n in model.parameter_names:  # a bias before BatchNorm has no gradient
            assert (
                n.endswith("bias") or n.startswith("spare") or not torch.equal(games[0].server.model[n], first.model[n])
            )  # type: ignore[attr-defined]
        for n, value in games[0].server.model.items():
            torch.testing.assert_close(games[1].server.model[n], value, rtol=1e-3, atol=1e-4)


def model_task(game: toy.Game):  # type: ignore[no-untyped-def]
    return game.federation.task


@pytest.mark.parametrize("name", PLAYED)
@pytest.mark.parametrize("net", [net.__name__ for net in own_nets.TRAIN])
def test_networks_that_train(net: str, name: str) -> None:
    both_drivers(name, f"own_nets:{net}", FEATURES)


@pytest.mark.parametrize(("spec", "cause", "mend"), own_nets.REFUSED, ids=[case[0] for case in own_nets.REFUSED])
def test_networks_that_are_refused(spec: str, cause: str, mend: str) -> None:
    with pytest.raises(ModelError) as error:
        own(spec)
    assert cause in str(error.value)
    assert mend in str(error.value)


@pytest.mark.parametrize("net", ["Own", "Counting", "Cached", "SpectralNorm", "Normed"])
def test_a_client_alone_does_not_depend_on_the_data_of_others(net: str) -> None:
    """Catches state that leaks from client to client through the single module that serves them all."""
    losses: list[float | None] = []
    for seed in (0, 1):
        fed = toy.federation(algorithm("standalone"), models=(f"own_nets:{net}",), shape=FEATURES)
        x = fed.dataset.x.clone()
        rows = torch.tensor(fed.partition.train(1))
        x[rows] += torch.randn(x[rows].shape, generator=torch.Generator().manual_seed(seed))
        game = toy.play(replace(fed, dataset=replace(fed.dataset, x=x)), 2)
        losses.append(game.played[-1].reports[0].work.loss)
    assert losses[0] == losses[1]


def test_caches_of_shapes_are_allowed_but_not_stacked() -> None:
    model = own("Cached")
    assert model.caches
    assert not model.random
    assert not own("Own").caches
    fed = toy.federation(algorithm("fedavg"), models=("own_nets:Cached",), shape=FEATURES)
    assert toy.play(fed, 1, driver="batched").driver.paths == {"sequential": 3}


@pytest.mark.parametrize("cut", ["", "(classifier=head)"])
def test_a_buffer_moves_under_a_cut_as_without(cut: str) -> None:
    """Catches a moving average that a cut loses, as nothing uses its result."""
    model, x = own(f"Counting{cut}"), torch.randn(6, 12, generator=Rng((3,)).torch())
    params = model.init(Rng((0,)))
    model.train(True)
    if cut:
        model.classify(params, model.represent(params, x))
    else:
        model(params, x)
    model.train(False)
    hidden = torch.relu(nn.functional.linear(x, params["first.weight"], params["first.bias"]))
    torch.testing.assert_close(params["seen"], 0.1 * hidden.mean(0))


@pytest.mark.parametrize("driver", ["sequential", "batched"])
@pytest.mark.parametrize("name", ["fedavg", "fiarse", "fedkd"])
def test_a_buffer_of_truth_values_is_averaged(name: str, driver: str) -> None:
    """Catches a difference of truth values, which torch does not take, and one of another type than what was sent."""
    spec = "own_nets:Switches(classifier=head)"
    made = load_algorithm(name, {"auxiliary": spec} if name == "fedkd" else {})
    game = toy.play(toy.federation(made, models=(spec,), shape=FEATURES), 1, driver=driver)
    server: Any = game.server
    (on,) = (value for n, value in (server.G if name == "fedkd" else server.model).items() if n == "switch.on")
    assert on.tolist() == [False] + 7 * [True]


# --------------------------------------------------------------------------------------------------------- notes


def test_what_a_user_should_know_is_said() -> None:
    assert own("Own").notes == []
    (optional,) = own("Optional").notes
    assert "Optional.forward(x, mask) gets its first input alone, and 'mask' the default" in optional
    (moving,) = own("MovingFrozen").notes
    assert "the parameters of 'norm' are frozen, but training moves the running statistics" in moving
    assert own("FrozenFirst").notes == []
    (alone,) = own("BatchOnly").notes
    assert "fails on a batch of one example in evaluation mode (ValueError: Expected more than 1 value" in alone
    assert own("Leaves").notes == []
    (few,) = own("Few").notes
    assert few.endswith(
        "fails on a training batch of two examples (ValueError: four or more (Few, own_nets.py, line "
        + few.rpartition(" ")[2]
    )
    (unused,) = own("Unused").notes
    assert "'spare.bias', 'spare.weight' got no gradient in a test" in unused
    assert "with requires_grad_(False) it would not travel" in unused


# -------------------------------------------------------------------------------------------------------- frozen


def test_frozen_tensors_are_constants_of_the_network() -> None:
    model = own("FrozenFirst(classifier=head)")
    assert set(model.shapes) == {"head.weight", "head.bias"}
    assert {"first.0.weight", "first.1.running_mean", "first.1.num_batches_tracked"} <= set(model.constants)
    assert set(model.init(Rng((0,)))) == set(model.shapes)
    before = {name: value.clone() for name, value in model.constants.items()}
    toy.play(toy.federation(algorithm("fedavg"), models=("own_nets:FrozenFirst(classifier=head)",), shape=FEATURES), 2)
    assert all(torch.equal(value, before[name]) for name, value in model.constants.items())


def test_frozen_tensors_do_not_travel() -> None:
    sizes = {
        net: sum(
            report.up.values
            for report in toy.play(toy.federation(algorithm("fedavg"), models=(f"own_nets:{net}",), shape=FEATURES), 1)
            .played[0]
            .reports.values()
        )
        for net in ("Own", "FrozenFirst")
    }
    assert sizes["Own"] == 3 * 4 * (12 * 8 + 8 + 8 * 4 + 4)
    assert sizes["FrozenFirst"] == 3 * 4 * (8 * 4 + 4)


def test_constants_follow_the_weights_to_their_device() -> None:
    """Catches a backbone that stays on the CPU while the head is on a GPU; the device meta stands for one."""
    model = own("FrozenFirst")
    here = model.init(Rng((0,)))
    there = {name: value.to("meta") for name, value in here.items()}
    assert model(there, torch.zeros(2, 12, device="meta")).device.type == "meta"
    assert model(here, torch.zeros(2, 12)).device.type == "cpu"


def test_constants_have_the_precision_of_the_run() -> None:
    """Catches a backbone of float32 under weights and inputs of float64."""
    games = {
        precision: toy.play(
            toy.federation(algorithm("fedavg"), models=("own_nets:FrozenFirst",), shape=FEATURES),
            1,
            driver=driver,
            precision=precision,  # type: ignore[arg-type]
        )
        for precision in ("fp32", "fp64", "bf16")
        for driver in ("sequential", "batched")
    }
    assert games["fp64"].server.model["head.weight"].dtype == torch.float64
    losses = [game.played[0].reports[0].work.loss for game in games.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.1)


def test_the_constants_digest_tells_weights_apart() -> None:
    one, two = own("FrozenFirst"), own("Whole")
    assert own("Own").constants_digest == ""
    assert one.constants_digest == own("FrozenFirst(classifier=head)").constants_digest != two.constants_digest


# -------------------------------------------------------------------------------------------------- batches of one


def refused_alone(spec: str, name: str = "fedavg", **more: object) -> str:
    from polyfed.rounds.federation import check_single_examples

    keys = {"auxiliary": "mlp(hidden=(8,))"} if name == "fedapen" else {}
    fed = toy.federation(load_algorithm(name, keys), models=(spec,), shape=FEATURES, **more)  # type: ignore[arg-type]
    with pytest.raises(ModelError) as error:
        check_single_examples(fed)
    return str(error.value)


def test_batchnorm_on_a_batch_of_one_is_refused_before_the_run() -> None:
    """Catches torch's ValueError in the middle of a run; clients with two examples or more are no matter."""
    text = refused_alone("own_nets:Normed", sizes=(5, 1, 9, 1))
    assert "cannot train on a batch of one example (ValueError: Expected more than 1 value per channel" in text
    assert "clients 1, 3 would have such batches" in text
    assert "partition.min_samples" in text
    assert "clients 0, 1" in refused_alone("own_nets:Normed", sizes=(5, 4), train={"batch_size": 1})
    toy.play(toy.federation(algorithm("fedavg"), models=("own_nets:Own",), shape=FEATURES, sizes=(5, 1)), 1)
    held_out = refused_alone("own_nets:Normed(classifier=head)", "fedapen", sizes=(5, 2))
    assert "client 1 would have such batches" in held_out
    # The last batch of nine rows would have one row, and is left out.
    toy.play(toy.federation(algorithm("fedavg"), models=("own_nets:Normed",), shape=FEATURES, sizes=(9, 5)), 1)


# ------------------------------------------------------------------------------------------------ faults in a run


class Fragile(own_nets.Own):
    """Fails on data that the probe did not have."""

    def features(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            raise IndexError("three is too much")
        return super().features(x)


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_a_fault_on_the_data_names_the_client_and_the_line(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_nets, "Fragile", Fragile, raising=False)
    fed = toy.federation(algorithm("fedavg"), models=("own_nets:Fragile",), shape=FEATURES, sizes=(8, 7, 7))
    with pytest.raises(ModelError) as error:
        toy.play(fed, 1, driver=driver)
    assert "client 1, round 1, a batch of 3: its network fails on its data: IndexError: three" in str(error.value)
    assert "(Fragile, test_own_networks.py, line " in str(error.value)


# -------------------------------------------------------------------------------------------------------- einops

EINOPS = """
import torch

def rearrange(tensor, pattern, **sizes):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"Tensor type unknown to einops {type(tensor)}")
    return tensor.reshape(tensor.shape[0], -1)
"""
NETS = """
import torch
from torch import nn
import {module}
from {module} import rearrange

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.head = nn.Linear(8, num_classes)
    def forward(self, x):
        h = self.first(x)
        b, c = h.shape
        h = {call}(h.reshape(b, 2, c // 2), "b c d -> b (c d)", c=2)
        return self.head(h)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - kept:
        sys.modules.pop(name)


@pytest.mark.parametrize("call", ["rearrange", "einops.rearrange"])
def test_einops_works_under_a_cut(call: str, folder: Path) -> None:
    (folder / "einops.py").write_text(EINOPS)
    name = f"einops_nets_{call.replace('.', '_')}"
    (folder / f"{name}.py").write_text(NETS.format(module="einops", call=call))
    model = build(f"{name}:Net(classifier=head)", input_shape=FEATURES, num_classes=4)
    params, x = model.init(Rng((0,))), torch.randn(5, 12)
    assert torch.equal(model.classify(params, model.represent(params, x)), model(params, x))


def test_the_advice_fits_other_functions_that_take_no_symbols(folder: Path) -> None:
    (folder / "my_shapes.py").write_text(EINOPS)
    (folder / "shaped_nets.py").write_text(NETS.format(module="my_shapes", call="rearrange"))
    with pytest.raises(ModelError, match=r"unknown to einops.*Net, shaped_nets\.py, line 15\)\); .*@torch\.fx\.wrap"):
        build("shaped_nets:Net(classifier=head)", input_shape=FEATURES, num_classes=4)
    text = (folder / "shaped_nets.py").read_text().replace("class Net", "torch.fx.wrap('rearrange')\n\nclass Net")
    (folder / "wrapped_nets.py").write_text(text)
    assert build("wrapped_nets:Net(classifier=head)", input_shape=FEATURES, num_classes=4).rep_dim == 8


# ------------------------------------------------------------------------------------------------- the examples


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[Path]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from own_networks import Backbone
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(Backbone().state_dict(), tmp_path / "backbone.safetensors")
    yield tmp_path / "backbone.safetensors"
    sys.modules.pop("own_networks")


@pytest.mark.parametrize("name", PLAYED)
@pytest.mark.parametrize("net", ["Pretrained", "Gru", "Convolutions", "Transformer"])
def test_the_examples_train(net: str, name: str, examples: Path) -> None:
    spec = f"own_networks:{net}(classifier=head" + (f", weights='{examples}')" if net == "Pretrained" else ")")
    both_drivers(name, spec, (1, 8, 8))


def test_a_pretrained_backbone_is_what_the_file_holds(examples: Path) -> None:
    from safetensors.torch import load_file

    spec = f"own_networks:Pretrained(classifier=head, weights='{examples}')"
    model = build(spec, input_shape=(1, 8, 8), num_classes=4)
    assert set(model.shapes) == {"head.weight", "head.bias"}
    held = load_file(examples)
    assert all(torch.equal(model.constants[f"backbone.{name}"], value) for name, value in held.items())


def test_an_embedding_of_tokens_trains(examples: Path) -> None:
    """Tokens are int64, which the probe must feed."""
    spec = "own_networks:Tokens(vocabulary=20, classifier=head)"
    model = build(spec, input_shape=(6,), num_classes=4, dtype=torch.int64)
    assert (model.rep_dim, model.num_classes) == (32, 4)
    with pytest.raises(
        ModelError, match=r"shape \(2, 6\) and type float32: RuntimeError: Expected tensor for argument"
    ):
        build(spec, input_shape=(6,), num_classes=4)
    x, y = torch.randint(0, 20, (16, 6), generator=Rng((1,)).torch()), torch.arange(16) % 4
    params = {name: value.requires_grad_() for name, value in model.init(Rng((0,))).items()}
    losses: list[float] = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model.classify(params, model.represent(params, x)), y)
        grads = torch.autograd.grad(loss, list(params.values()))
        with torch.no_grad():
            for value, g in zip(params.values(), grads, strict=True):
                value -= 1.0 * g
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


#: Of the algorithms that need a classifier by a key, the keys with which they need none.
BY_A_KEY: dict[str, dict[str, Any]] = {
    "heterofl": {"own_rows": False},
    "fedrolex": {"own_rows": False},
    "inclusivefl": {"own_classifier": False},
    "fedl2g": {"warmup": 0},
}


def _needs() -> dict[str, str]:
    """By algorithm what docs/models.md says that it needs."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = page.split("| needs | algorithms |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    words = {part.split()[0]: needs for needs, names in cells for part in re.split("[,;] | and ", names)}
    return {name.strip("`").lower(): needs for name, needs in words.items() if name != "unless"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_says_which_algorithms_need_a_classifier(name: str) -> None:
    """Catches an algorithm that is refused only after its run has begun, and one that the page leaves out."""
    needs = _needs()
    assert {*needs} == {*ALGORITHMS}
    assert {name for name, what in needs.items() if "by a key" in what} == {*BY_A_KEY}
    if name == "fedmrl-ssl":  # which takes images and signals alone
        return
    refused = pytest.raises(ModelError, match="has no classifier cut")
    cases: list[tuple[str, dict[str, Any]]] = [("own_nets:Own", {})]
    if "auxiliary" in vars(load_algorithm(name, {})):
        private = "own_nets:Own" if needs[name] == "neither" else "own_nets:Own(classifier=head)"
        cases = [("own_nets:Own", {"auxiliary": "mlp"})]
        if "fedmrl" not in name:  # whose small network takes an option
            cases.append((private, {"auxiliary": "own_nets:Own"}))
    for spec, keys in cases:
        made = load_algorithm(name, {**BY_A_KEY.get(name, {}), **keys})
        fed = toy.federation(made, models=(spec,), shape=FEATURES)
        if needs[name] == "neither" or name in BY_A_KEY:
            check_networks(made, fed.task)
            toy.play(fed, 1)
        else:
            with refused:
                check_networks(made, fed.task)
