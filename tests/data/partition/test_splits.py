"""Splits that keep units whole or that test on the later rows; and the warning of classes that are hardly tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import labelled
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.base.errors import ConfigError, DataError
from polyfed.base.rng import Rng
from polyfed.data.dataset import Dataset
from polyfed.data.partition.make import hardly_tested, make_partition, splitter
from polyfed.data.partition.partition import Partition
from polyfed.data.sources import load_dataset


def patients(rows: int = 600, clients: int = 4, units: int = 60, seed: int = 0) -> Dataset:
    """Rows of patients, of uneven numbers, who each go to one hospital."""
    draw = np.random.default_rng(seed)
    unit = draw.permutation(np.minimum((draw.random(rows) ** 2 * units).astype(np.int64), units - 1))
    return labelled(draw.integers(0, 3, rows), 3, groups=unit % clients, units=unit)


def made(dataset: Dataset, split: str, *, kind: str = "natural", seed: int = 0, fraction: float = 0.2, **more):
    return make_partition(
        dataset,
        kind=kind,
        num_clients=more.pop("num_clients", None),
        rng=Rng((seed,)),
        test_fraction=fraction,
        split=split,
        **more,
    )


def apart(partition: Partition, units: np.ndarray) -> None:
    for client in range(partition.num_clients):
        train, test = units[partition.train(client)], units[partition.test(client)]
        assert len(train)
        assert len(test)
        assert not set(train) & set(test)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), fraction=st.sampled_from([0.1, 0.2, 0.5]))
def test_rows_of_a_unit_stay_on_one_side(seed: int, fraction: float) -> None:
    data = patients(seed=seed)
    found = made(data, "groups", seed=seed, fraction=fraction, min_samples=1)
    apart(found, data.units)
    assert len(found.train_rows) + len(found.test_rows) == len(data)


def test_the_share_of_units_is_right_in_the_mean_and_differs_with_the_seed() -> None:
    """Catches always the same patients, and a fraction of clients or of one class only."""
    data = patients()
    found = [made(data, "groups", seed=seed) for seed in range(200)]
    assert np.mean([len(p.test_rows) for p in found]) == pytest.approx(0.2 * len(data), rel=0.04)
    tested = np.mean([np.isin(np.arange(60), data.units[p.test_rows]) for p in found], axis=0)
    assert (np.abs(tested[np.bincount(data.units, minlength=60) > 0] - 0.2) < 0.13).all()
    for c in range(3):
        share = np.mean([(data.y.numpy()[p.test_rows] == c).sum() for p in found]) / (data.y.numpy() == c).sum()
        assert share == pytest.approx(0.2, abs=0.03)


def test_a_unit_of_several_clients_is_on_one_side_of_all() -> None:
    """Catches a patient whose rows one client trains on and another tests on, where polyfed dealt the rows."""
    data = patients()
    found = made(data, "groups", kind="iid", num_clients=4)
    apart(found, data.units)
    assert not set(data.units[found.train_rows]) & set(data.units[found.test_rows])
    few = labelled(np.arange(200) % 2, 2, units=np.arange(200) % 5)  # every client has rows of all five
    assert len(set(few.units[made(few, "groups", kind="iid", num_clients=4).test_rows])) == 1
    grouped = made(replace(data, units=None, groups=data.units), "groups", kind="iid", num_clients=4)
    assert not set(data.units[grouped.train_rows]) & set(data.units[grouped.test_rows])


@pytest.mark.parametrize("split", ["groups", "time"])
def test_a_client_splits_its_rows_in_the_same_way_whoever_else_there_is(split: str) -> None:
    """Catches draws that depend on the other clients' rows: a deployed client has its own file only."""
    data = patients()
    whole = made(data, split)
    for client in range(4):
        rows = np.flatnonzero(data.groups == client)
        alone = replace(data, x=data.x[rows], y=data.y[rows], groups=None, units=data.units[rows], times=None)
        own = made(alone, split, kind="iid", num_clients=1, first_client=client)
        assert np.array_equal(rows[own.test(0)], whole.test(client))


