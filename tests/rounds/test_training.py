"""The plan of a client in a round: schedules, parts, class weights, and settings that differ by client and network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn
from torch.nn import functional

from polyfed.algorithms.catalogue import ALGORITHMS
from polyfed.algorithms.fedkd import FedKD
from polyfed.algorithms.fedmrl import FedMRL
from polyfed.algorithms.standalone import Standalone
from polyfed.base.errors import ConfigError, ModelError
from polyfed.blocks import losses
from polyfed.config import Config, algorithm_class, load_algorithm
from polyfed.core.algorithm import Task
from polyfed.core.net import WeightedBatch
from polyfed.data.dataset import Dataset
from polyfed.execute.choice import Chosen, ExecutionChoice
from polyfed.execute.local_training import run_fit
from polyfed.models.catalogue import ModelSpec
from polyfed.parallel.setup import execution_choice
from polyfed.rounds.federation import check_networks, check_training, plan_of
from polyfed.testing.subject import Subject

NETS = ("mlp(hidden=(12, 6))", "mlp(hidden=(10, 6))")


def config(**train: Any) -> Config:
    return Config.parse({"run": {"rounds": 10}, "train": {"lr": 0.1, **train}})


def rates(settings: Config, round_: int, **own: float) -> dict[str, float]:
    plan = plan_of(settings.train, round_, settings.run.rounds)
    return {part: plan.rate(part, own.get(part)) for part in ("G", "F", "P")}


def test_a_schedule_multiplies_whatever_rate_a_part_has() -> None:
    """Catches a schedule that replaces a rate, and one part's schedule that reaches another."""
    settings = config(
        schedule={"kind": "step", "every": 5, "gamma": 0.5},
        parts={"G": {"lr": 0.4}, "P": {"schedule": "constant"}},
    )
    assert rates(settings, 5, F=0.02) == pytest.approx({"G": 0.4, "F": 0.02, "P": 0.1})
    assert rates(settings, 6, F=0.02) == pytest.approx({"G": 0.2, "F": 0.01, "P": 0.1})
    assert rates(settings, 6, P=0.3)["P"] == pytest.approx(0.3)
    with pytest.raises(ConfigError, match=r"parts\.G\.lr: got 0\.4, but the algorithm gives G a rate of its own"):
        rates(settings, 1, G=0.3)


def test_fedmrl_trains_every_part_at_its_own_rate() -> None:
    """Catches rates of parts that a driver does not pass on to its optimizer."""
    fed = toy.federation(
        FedMRL(auxiliary="mlp(hidden=(5,))", rep_dim=5, lr_private=0.05),
        models=NETS[:1],
        train={"epochs": None, "steps": 1, "schedule": "cosine", "parts": {"G": {"lr": 0.4}, "P": {"lr": 0.2}}},
    )
    moved: dict[int, dict[str, torch.Tensor]] = {}
    for round_ in (1, 3):
        local = replace(fed.local(0, round_), rng=fed.rng)
        steps = fed.algorithm.client_round(fed.private(0, None), fed.algorithm.Broadcast({}), local)  # type: ignore[attr-defined]
        asked = next(steps)
        after = run_fit(asked, toy.make_driver("sequential", toy.Placement(torch.device("cpu"))).placement).parts
        moved[round_] = {
            part: torch.cat([(after[part][n] - v).flatten() for n, v in params.items()])
            for part, params in asked.parts.items()
        }
    shrunk = plan_of(fed.config.train, 3, 3).factor / plan_of(fed.config.train, 1, 3).factor
    assert shrunk == pytest.approx(0.25)
    for part in ("G", "F", "P"):
        assert torch.allclose(moved[3][part], shrunk * moved[1][part], rtol=1e-3, atol=1e-7)
        assert float(moved[1][part].norm()) > 0


def test_the_horizon_is_that_of_the_run_and_stays_when_the_run_goes_on() -> None:
    """Catches rates of rounds that were played already and change as a run is extended."""
    resolved = config(schedule="cosine").resolved()
    assert resolved.train.schedule is not None
    assert resolved.train.schedule.rounds == 10
    longer = resolved.replace("run", rounds=40)
    for round_ in (1, 7, 10):
        assert rates(longer, round_) == rates(resolved, round_)
    assert rates(longer, 40) == rates(longer, 10)
    assert resolved.hash() == config(schedule="cosine").hash()


