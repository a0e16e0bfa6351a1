"""The views of sizes, on a small study that is run once."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studies import TINY, study

from polyfed.comparison.specs import RunSpec
from polyfed.experiments.catalogue import find
from polyfed.experiments.known import Known
from polyfed.experiments.reproduce import Job, reproduce
from polyfed.experiments.sizes import SIZES, named_values, size_text
from polyfed.experiments.views import Results
from polyfed.report.results import summary_of

#: What the mlp below has: 256 x 8 + 8 + 8 x 10 + 10 numbers, of which 18 multiply nothing.
NUMBERS = 2146


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """Two sizes; the entry "cut" has others, dealt to the same clients, and "largest" trains those of capacity 1.

    The networks of "widths" are of no capacity.
    """
    folder = tmp_path_factory.mktemp("sizes")
    (folder / "known.toml").write_text(
        '[mine]\n[[mine.values]]\nalgorithm = "fiarse"\nof = "Local at 1/4"\naccuracy = 0.5\ntag = "PIC"\n'
    )
    path = study(
        folder / "mine.toml",
        source="A paper",
        seeds=[0],
        config={
            **TINY,
            "run": {"rounds": 2, "eval_every": 1, "checkpoint_every": 100, "threads": 1, "keep_rounds": [2]},
            "clients": {"count": 4, "participation": 0.75, "models": ["mlp(hidden=(8,))"], "capacities": [1.0, 0.25]},
        },
        entries={
            "fiarse": {"unseen_capacities": [0.125]},
            "cut": {"name": "heterofl", "unseen_capacities": [], "clients": {"capacities": [1.0, 0.15]}},
            "largest": {"name": "fedavg", "clients": {"selection": "largest"}},
            "widths": {"name": "fjord"},
        },
        algorithms=["fiarse", "cut", "largest", "widths"],
        show=[*SIZES],
    )
    _, page = reproduce(path, out=folder)
    job = Job.load(path, out=folder)
    return Results(job.study, job.study.cells(), folder), page


def test_accuracy_of_each_size_is_that_of_its_clients_and_of_its_submodel(done: tuple[Results, Path]) -> None:
    """Catches a mean with sizes that no client has, a size of other clients, and own capacities of an algorithm.

    And networks that are of no capacity, taken for one network of all.
    """
    results, page = done
    rows = {tuple(row[1:4]): row[4] for row in SIZES["sizes"](results).rows}
    for cell in results.cells:
        summary = summary_of(cell.run_dir(results.root))
        assert summary is not None
        found = summary["accuracy"]
        assert rows[cell.label, "Local", None] == found["mean"]
        last = [row for row in results.rows(cell, "clients.jsonl") if row["round"] == 2]
        small = statistics.fmean(row["accuracy"] for row in last if row["client"] % 2)
        assert rows[cell.label, "Local", 0.25] == pytest.approx(small)
    fiarse = results.done[results.cells[0]]["accuracy"]["global"]
    assert rows["fiarse", "Global", 0.125] == fiarse["capacity 0.125"]
    assert rows["fiarse", "Global", None] == pytest.approx((fiarse["capacity 1"] + fiarse["capacity 0.25"]) / 2)
    assert rows["cut", "Global", 0.25] == results.done[results.cells[1]]["accuracy"]["global"]["capacity 0.15"]
    assert ("fiarse", "Local", 0.125) not in rows
    assert ("largest", "Global", 1.0) not in rows
    assert rows["largest", "Global", None] == next(iter(results.done[results.cells[2]]["accuracy"]["global"].values()))
    assert len(results.done[results.cells[3]]["accuracy"]["global"]) > 1
    own = {key[1:] for key in rows if key[0] == "widths"}
    assert own == {("Local", None), ("Local", 1.0), ("Local", 0.25)}
    assert named_values(results)["", "fiarse", "Local at 1/4"] in (page / "page.md").read_text().split("## Beside")[1]
    curves = [row for row in SIZES["size_curves"](results).rows if row[1:4] == ("fiarse", "Global", 0.25)]
    assert [row[4] for row in curves] == [0, 1, 2]
    assert curves[-1][5] == fiarse["capacity 0.25"]
    assert {row[3] for row in SIZES["size_curves"](results).rows} == {1.0, 0.25}
    assert sorted(path.name for path in page.glob("*.png")) == ["size_curves.png", "sizes.png", "unseen_sizes.png"]


def test_logs_are_read_once(done: tuple[Results, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a log that is parsed for each size, and values computed again beside the paper."""
    results, _ = done
    read, rows = list[str](), Results.rows

    def counted(self: Results, cell: RunSpec, name: str) -> Iterator[dict[str, Any]]:
        read.append(cell.label)
        return rows(self, cell, name)

    monkeypatch.setattr(Results, "rows", counted)
    SIZES["size_curves"](results)
    assert sorted(read) == ["cut", "fiarse", "largest", "widths"]
    assert SIZES["sizes"](results) is SIZES["sizes"](results)