def test_two_clients_may_both_have_a_patient_1() -> None:
    data = patients()
    same = replace(data, units=data.units // 4)  # each hospital counts its own patients from 0
    found = made(same, "groups")
    apart(found, same.units)
    assert set(same.units[found.train_rows]) & set(same.units[found.test_rows])


def test_time_tests_on_the_later_rows_of_each_client() -> None:
    """Catches the order of the file in place of the given times, and moments on both sides."""
    data = patients()
    found = made(data, "time")
    for client in range(4):
        assert found.train(client).max() < found.test(client).min()
    draw = np.random.default_rng(1)
    times = draw.integers(0, 90, len(data))
    found = [made(replace(data, times=times), "time", seed=seed) for seed in range(40)]
    for p in found:
        for client in range(4):
            assert times[p.train(client)].max() < times[p.test(client)].min()
    assert np.mean([len(p.test_rows) for p in found]) == pytest.approx(0.2 * len(data), rel=0.05)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=12, max_size=60),
    st.sampled_from([0.1, 0.3, 0.6]),
)
def test_any_times(rows: list[tuple[int, int]], fraction: float) -> None:
    groups, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    data = labelled(np.zeros(len(rows), np.int64), 2, groups=groups, times=times)
    moments = [len(set(times[groups == k])) for k in set(groups)]
    if min(moments) < 2:
        with pytest.raises(DataError, match="a client needs rows of at least two"):
            made(data, "time", fraction=fraction, min_samples=1)
        return
    found = made(data, "time", fraction=fraction, min_samples=1)
    for client in range(found.num_clients):
        assert times[found.train(client)].max() < times[found.test(client)].min()


def test_a_validation_part_is_split_in_the_same_way() -> None:
    data = patients()
    by_unit = made(data, "groups").validating(0.2, data.y.numpy(), Rng((1,)), splitter(data, "groups", "natural"))
    apart(by_unit, data.units)
    before = made(data, "time")
    by_time = before.validating(0.2, data.y.numpy(), Rng((1,)), splitter(data, "time", "natural"))
    for client in range(4):
        assert by_time.train(client).max() < by_time.test(client).min() < before.test(client).min()


@pytest.mark.parametrize("split", ["pooled", "groups", "time"])
def test_rows_without_a_label_are_trained_on_and_change_no_draw(split: str) -> None:
    """Catches test rows without a label, other test rows for their sake, rows that are dropped, and training on the
    patients, or after the time, of a test."""
    known, draws = patients(), np.random.default_rng(5)
    times = draws.integers(0, 90, len(known))
    # Between the labelled rows come as many without: of the same patients, and of others at the same hospitals.
    place = np.sort(draws.permutation(2 * len(known))[: len(known)])
    units = draws.integers(0, 120, 2 * len(known))
    moments, y = draws.integers(-20, 110, 2 * len(known)), np.full(2 * len(known), -1)
    units[place], moments[place], y[place] = known.units, times, known.y.numpy()
    mixed = labelled(y, 3, groups=units % 4, units=units, times=moments, unlabelled=True)
    for data in (alone := replace(known, times=times), mixed):
        assert len(np.unique(data.groups)) == 4
    usual, found = made(alone, split), made(mixed, split)
    pairs = [(usual, found)]
    if split != "pooled":
        pick = [splitter(data, split, "natural") for data in (alone, mixed)]
        pairs.append(
            (usual.validating(0.3, alone.strata, Rng((1,)), pick[0]), found.validating(0.3, y, Rng((1,)), pick[1]))
        )
    else:
        pairs.append((usual.validating(0.3, alone.strata, Rng((1,))), found.validating(0.3, y, Rng((1,)))))
    gone = set(usual.test_rows)
    for before, after in pairs:
        for client in range(4):
            assert after.test(client).tolist() == place[before.test(client)].tolist()
            rows = after.train(client)
            assert rows[y[rows] >= 0].tolist() == place[before.train(client)].tolist()
            tested = place[sorted(gone.union(before.test_rows))]
            own = tested[units[tested] % 4 == client]
            free = np.flatnonzero((y < 0) & (units % 4 == client))
            if split == "groups":
                free = free[~np.isin(units[free], units[own])]
            if split == "time":
                free = free[moments[free] < moments[own].min()]
            assert rows[y[rows] < 0].tolist() == free.tolist()
            assert 20 < len(free) < (10**6 if split == "pooled" else ((y < 0) & (units % 4 == client)).sum())


def test_a_test_in_time_leaves_a_labelled_row_for_training() -> None:
    """Catches a boundary before the first labelled row, where earlier rows have no label."""
    y = np.array([-1, -1, 0, 1, 0, 1, 0, 1])
    data = labelled(y, 2, groups=np.zeros(8, np.int64), times=np.array([0, 1, 2, 2, 3, 4, 4, 4]), unlabelled=True)
    assert made(data, "time", fraction=0.9, min_samples=1).test(0).tolist() == [4, 5, 6, 7]