# -------------------------------------------------------------------------------------------------- class weights


def weights(asked: Any, labels: Any = ((0, 0, 0, 2), (1, 1), (0, 1, 2, 3))) -> torch.Tensor:
    fed = toy.federation(Standalone(), labels=labels, train={"class_weights": asked})
    found = fed.local(0, 1).weights
    assert found is not None
    return found


def test_balanced_weights_are_of_the_clients_own_rows() -> None:
    """Catches other clients' rows, rows of the test, and a weight of infinity for a class that the client lacks."""
    assert weights("balanced").tolist() == pytest.approx([4 / (2 * 3), 1.0, 4 / 2, 1.0])
    assert weights([1, 2, 3, 4]).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert weights({"3": 5.0}).tolist() == [1.0, 1.0, 1.0, 5.0]


def test_weights_for_other_classes_are_refused() -> None:
    """Catches weights that are cut or passed over without a word; all faults are told at once."""
    fed = toy.federation(
        Standalone(),
        train={"class_weights": [1.0, 2.0], "parts": {"G": {"lr": 0.1}}, "clients": {"1": {"class_weights": {"x": 1}}}},
    )
    with pytest.raises(ConfigError) as caught:
        check_training(fed.config, fed.algorithm, ["model"], fed.data.train(0))
    faults = caught.value.faults
    assert "train.parts: standalone has no part G; it trains model" in faults
    assert "train.class_weights: got 2 numbers; expected 4, one for each class: 0, 1, 2, 3" in faults
    assert "train.clients.1.class_weights: unknown class 'x'; the data have 0, 1, 2, 3" in faults
    kd = toy.federation(FedKD(auxiliary=toy.MLP), train={"parts": {"W": {"lr": 0.1}}})
    check_training(kd.config, kd.algorithm, ["F", "G"], kd.data.train(0))


def test_a_fault_of_all_clients_is_told_once() -> None:
    fed = toy.federation(
        Standalone(), train={"class_weights": [1.0, 2.0], "clients": {"0": {"lr": 0.1}, "1": {"lr": 0.2}}}
    )
    with pytest.raises(ConfigError) as error:
        check_training(fed.config, fed.algorithm, ["model"], fed.data.train(0))
    assert [fault.partition(":")[0] for fault in error.value.faults] == ["train.class_weights"]


@pytest.mark.parametrize("keys", [{"class_weights": "balanced"}, {"label_smoothing": 0.2}])
def test_one_client_trains_as_torch_does(keys: dict[str, Any]) -> None:
    """Catches weights or smoothing that come to the optimizer otherwise than torch's loss has them."""
    fed = toy.federation(Standalone(), labels=((0, 0, 0, 2, 1, 0, 0, 3, 0),), train={"batch_size": 3, **keys})
    game = toy.play(fed).round()
    local = fed.local(0, 1)
    module = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
    start = fed.private(0, None).model
    module.load_state_dict(dict(zip(module.state_dict(), start.values(), strict=True)))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    weight = torch.tensor([9 / (4 * n) for n in (6, 1, 1, 1)]) if "class_weights" in keys else None
    for step in local.plan.schedule(9, local.rng.at("batches")):
        x, y = local.train.batch(step.rows)
        optimizer.zero_grad()
        smoothing = keys.get("label_smoothing", 0.0)
        functional.cross_entropy(module(x), y, weight=weight, label_smoothing=smoothing).backward()
        optimizer.step()
    for found, expected in zip(game.clients.private(0).model.values(), module.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if "labels_are_weighed" not in algorithm_class(n).exempt])
