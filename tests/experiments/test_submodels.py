"""The views of what clients of each size have and hold, against plain definitions."""

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import running
import torch
from torch import Tensor

import polyfed
from polyfed.algorithms.fiarse import FIARSE
from polyfed.comparison.specs import RunSpec, Setting
from polyfed.experiments import submodels
from polyfed.experiments.catalogue import find
from polyfed.experiments.inside import Inside
from polyfed.experiments.reproduce import reproduce
from polyfed.experiments.study import Study
from polyfed.experiments.submodels import Followed, Look, convergence, exploration, histogram, look, slope_text, spent
from polyfed.experiments.views import Results
from polyfed.simulation.simulate import simulate

SIZES = (1.0, 0.3, 0.1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A run of FIARSE that keeps all its rounds, as the finished cell of a study."""
    out = tmp_path_factory.mktemp("submodels")
    config = running.config(
        run={"rounds": 3, "eval_every": 3, "keep_rounds": [0, 1, 2, 3], "precision": "fp64"},
        clients={"participation": 1.0, "capacities": list(SIZES), "models": ["mlp(hidden=(6,))"]},
        train={"lr": 0.5, "momentum": 0.0},
        algorithm={"name": "fiarse", "unseen_capacities": []},
    )
    cell = RunSpec(Setting("s"), "fiarse", 0, config)
    simulate(config, out=cell.run_dir(out), progress=False)
    return Results(Study(title="t"), [cell], out)


def test_exploration_and_difference_of_masks_by_hand() -> None:
    """Catches a rate of the last mask alone, and a difference to all masks or over all weights."""
    followed = Followed()

    def see(*held: int) -> tuple[float, float | None]:
        flat = torch.tensor([float(k in held) for k in range(8)]).bool()
        return followed.see({"a": flat[:2], "b": flat[2:].reshape(2, 3)})

    assert see(0, 1, 2, 3) == (0.5, None)
    assert see(0, 1, 2, 5) == (5 / 8, 0.25)
    assert see(0, 6) == (6 / 8, 0.5)
    assert see(3, 6) == (6 / 8, 0.5)  # weight 3 was held before, but not in the mask just before
    assert see(3, 6) == (6 / 8, 0.0)


def test_exploration_of_a_run_follows_the_largest_weights(results: Results) -> None:
    """Catches a mask of another size or round, and sizes whose masks are mixed up."""
    rows = {row[2:4]: row[4:] for row in exploration(results).rows}
    assert set(rows) == {(size, round_) for size in SIZES for round_ in range(4)}
    (cell,) = results.cells
    states: list[Any] = [polyfed.kept_round(cell.run_dir(results.root), round_).server for round_ in range(4)]
    weights = [torch.cat([state.model[name].abs().reshape(-1) for name in state.masked]) for state in states]
    for size in SIZES:
        ever, last = set[int](), set[int]()
        for round_, w in enumerate(weights):
            now = set(w.topk(int(size * len(w))).indices.tolist())
            ever |= now
            rate, difference = rows[size, round_]
            assert rate == pytest.approx(len(ever) / len(w))
            assert difference == (pytest.approx(len(now - last) / len(now)) if round_ else None)
            last = now
    assert rows[0.1, 3][0] > 0.1


def gradient(net: Any, params: dict[str, Tensor], data: Any) -> dict[str, Tensor]:
    """Of the mean cross-entropy of all examples."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    x, y = data.batch(torch.arange(len(data)), dtype=torch.float64)
    loss = torch.nn.functional.cross_entropy(net(leaves, x), y)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def test_the_gradient_of_the_full_objective_and_the_mask_error(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a mean of squares, a masked objective, an error outside the mask, and the factor of Eq. 3 left out."""
    (cell,) = results.cells
    inside = Inside(cell.run_dir(results.root), 2)
    algorithm, server = inside.kept.algorithm, inside.kept.server
    assert isinstance(algorithm, FIARSE)
    assert isinstance(server, FIARSE.Server)
    asked, gradient_at = list[float](), submodels.gradient_at

    def counted(inside: Inside, algorithm: Any, server: Any, client: int, capacity: float) -> Any:
        asked.append(capacity)
        return gradient_at(inside, algorithm, server, client, capacity)

    with monkeypatch.context() as patch:
        patch.setattr(submodels, "gradient_at", counted)
        found = look(inside, algorithm)
    assert sorted(asked) == [0.1, 0.3, 1.0, 1.0, 1.0, 1.0]  # that of capacity 1 once for each client
    x = dict(server.model)
    flat = torch.cat([value.abs().reshape(-1) for value in x.values()])
    total = {name: torch.zeros_like(value) for name, value in x.items()}
    errors: dict[float, float] = {}
    for k in range(4):
        local = inside.federation.local(k, 3)
        net, data = local.models["model"], local.train
        whole = gradient(net, x, data)
        total = {name: total[name] + g / 4 for name, g in whole.items()}
        if k < 3:  # client 3 is the second of capacity 1
            size = SIZES[k]
            theta = float(flat.topk(int(size * len(flat))).values[-1]) if size < 1 else 0.0
            mask = {name: (value.abs() >= theta).double() for name, value in x.items()}
            g = gradient(net, {name: value * mask[name] for name, value in x.items()}, data)
            own = {
                n: v * (1 + 2 * x[n].abs() * theta / (x[n].abs() + theta) ** 2) if theta else v for n, v in g.items()
            }
            errors[size] = sum(float((mask[n] * (whole[n] - own[n])).square().sum()) for n in x)
    assert found.gradient == pytest.approx(sum(float(g.square().sum()) for g in total.values()), rel=1e-9)
    assert found.norm == pytest.approx(sum(float(value.square().sum()) for value in x.values()), rel=1e-9)
    assert list(found.errors) == list(SIZES)
    assert found.errors == pytest.approx(errors, rel=1e-8, abs=1e-20)
    assert errors[0.3] > 0
    inside.kept = replace(inside.kept, server=replace(server, paces=dict.fromkeys(range(4), 0.1)))
    assert look(inside, algorithm) == found  # the whole model is whole, whatever a client's pace
    rows = [row for row in convergence(results).rows if row[2] == 2]
    assert [row[6:] for row in rows] == [(size, found.errors[size], found.errors[size] / found.norm) for size in SIZES]
    least = [row[3:5] for row in convergence(results).rows if row[6] == 1.0]
    assert [row[1] for row in least] == [least[0][0], *(min(g for g, _ in least[1 : n + 1]) for n in range(1, 4))]
    heads, (told,) = convergence(results).cells or ((), [()])
    assert int(dict(zip(heads, told, strict=True))["at round"]) == 1 + [g for g, _ in least[1:]].index(least[3][1])


def test_slopes_are_over_runs_of_different_lengths() -> None:
    assert slope_text([(1, 2.0), (4, 1.0), (16, 0.5)]) == "-0.50"
    assert slope_text([(4, 2.0), (4, 1.0)]) == "-"


def test_the_terms_of_the_theorem_by_hand(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plain mean over kept rounds, round T in the sum, another factor, and the least error of the sizes."""
    (cell,) = results.cells
    found = {
        (4, 0): Look(9.0, 2.0, {1.0: 0.0, 0.3: 3.0}),
        (4, 1): Look(2.0, 4.0, {1.0: 0.0, 0.3: 1.0}),
        (4, 4): Look(4.0, 8.0, {1.0: 0.0, 0.3: 8.0}),
        (16, 0): Look(9.0, 2.0, {1.0: 0.0, 0.3: 2.0}),
        (16, 6): Look(1.0, 4.0, {1.0: 0.0, 0.3: 0.4}),
    }
    cells = [
        replace(cell, setting=Setting(f"T = {t}"), config=cell.config.replace("run", rounds=t, keep_rounds=kept))
        for t, kept in ((4, [0, 1, 4]), (16, [0, 6]))
    ]
    both = replace(results, cells=cells)
    both.__dict__["done"] = {key: {} for key in cells}

    def at(_: Results, one: RunSpec, round_: int) -> Look:
        return found[one.config.run.rounds, round_]

    monkeypatch.setattr(submodels, "_look", at)
    heads, told = convergence(both).cells or ((), [])
    assert [dict(zip(heads[3:], row[3:], strict=True)) for row in told] == [
        {
            "T": "4",
            "least squared gradient": "2",
            "at round": "1",
            "slope over T": "-0.50",
            "largest mask error": "8",
            "delta^2 at the end": "1",
            "32 N mean error before T": "192",  # 128 (1 x 3 + 3 x 1) / 4
        },
        {
            "T": "16",
            "least squared gradient": "1",
            "at round": "6",
            "slope over T": "-0.50",
            "largest mask error": "2",
            "delta^2 at the end": "0.1",
            "32 N mean error before T": "128",  # 128 (6 x 2 + 10 x 0.4) / 16
        },
    ]


def test_histograms_count_clients_by_size_and_bin(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches clients of another size, a bin that loses its edge, and a seed that is left out."""
    (cell,) = results.cells
    both = replace(results, cells=[cell, replace(cell, seed=1)])
    both.__dict__["done"] = {key: {"rounds": 3} for key in both.cells}
    values = {0: {0: 1.0, 1: 0.05, 2: 0.049, 3: 0.99}, 1: {0: 0.52, 1: 0.05, 2: 0.0, 3: 0.5}}

    def clients(_: Results, one: RunSpec) -> dict[int, float]:
        return values[one.seed]

    monkeypatch.setattr(Results, "clients", clients)
    view = histogram(both)
    found = {(row[2], round(row[3], 9)): row[5] for row in view.rows if row[5]}
    assert found == {(1.0, 0.95): 2, (1.0, 0.5): 2, (0.3, 0.05): 2, (0.1, 0.0): 2}
    assert len(view.rows) == 3 * 20
    assert view.cells is not None
    assert view.cells[1][0] == ("s", "fiarse", "1", "4", "50.0 %", "75.5 %", "75.2 %", "100.0 %")


def test_what_was_spent_is_the_sum_so_far(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the bytes of a round or of one way, steps of one round, and another cost than that of the accuracy."""
    (cell,) = results.cells
    four = replace(cell, config=cell.config.replace("train", steps=5, epochs=None))
    some = replace(results, cells=[four])
    some.__dict__["done"] = {four: {}}
    rows = [
        {"round": n, "totals": {"bytes_up": 10 * n, "bytes_down": n, "flops": 100 * n}, "accuracy": {"mean": 0.1 * n}}
        for n in (0, 2)
    ]

    def lines(*_: object) -> Iterator[dict[str, Any]]:
        return iter(rows)

    monkeypatch.setattr(Results, "rows", lines)
    assert [row[2:7] for row in spent(some).rows] == [(0, 0, 0, 0, 0.0), (2, 10, 200, 22, 0.2)]
    heads, (told,) = spent(some).cells or ((), [()])
    assert dict(zip(heads, told, strict=True))["training FLOPs"] == "200"
    assert told == ("s", "fiarse", "10", "200", "22 B", "20.0 %")


@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_the_corollarys_rate_is_that_of_each_length(scale: str) -> None:
    cells = Study.load(find("fiarse/theorem"), scale).cells()
    for cell in cells:
        run, train = cell.config.run, cell.config.train
        assert train.steps is not None
        if cell.label != "constant lr":
            assert train.lr == pytest.approx(1 / (train.steps * math.sqrt(run.rounds)), rel=1e-7)
        assert (train.optimizer, train.momentum, train.weight_decay, train.clip) == ("sgd", 0.0, 0.0, 0.0)
    work = {c.config.run.rounds * (c.config.train.steps or 0) for c in Study.load(find("fiarse/steps"), scale).cells()}
    assert len(work) == 1


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the committed studies share their cells."""
    return tmp_path_factory.mktemp("fiarse")


@pytest.mark.parametrize(
    ("item", "only"),
    [("fig2", "fiarse"), ("fig7", "fiarse"), ("theorem", "T = 1"), ("steps", "K = 4, T = 2")],
)
def test_studies_of_fiarse_run(item: str, only: str, out: Path) -> None:
    """At smoke scale, of which one cell is enough here; fig2 and steps share theirs."""
    algorithm = "lr*" if item == "theorem" else "fiarse"
    _, page = reproduce(find(f"fiarse/{item}"), "smoke", out, only=[only, algorithm, "seed 0"])
    for name in Study.load(find(f"fiarse/{item}"), "smoke").show:
        assert list(csv.DictReader((page / f"{name}.csv").read_text().splitlines())), name
        assert (page / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "cells").iterdir())) <= 3
