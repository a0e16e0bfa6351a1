"""Evaluation and accounts of runs: exact counts, the right clients at the right moment, bytes and FLOPs that add up."""

import json
from pathlib import Path
from typing import Any

import pytest
import running
import torch

from polyfed.core.message import size
from polyfed.rounds.federation import Federation, prepare
from polyfed.simulation.simulate import simulate

FEDAVG: dict[str, Any] = {
    "run": {"rounds": 3, "eval_every": 1, "checkpoint_every": 1},
    "data": {"augment": False},
    "clients": {"count": 4, "participation": 0.5, "models": ["mlp(hidden=(12, 8))"]},
    "partition": {
        "kind": "dirichlet",
        "alpha": 1.0,
        "classes_per_client": None,
        "samples_per_client": None,
        "min_samples": 8,
    },
    "algorithm": {"name": "fedavg"},
}


def config(**more: Any) -> Any:
    tables = {name: dict(keys) for name, keys in FEDAVG.items()}
    for name, keys in more.items():
        tables[name] = keys if name == "algorithm" else {**tables.get(name, {}), **keys}
    return running.config(**tables)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Federation, dict[str, Any]]:
    """Three evaluated rounds of FedAvg with clients of unequal sizes."""
    folder = tmp_path_factory.mktemp("fedavg") / "run"
    summary = simulate(config(), out=folder).summary
    return folder, prepare(config()), summary