def test_every_supervised_term_of_every_algorithm_is_weighed(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Catches one cross-entropy of several that ignores the weights; FedGen's made representations have none."""
    weighed: list[bool] = []
    at_clients: list[bool] = []
    real, total = functional.cross_entropy, losses.total_weight

    def watched(logits: Any, y: Any, **keys: Any) -> Any:
        if y.dim() == 1:  # not of a distillation, whose targets are distributions
            weighed.append(keys.get("weight") is not None)
        return real(logits, y, **keys)

    def watched_total(batch: Any) -> Any:  # of a cross-entropy among the client's classes, which is written out
        weighed.append(isinstance(batch, WeightedBatch) and batch.weights is not None)
        return total(batch)

    fed = Subject(name, tmp_path).federation({"train": {"class_weights": "balanced", "epochs": None, "steps": 1}})
    game = toy.play(fed)
    train = game.clients._train

    def without_the_server(*given: Any, **keys: Any) -> Any:
        weighed.clear()
        for found in train(*given, **keys):
            at_clients.extend(weighed)
            weighed.clear()
            yield found

    monkeypatch.setattr(game.clients, "_train", without_the_server)
    monkeypatch.setattr(losses.functional, "cross_entropy", watched)
    monkeypatch.setattr(losses, "total_weight", watched_total)
    game.round().round()  # FedL2G trains no network in the laws' first round
    assert len(at_clients) >= 12
    assert at_clients.count(False) == (len(at_clients) / 2 if name == "fedgen" else 0)


# ----------------------------------------------------------------------------------- by client and by architecture


def differing() -> Any:
    return toy.federation(
        Standalone(),
        models=NETS,
        sizes=(11, 8, 5, 9),
        clients={"names": ["north", "south", "east", "west"]},
        train={
            "lr": 0.1,
            "models": {"mlp": {"batch_size": 3, "lr": 0.2}, NETS[1]: {"lr": 0.3}},
            "clients": {"north": {"steps": 5, "optimizer": "adamw"}, "3": {"lr": 0.4}},
        },
    )


def test_settings_are_laid_over_from_general_to_special() -> None:
    """Catches another order: [train], a network's name, the network with its options, the client."""
    fed = differing()
    plans = [fed.local(k, 1).plan for k in range(4)]
    assert [plan.lr for plan in plans] == [0.2, 0.3, 0.2, 0.4]
    assert [plan.batch_size for plan in plans] == [3] * 4
    assert [(plan.epochs, plan.steps, plan.optimizer) for plan in plans] == [
        (None, 5, "adamw"),
        *[(2, None, "sgd")] * 3,
    ]


def test_clients_that_train_otherwise_are_of_another_kind() -> None:
    """Catches a client that shares its neighbour's plan in a stack, and a choice of execution made for another."""
    fed = differing()
    kinds = [fed.kind(k) for k in range(4)]
    assert len(set(kinds)) == 4
    plain = toy.federation(Standalone(), models=NETS, sizes=(11, 8, 5, 9))
    assert [plain.kind(k) for k in range(4)] == [plain.kind(k) for k in (0, 1, 0, 1)]
    asked: list[int] = []
    choice = ExecutionChoice(
        lambda client: asked.append(client.id) or Chosen(),
        execution_choice(fed)._kind,  # type: ignore[func-returns-value]
    )
    for k in (0, 1, 2, 3, 2):
        choice.of(fed.info(k))
    assert asked == [0, 1, 2, 3]


def test_drivers_agree_where_clients_differ() -> None:
    """Catches a stack that trains all of its clients by the plan of the first."""
    fed = differing()
    one, many = (toy.play(fed, driver=driver).round() for driver in ("sequential", "batched"))
    for k in range(4):
        toy.close(many.clients.private(k).model, one.clients.private(k).model, 1e-5)


def test_a_batch_without_settings_is_a_plain_pair() -> None:
    """Catches work in every step of runs that ask for neither."""
    local = toy.federation(Standalone()).local(0, 1)
    batch = local.train.batch(torch.arange(3))
    assert local.weigh(batch) is batch
    assert isinstance(replace(local, class_weights=lambda: torch.ones(4)).weigh(batch), WeightedBatch)


@pytest.mark.parametrize("model", ["in-resnet10-1d", "cnn-1d(width=4)", "gru-1d(width=4)", "vit-1d(width=4)"])
def test_networks_for_signals_refuse_series_whose_channels_come_last(model: str) -> None:
    """Catches convolutions along channels: 20 steps of 64 channels are no 20 channels of 64 steps."""
    algorithm, task = load_algorithm("fedavg"), Task((20, 64), 2, architectures=(ModelSpec.parse(model),))
    y = torch.tensor([0, 1, 0, 1])
    rows = Dataset("toy", torch.randn(4, 20, 64), y, ("a", "b"), (), (), declared="series")
    check_networks(algorithm, task, replace(rows, channels_first=True))
    with pytest.raises(ModelError, match=r"series \(T, C\) of 20 steps of 64 channels: .* transpose x"):
        check_networks(algorithm, task, rows)