def test_costs_of_a_size_are_counted_by_hand(done: tuple[Results, Path]) -> None:
    """Catches costs of the full network for a part, and bytes of another size.

    And the weights of whichever network comes last, where several are of no capacity.
    """
    results, _ = done
    rows = {tuple(row[1:3]): row[3:] for row in SIZES["size_costs"](results).rows}
    both = {(label, capacity) for label in ("fiarse", "cut", "widths") for capacity in (1.0, 0.25)}
    assert set(rows) == {*both, ("largest", None)}
    assert all(rows["widths", capacity][:2] == (None, None) for capacity in (1.0, 0.25))
    assert rows["fiarse", 1.0][:2] == (NUMBERS, NUMBERS - 18)
    assert rows["fiarse", 0.25][0] == NUMBERS // 4
    assert NUMBERS // 4 - 18 <= rows["fiarse", 0.25][1] <= NUMBERS // 4
    width = 4  # of 8 channels, the square root of 0.15 rounded up
    assert rows["cut", 0.25][:2] == (256 * width + width + width * 10 + 10, 256 * width + width * 10)
    assert rows["largest", None][:2] == (NUMBERS, NUMBERS - 18)
    trained = [row for row in results.rows(results.cells[0], "clients.jsonl") if "bytes_up" in row]
    small = [row["bytes_up"] for row in trained if row["capacity"] == 0.25]
    assert rows["fiarse", 0.25][3] == pytest.approx(statistics.fmean(small))
    for cell in results.cells:  # such as runs of another machine, brought without them
        (cell.run_dir(results.root) / "checkpoint").rename(cell.run_dir(results.root) / "away")
    left = {tuple(row[1:3]): row[3:] for row in SIZES["size_costs"](results).rows}
    for cell in results.cells:
        (cell.run_dir(results.root) / "away").rename(cell.run_dir(results.root) / "checkpoint")
    assert left == {key: (None, None, *values[2:]) for key, values in rows.items()}


def test_costs_are_means_of_the_seeds_that_have_them(
    done: tuple[Results, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a seed without a client of a size, that takes the others' costs away, and the first seed for all."""
    results, _ = done
    first, second = results.cells[:2]
    costs = {first: {1.0: (1.0, 2.0, None, 8.0, None)}, second: {1.0: (3.0, 2.0, 6.0, None, None)}}
    monkeypatch.setattr("polyfed.experiments.sizes._costs", lambda _, cell: costs[cell])
    monkeypatch.setattr(Results, "groups", lambda _: {("", "a"): [first, second]})
    assert SIZES["size_costs"](results).rows == [("", "a", 1.0, 2.0, 2.0, 6.0, 8.0, None)]


def test_all_large_trains_the_largest_clients_alone(done: tuple[Results, Path]) -> None:
    results, _ = done
    lines = (results.cells[2].run_dir(results.root) / "clients.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    assert {row["client"] for row in rows if "steps" in row} == {0, 2}
    assert {row["client"] for row in rows if row["round"] == 2} == {0, 1, 2, 3}


def test_sizes_are_named_as_in_papers() -> None:
    assert [*map(size_text, (1.0, 0.25, 0.015625, 0.00390625, 0.04, 0.36))] == [
        "1",
        "1/4",
        "1/64",
        "1/256",
        "0.04",
        "0.36",
    ]


@pytest.mark.parametrize("item", ["table1", "fig3", "fig4"])
def test_what_fiarse_s_paper_says_has_a_place_in_the_study(item: str) -> None:
    """Catches a name of a setting, an algorithm or a size that the study at paper scale does not have."""
    path = find(f"fiarse/{item}")
    cells = Job.load(path, "paper").study.cells()
    values = Known.load(path.parent / "known.toml", item).values
    assert {(v.setting, v.algorithm) for v in values} <= {(cell.setting.title, cell.label) for cell in cells}
    sizes = {size_text(c) for c in (*cells[0].config.clients.capacities, 0.125, 0.03125, 0.00390625)}
    names = {f"{where}{end}" for where in ("Local", "Global") for end in ("", *(f" at {size}" for size in sizes))}
    assert {v.of for v in values} <= names
    assert len({(v.setting, v.algorithm, v.of) for v in values}) == len(values) > 0


def test_all_large_of_table_4_is_that_of_table_1(tmp_path: Path) -> None:
    """Catches a run that is made twice: twice the clients in a round are no more than the five that can train it."""
    cells = [Job.load(find(f"fiarse/{item}"), "cpu", tmp_path).study.cells({}) for item in ("table1", "table4")]
    first, second = ({cell.folder for cell in some if cell.label == "AllLarge"} for some in cells)
    assert len(second) == 1
    assert second <= first


def test_equal_macs_are_at_most_a_size() -> None:
    """Catches capacities and levels of the setting with equal MACs that do not fit the network any more."""
    from polyfed.blocks.levels import submodel
    from polyfed.blocks.submodel import Layout, Slice
    from polyfed.core.algorithm import Task
    from polyfed.models.flops import multiplications
    from polyfed.models.split import SplitModel

    def macs(model: SplitModel) -> float:
        return sum(each * model.shapes[name].numel() for name, each in multiplications(model).items())

    cells = Job.load(find("fiarse/table1"), "cpu").study.cells()
    cells = [cell for cell in cells if cell.setting.title == "CIFAR-10, equal MACs"]
    own = Task(input_shape=(3, 32, 32), num_classes=10).build(cells[0].config.clients.models[0])
    asked = cells[0].config.clients.capacities
    (hetero,) = {cell.config.clients.capacities for cell in cells if "equal MACs" in cell.label}
    for capacity, held in zip(asked, hetero, strict=True):
        share = macs(Slice.prefix(Layout.of(own), held**0.5).network(own)) / macs(own)
        assert 0.8 * capacity <= share <= capacity
    (levels,) = (cell.config.algorithm.keys["levels"] for cell in cells if cell.label == "ScaleFL")
    whole = macs(submodel(own, 4, "", 1.0, 4))
    for capacity, width, exits in levels:
        assert 0.8 * capacity <= macs(submodel(own, 4, "", width, exits)) / whole <= capacity