def forward(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network by hand: three dense layers."""
    x = x.flatten(1)
    for layer in ("fc1", "fc2"):
        x = torch.relu(x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"])
    return x @ params["fc3.weight"].T + params["fc3.bias"]


def final_model(folder: Path) -> dict[str, torch.Tensor]:
    """The global model, read with safetensors alone."""
    import safetensors.torch

    path = next((folder / "checkpoint").glob("server-round-*.safetensors"))
    tensors = safetensors.torch.load_file(path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tree = json.loads(header["__metadata__"]["structure"])
    return {name: tensors[str(node["t"])] for name, node in tree["f"]["model"]["m"].items()}


def test_accuracies_are_exact_counts(run: Any) -> None:
    """Catches a mean of batch means, a client that counts by its size, training rows among the test."""
    folder, federation, summary = run
    params = final_model(folder)
    rows = {r["client"]: r for r in running.lines(folder / "clients.jsonl") if r["round"] == 3 and "correct" in r}
    assert sorted(rows) == [0, 1, 2, 3]
    accuracies, right, total = [], 0, 0
    for k, row in rows.items():
        test = federation.data.test(k)
        x, y = test.batch(torch.arange(len(test)))
        correct = int((forward(params, x).argmax(1) == y).sum())
        assert (row["examples"], row["correct"]) == (len(test), {"global": correct})
        assert row["accuracy"] == correct / len(test)
        accuracies.append(correct / len(test))
        right, total = right + correct, total + len(test)
    assert len({len(federation.data.test(k)) for k in range(4)}) > 1
    assert summary["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 4, abs=1e-12)
    assert summary["accuracy"]["worst_decile"] == min(accuracies)
    assert summary["accuracy"]["global"]["global"] == pytest.approx(right / total, abs=1e-12)
    assert summary["accuracy"]["global_local"]["global"] == pytest.approx(sum(accuracies) / 4, abs=1e-12)


def test_the_official_number_is_of_the_cohort_before_aggregation(run: Any) -> None:
    """Catches the released codes' number computed on other clients, or on the aggregated model."""
    folder, federation, _ = run
    log = running.lines(folder / "rounds.jsonl")
    assert log[0]["accuracy"]["before_aggregation"] is None
    cohort = log[1]["cohort"]
    assert len(cohort) == 2
    algorithm, accuracies = federation.algorithm, []
    w: Any = algorithm.init_server(federation.task, federation.rng.at("server"))
    for k in cohort:
        params = {name: v.clone().requires_grad_() for name, v in w.model.items()}
        local = federation.local(k, 1)
        optimizer = torch.optim.SGD(list(params.values()), lr=0.05, momentum=0.9)
        for step in local.plan.schedule(len(local.train), local.rng.at("batches")):
            x, y = local.train.batch(step.rows)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(forward(params, x), y).backward()
            optimizer.step()
        x, y = federation.data.test(k).batch(torch.arange(len(federation.data.test(k))))
        accuracies.append(float((forward(params, x).argmax(1) == y).double().mean()))
    assert log[1]["accuracy"]["before_aggregation"] == pytest.approx(sum(accuracies) / 2, abs=1e-9)


def test_where_nothing_is_exchanged_no_client_is_tested_twice(tmp_path: Path) -> None:
    """Catches a test before an aggregation that there is not: it takes as long as the other and says the same."""
    for name, seen in (("standalone", False), ("fedavg", True)):
        made = running.config(run={"rounds": 1}, algorithm={"name": name})
        simulate(made, out=tmp_path / name)
        row = running.lines(tmp_path / name / "rounds.jsonl")[1]
        assert (row["accuracy"]["before_aggregation"] is not None) == seen
        assert row["accuracy"]["mean"] is not None


def test_bytes_are_the_lengths_of_the_messages(run: Any) -> None:
    """Catches bytes that are estimated, evaluation booked as training, and sums that miss a round."""
    folder, federation, summary = run
    model = federation.task.common("fedavg").init(federation.rng)
    values = 4 * sum(v.numel() for v in model.values())
    down = size(federation.algorithm.Broadcast(model)).total
    assert (summary["bytes"]["down"], summary["bytes"]["down_values"]) == (3 * 2 * down, 3 * 2 * values)
    assert summary["bytes"]["up_values"] == 3 * 2 * values
    assert summary["bytes"]["evaluation_down"] == 4 * 4 * down  # rounds 0 to 3, all clients
    for way in ("up", "down"):
        parts = sum(summary["bytes"][f"{way}_{kind}"] for kind in ("values", "indices", "header"))
        assert parts == summary["bytes"][way]
    log, clients = running.lines(folder / "rounds.jsonl"), running.lines(folder / "clients.jsonl")
    assert [row["evaluation_down"] for row in log] == [4 * down] * 4
    for way in ("up", "down"):
        assert sum(row["bytes"][way] for row in log[1:]) == summary["bytes"][way] == log[-1]["totals"][f"bytes_{way}"]
        assert sum(row.get(f"bytes_{way}", 0) for row in clients) == summary["bytes"][way]
        assert sum(family[f"bytes_{way}"] for family in summary["by_model"].values()) == summary["bytes"][way]


def test_flops_are_those_of_the_layers(run: Any) -> None:
    """Catches a missing backward pass, one too many for the first layer, and evaluation booked as training."""
    folder, federation, summary = run
    log, layers = running.lines(folder / "rounds.jsonl"), [(256, 12), (12, 8), (8, 10)]
    per_example = sum(2 * a * b * (2 if i == 0 else 3) for i, (a, b) in enumerate(layers))
    examples = 0
    for row in log[1:]:
        for k in row["cohort"]:
            local = federation.local(k, row["round"])
            examples += sum(len(s.rows) for s in local.plan.schedule(len(local.train), local.rng.at("batches")))
    assert summary["flops"] == per_example * examples == log[-1]["totals"]["flops"]
    tests = sum(len(federation.data.test(k)) for k in range(4))
    cohorts = sum(len(federation.data.test(k)) for row in log[1:] for k in row["cohort"])
    forward_ = sum(2 * a * b for a, b in layers)
    assert summary["flops_evaluation"] == forward_ * (4 * 2 * tests + cohorts)
    assert summary["flops_per_example"] == forward_


def test_a_sample_of_the_clients_is_evaluated(tmp_path: Path) -> None:
    """Catches an evaluation of all, of the same ones every time, or of other ones after a resume."""
    simulate(config(run={"eval_clients": 2, "rounds": 6}), out=tmp_path / "a")
    simulate(config(run={"eval_clients": 2, "rounds": 6}), out=tmp_path / "b")
    log = running.lines(tmp_path / "a/clients.jsonl")
    tested = [tuple(r["client"] for r in log if r["round"] == n and "correct" in r) for n in range(7)]
    assert all(len(t) == 2 for t in tested)
    assert len(set(tested)) > 1
    assert all(row["accuracy"]["clients"] == 2 for row in running.lines(tmp_path / "a/rounds.jsonl"))
    running.same(tmp_path / "a", tmp_path / "b")


def test_rounds_are_evaluated_when_it_is_time_and_at_the_end(tmp_path: Path) -> None:
    """Catches a last round without a result."""
    simulate(config(run={"eval_every": 2, "rounds": 5}), out=tmp_path / "a")
    log = running.lines(tmp_path / "a/rounds.jsonl")
    assert [row["round"] for row in log if "accuracy" in row] == [0, 2, 4, 5]
    assert [row["round"] for row in log] == list(range(6))


def test_targets_are_met_at_the_first_crossing(tmp_path: Path) -> None:
    """Catches a target that moves to a later round, misses the costs, or is met by luck of another predictor."""
    train = {"epochs": 3, "lr": 0.005, "optimizer": "adam", "momentum": 0.0}
    keys = {"rounds": 6, "targets": [0.0001, 0.4, 1.0]}
    summary = simulate(config(run=keys, train=train, clients={"participation": 1.0}), out=tmp_path / "a").summary
    log = running.lines(tmp_path / "a/rounds.jsonl")
    for target, found in zip(keys["targets"], summary["targets"], strict=True):
        crossed = [row for row in log if row["accuracy"]["mean"] >= target]
        if not crossed:
            assert found is None
            continue
        expected = {"accuracy": target, "round": crossed[0]["round"], **crossed[0]["totals"]}
        assert found == expected
    assert summary["targets"][1] is not None
    assert summary["targets"][1]["round"] > 0
    assert summary["targets"][2] is None
    best = max(row["accuracy"]["mean"] for row in log)
    assert summary["accuracy"]["best"]["mean"] == best


def test_the_summary_has_the_documented_keys(run: Any) -> None:
    """Catches a key that scripts rely on and that is renamed, or changes its type."""
    folder, _, summary = run
    read = json.loads((folder / "summary.json").read_text())
    assert read == summary
    kinds = {
        **dict.fromkeys(("algorithm", "name", "run_dir", "partition_hash", "config_hash"), str),
        **dict.fromkeys(("seed", "rounds", "flops", "flops_evaluation"), int),
        **dict.fromkeys(("seconds", "seconds_evaluation", "flops_per_example"), float),
        **dict.fromkeys(("accuracy", "majority", "bytes", "memory", "by_model", "clients"), dict),
        "targets": list,
    }
    assert {key: type(value) for key, value in read.items()} == kinds
    assert (read["algorithm"], read["rounds"], read["clients"]["count"]) == ("fedavg", 3, 4)
    accuracy = read["accuracy"]
    assert {
        "mean",
        "worst_decile",
        "predictors",
        "by_model",
        "by_capacity",
        "before_aggregation",
        "global",
        "clients",
    } <= set(accuracy)
    assert all(
        isinstance(accuracy[key], float) and 0 <= accuracy[key] <= 1
        for key in ("mean", "worst_decile", "before_aggregation")
    )
    assert all(isinstance(value, int) for value in read["bytes"].values())
    assert set(read["by_model"]) == set(read["memory"]["step_peak"]) == {"mlp(hidden=(12, 8))"}
    assert all(isinstance(peak, int) and peak > 0 for peak in read["memory"]["step_peak"].values())
    assert isinstance(read["memory"]["process_peak"], int)


def test_both_drivers_report_the_same_costs(tmp_path: Path) -> None:
    """Catches costs that depend on how the work was done."""
    for driver in ("sequential", "batched"):
        simulate(running.config(run={"driver": driver, "rounds": 2}), out=tmp_path / driver)
    one, two = (json.loads((tmp_path / d / "summary.json").read_text()) for d in ("sequential", "batched"))
    for key in ("bytes", "flops", "flops_evaluation"):
        assert one[key] == two[key], key
    assert one["memory"]["step_peak"] == two["memory"]["step_peak"]