def test_faults() -> None:
    data = patients()
    with pytest.raises(DataError, match="its groups are the clients themselves"):
        made(replace(data, units=None), "groups")
    with pytest.raises(DataError, match="does not say which rows belong together"):
        made(replace(data, units=None, groups=None), "groups", kind="iid", num_clients=2)
    with pytest.raises(DataError, match="a client needs rows of at least two"):
        made(replace(data, units=data.groups), "groups")
    with pytest.raises(ConfigError, match="split: got 'later'; expected one of pooled, official, groups, time"):
        made(data, "later")
    with pytest.raises(ConfigError, match="'resampled' deals single rows"):
        made(data, "time", kind="resampled", num_clients=2, samples_per_client=20, alpha=1.0)
    for name in ("units", "times"):
        with pytest.raises(DataError, match=f"{name} has shape"):
            replace(data, **{name: np.zeros(3, np.int64)})


def test_a_warning_names_classes_that_are_hardly_tested() -> None:
    """Catches a warning of chance at single clients, and none where a class has no test row where it is trained."""
    y = np.repeat([0, 1, 2], [300, 290, 10])
    data = labelled(y, 3, groups=np.tile(np.arange(5), 120))
    assert "class '2' (2)" in hardly_tested(data, made(data, "pooled", kind="iid", num_clients=1))
    plenty = labelled(np.repeat([0, 1, 2], [300, 270, 30]), 3, groups=np.tile(np.arange(5), 120))
    assert hardly_tested(plenty, made(plenty, "pooled", kind="iid", num_clients=5)) == ""
    # Client 0 trains on class 2, and only client 1, which does not, tests on it.
    flat = [np.arange(0, 20), np.arange(20, 60), np.arange(60, 80), np.arange(80, 120)]
    labels = np.concatenate([np.arange(20) % 3, np.arange(40) % 2, np.arange(20) % 2, np.arange(40) % 3])
    parts = Partition(
        np.concatenate([flat[0], flat[1]]),
        np.array([0, 20, 60]),
        np.concatenate([flat[2], flat[3]]),
        np.array([0, 20, 60]),
        {},
    )
    assert "class '2' (0)" in hardly_tested(labelled(labels, 3), parts)
    assert "'0'" not in hardly_tested(labelled(labels, 3), parts)
    tiny = labelled(np.arange(60) % 10, 10)
    assert hardly_tested(tiny, made(tiny, "pooled", kind="iid", num_clients=3)) == ""  # all are, as its size says
    shared = make_partition(data, kind="resampled", num_clients=10**6, rng=Rng((0,)), samples_per_client=20, alpha=1.0)
    assert "class '2' (2)" in hardly_tested(data, shared)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_columns_of_a_table_are_units_and_times(suffix: str, tmp_path: Path) -> None:
    """Catches a patient's number that is a feature, 1 and 01 that are one patient, and times that are rounded."""
    columns = {
        "who": ["1", "01", "1", "2", "2", "9"],
        "when": ["2024-03-01", "2024-01-01 10:00", "2024-01-01T10:00", "2023-01-01", "2025-01-01", "2024-01-02"],
        "tick": [2**60 + 1, 2**60, 5, 4, 3, 2],
        "age": [1.5, 2.5, 3.5, 4.5, 5.5, 6.5],
        "dx": ["a", "b"] * 3,
    }
    path = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pytest.importorskip("pyarrow").table(columns), path)
    found = load_dataset(suffix, path=path, label="dx", unit="who", time="when", ignore=["tick"])
    assert found.x.tolist() == [[age] for age in columns["age"]]
    assert found.units.tolist() == [1, 0, 1, 2, 2, 3]
    assert found.times.tolist() == [3, 1, 1, 0, 4, 2]
    assert {c.name: c.kind for c in found.columns} | {"who": "unit", "when": "time"} == {
        c.name: c.kind for c in found.columns
    }
    exact = load_dataset(suffix, path=path, label="dx", time="tick", ignore=["who", "when"])
    assert exact.times.tolist() == [5, 4, 3, 2, 1, 0]
    with pytest.raises(ConfigError, match="'who' is the unit too"):
        load_dataset(suffix, path=path, label="dx", unit="who", time="who", ignore=["tick", "when"])
