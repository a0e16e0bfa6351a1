"""Every kind of partition: laws that hold for any settings, and faults that are named."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import image_dataset, labelled, some_labels
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.base.errors import ConfigError, DataError
from polyfed.base.rng import Rng
from polyfed.data.catalogue import PARTITION_OPTIONS, PARTITIONS
from polyfed.data.dataset import Dataset
from polyfed.data.partition.apportion import pick_test
from polyfed.data.partition.make import make_partition
from polyfed.data.partition.partition import Partition, Resampled

#: Of the kinds whose clients share no row.
OPTIONS = {
    "iid": {},
    "classes": {"classes_per_client": 3},
    "dirichlet": {"alpha": 0.5},
    "balanced-dirichlet": {"alpha": 0.5},
    "natural": {},
}


def check_laws(partition: Partition, dataset: Dataset, min_samples: int = 2) -> None:
    """What holds for every partition."""
    rows = np.concatenate([partition.train_rows, partition.test_rows])
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < len(dataset)
    for client in range(partition.num_clients):
        train, test = partition.train(client), partition.test(client)
        assert len(train) >= min_samples
        assert len(test) >= 1
        assert (np.diff(train) > 0).all()
        assert (np.diff(test) > 0).all()
    assert sum(len(partition.train(k)) for k in range(partition.num_clients)) == len(partition.train_rows)


def check_split(partition: Partition, dataset: Dataset, fraction: float) -> None:
    """What holds for a pooled split: proportions, and classes that can be learnt."""
    train = partition.counts(dataset.y, dataset.num_classes)
    test = partition.counts(dataset.y, dataset.num_classes, "test")
    both = train + test
    assert (train[both >= 2] >= 1).all()
    off = test - both * fraction
    assert (np.abs(off[both >= 2 / min(fraction, 1 - fraction)]) < 1 + 1e-6).all()
    assert (test.sum(axis=1) < np.maximum(1, both.sum(axis=1) * fraction) + 1).all()


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("split", ["pooled", "official"])
def test_laws_and_determinism(kind: str, split: str) -> None:
    dataset = some_labels(official=300)

    def make(seed: int) -> Partition:
        return make_partition(dataset, kind=kind, num_clients=8, rng=Rng((seed,)), split=split, **OPTIONS[kind])

    one = make(0)
    check_laws(one, dataset)
    assert one.hash == make(0).hash
    assert one.hash != make(1).hash
    assert len(one.train_rows) + len(one.test_rows) == len(dataset)  # every row is used
    mine, other = (set(p.train(0)) | set(p.test(0)) for p in (one, make(1)))
    assert (mine == other) == (kind == "natural")  # the seed decides who owns what, not only the split
    if split == "pooled":
        check_split(one, dataset, 0.2)
        assert not np.array_equal(one.train_rows, make(1).train_rows)
    else:
        assert one.train_rows.max() < 900
        assert one.test_rows.min() >= 900


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=2, max_size=7).filter(lambda sizes: sum(sizes) > 0),
    st.sampled_from(["iid", "classes", "dirichlet", "balanced-dirichlet"]),
    st.integers(1, 7),
    st.sampled_from([0.05, 0.2, 0.5, 0.9]),
    st.sampled_from([0.001, 0.1, 1.0, 1000.0]),
    st.integers(0, 3),
)
def test_any_class_sizes(sizes: list[int], kind: str, clients: int, fraction: float, alpha: float, seed: int) -> None:
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    dataset = labelled(y, len(sizes))
    options = {"classes": {"classes_per_client": 1 + seed % len(sizes)}, "iid": {}}.get(kind, {"alpha": alpha})
    try:
        partition = make_partition(
            dataset, kind=kind, num_clients=clients, rng=Rng((seed,)), test_fraction=fraction, min_samples=1, **options
        )
    except DataError:  # too few rows for the settings: an answer, as long as it comes as this error
        return
    assert partition.num_clients == clients
    check_laws(partition, dataset, min_samples=1)
    check_split(partition, dataset, fraction)


def shares(seeds: int, sizes: list[int], fraction: float, clients: int, **more) -> tuple[np.ndarray, np.ndarray]:
    """Share of each class, and of all rows, that is for testing: mean and standard error over seeds."""
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    dataset = labelled(y, len(sizes))
    found = []
    for seed in range(seeds):
        partition = make_partition(
            dataset, kind="iid", num_clients=clients, rng=Rng((seed,)), test_fraction=fraction, min_samples=1, **more
        )
        check_laws(partition, dataset, min_samples=1)
        train, test = (partition.counts(y, len(sizes), part).sum(axis=0) for part in ("train", "test"))
        assert more or (train + test).tolist() == sizes
        found.append([*(test / (train + test)), test.sum() / (train + test).sum()])
    return np.mean(found, axis=0), np.std(found, axis=0) / seeds**0.5


@pytest.mark.parametrize(
    ("sizes", "fraction", "clients"),
    [
        ([40, 1980, 1980], 0.2, 50),  # a rare class: mostly single rows, which rounding never tested
        ([45, 405], 0.15, 50),  # 9 rows each: 1.35 for testing
        ([30, 30, 300], 0.5, 12),
        ([7, 50, 3], 0.3, 1),
    ],
)
def test_the_share_of_every_class_is_right_in_the_mean(sizes: list[int], fraction: float, clients: int) -> None:
    """Catches counts that are rounded, by which classes of few rows are hardly ever tested."""
    mean, error = shares(300, sizes, fraction, clients)
    assert (np.abs(mean - fraction) <= 4.5 * error + 1e-12).all()
    assert (error < 0.02).all()  # it can tell


def test_a_cap_and_a_validation_part_keep_the_share_of_rare_classes_in_the_mean() -> None:
    """Catches a class that thinning, or tuning, loses."""
    y = np.random.default_rng(0).permutation(np.repeat([0, 1], [40, 3960]))
    dataset, kept, held = labelled(y, 2), [], []
    for seed in range(200):
        partition = make_partition(dataset, kind="iid", num_clients=50, rng=Rng((seed,)), samples_per_client=30)
        counts = [partition.counts(y, 2, part).sum(axis=0)[0] for part in ("train", "test")]
        kept.append(sum(counts) / 40)
        held.append(partition.validating(0.25, y, Rng((seed, "v"))).counts(y, 2, "test").sum(axis=0)[0] / counts[0])
    for found, share in ((kept, 30 / 80), (held, 0.25)):
        assert np.mean(found) == pytest.approx(share, abs=4.5 * np.std(found) / 200**0.5)


def test_resampled_clients_test_every_class_by_its_share_in_the_mean() -> None:
    dataset = labelled(np.random.default_rng(0).permutation(np.repeat(np.arange(20), 300)), 20)
    partition = make_partition(
        dataset, kind="resampled", num_clients=3000, rng=Rng((0,)), samples_per_client=30, alpha=1.0
    )
    train, test = (partition.counts(dataset.y, 20, part) for part in ("train", "test"))
    for rows in (1, 2, 3):  # of 30: too few for a share of 0.2 to be one
        found = test[train + test == rows]
        assert found.mean() / rows == pytest.approx(0.2, abs=4.5 * found.std() / rows / len(found) ** 0.5)


def test_a_client_splits_its_rows_in_the_same_way_whoever_else_there_is() -> None:
    """Catches draws that depend on other clients: a deployed site holds its own rows alone, and numbers its classes."""
    dataset = some_labels(600, clients=5)
    assert dataset.groups is not None
    keep = ~((dataset.groups == 3) & (dataset.y.numpy() == 1))  # client 3 lacks a class
    y, groups = dataset.y.numpy()[keep], dataset.groups[keep]
    everyone = make_partition(labelled(y, 6, groups=groups), kind="natural", num_clients=5, rng=Rng((0, "partition")))
    for client in range(5):
        rows = np.flatnonzero(groups == client)
        own = np.unique(y[rows], return_inverse=True)[1]
        alone = make_partition(
            labelled(own, own.max() + 1), kind="iid", num_clients=1, rng=Rng((0, "partition")), first_client=client
        )
        assert rows[alone.train(0)].tolist() == everyone.train(client).tolist()
        assert rows[alone.test(0)].tolist() == everyone.test(client).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.sampled_from([0.05, 0.2, 0.37, 0.9]), st.integers(0, 9))
def test_rounding_up_does_not_take_the_training_rows_that_rounding_down_leaves(
    rows: int, fraction: float, seed: int
) -> None:
    y = np.random.default_rng(seed).integers(0, 3, rows)
    least = rows - max(1, int(rows * fraction + 1e-9))
    test = pick_test(np.zeros(rows, dtype=np.int64), y, 1, fraction, Rng((seed,)), least=least).sum()
    assert test >= 1
    assert rows - test >= least


def test_iid_sizes() -> None:
    dataset = some_labels(1003)
    partition = make_partition(dataset, kind="iid", num_clients=10, rng=Rng((0,)))
    sizes = np.diff(partition.train_offsets) + np.diff(partition.test_offsets)
    assert sorted(sizes) == [100] * 7 + [101] * 3
    shares = partition.counts(dataset.y, 6).sum(axis=1)
    assert shares.min() > 75
    assert not np.array_equal(np.sort(partition.train(0)), np.arange(len(partition.train(0))))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 20), st.integers(1, 12), st.integers(0, 5))
def test_classes_gives_each_client_exactly_k_different_classes(classes: int, clients: int, k: int, seed: int) -> None:
    k = min(k, classes)
    dataset = labelled(np.arange(classes * 60) % classes, classes)
    partition = make_partition(
        dataset, kind="classes", num_clients=clients, rng=Rng((seed,)), classes_per_client=k, min_samples=1
    )
    both = partition.counts(dataset.y, classes) + partition.counts(dataset.y, classes, "test")
    assert ((both > 0).sum(axis=1) == k).all()
    holders = (both > 0).sum(axis=0)
    assert holders.max() - holders.min() <= 1  # the remainder of k N / L is spread
    if k * clients >= classes:
        assert holders.min() >= 1
        assert both.sum() == len(dataset)
    else:
        assert (holders > 0).sum() == k * clients


def test_classes_shares_are_mildly_uneven() -> None:
    dataset = labelled(np.arange(20000) % 10, 10)
    partition = make_partition(dataset, kind="classes", num_clients=50, rng=Rng((0,)), classes_per_client=2)
    both = partition.counts(dataset.y, 10) + partition.counts(dataset.y, 10, "test")
    held = both[both > 0]  # 100 shards of about 200
    assert 1.2 < held.max() / held.min() < 1.6  # U(0.4, 0.6) spans a factor of 1.5
    assert held.std() / held.mean() == pytest.approx(0.115, abs=0.03)


def test_dirichlet_alpha_sets_the_unevenness() -> None:
    dataset = labelled(np.arange(20000) % 10, 10)

    def spread(kind: str, alpha: float) -> float:
        partition = make_partition(dataset, kind=kind, num_clients=20, rng=Rng((3,)), alpha=alpha)
        counts = partition.counts(dataset.y, 10) / 80
        return float(counts.std())

    for kind in ("dirichlet", "balanced-dirichlet"):
        assert spread(kind, 0.2) > 2 * spread(kind, 2.0) > 4 * spread(kind, 200.0)


def test_dirichlet_is_per_class_and_redrawn() -> None:
    dataset = labelled(np.arange(3000) % 3, 3)
    partition = make_partition(dataset, kind="dirichlet", num_clients=20, rng=Rng((0,)), alpha=0.5, min_samples=20)
    sizes = np.diff(partition.train_offsets)
    assert sizes.min() >= 20
    assert sizes.max() > 2 * sizes.min()
    with pytest.raises(DataError, match=r"100 draws with alpha 0.01 .* raise alpha"):
        make_partition(dataset, kind="dirichlet", num_clients=100, rng=Rng((0,)), alpha=0.01)


def test_balanced_sizes_and_end() -> None:
    dataset = labelled(np.repeat(np.arange(4), [10, 20, 30, 943]), 4)
    for alpha in (0.001, 0.1, 1e6):
        partition = make_partition(dataset, kind="balanced-dirichlet", num_clients=10, rng=Rng((0,)), alpha=alpha)
        sizes = np.diff(partition.train_offsets) + np.diff(partition.test_offsets)
        assert sorted(sizes) == [100] * 7 + [101] * 3


def test_balanced_is_fast_enough() -> None:
    dataset = labelled(np.arange(60000) % 100, 100)
    start = time.process_time()
    make_partition(dataset, kind="balanced-dirichlet", num_clients=100, rng=Rng((0,)), alpha=0.3)
    assert time.process_time() - start < 5


def test_many_clients() -> None:
    dataset = labelled(np.arange(200_000) % 10, 10)
    start = time.process_time()
    for kind in ("iid", "balanced-dirichlet"):
        partition = make_partition(dataset, kind=kind, num_clients=20_000, rng=Rng((0,)), **OPTIONS[kind])
        assert partition.num_clients == 20_000
    assert time.process_time() - start < 20


@pytest.mark.parametrize("split", ["pooled", "official"])
def test_resampled_clients_share_rows_but_never_a_test_row_with_training(split: str) -> None:
    """Catches a test row that another client trains on, a row that one client holds twice, and a client that moves."""
    dataset = some_labels(official=300)
    settings_ = {"kind": "resampled", "num_clients": 400, "split": split, "samples_per_client": 30, "alpha": 0.3}
    one, again, other = (make_partition(dataset, rng=Rng((seed,)), **settings_) for seed in (0, 0, 1))
    assert isinstance(one, Resampled)
    assert one.num_clients == 400
    trained, tested = set(), set()
    numbers: list[int] = []
    sizes = (24, 6) if split == "pooled" else (22, 8)  # of official test rows there are 300 in 1200
    for client in range(400):
        train, test = one.train(client), one.test(client)
        assert len(train) + len(test) == 30
        assert sizes[1] - 3 < len(test) <= sizes[1]
        numbers.append(len(test))
        assert (np.diff(train) > 0).all()
        assert (np.diff(test) > 0).all()
        trained |= set(train)
        tested |= set(test)
    assert max(numbers) == sizes[1], "most clients hold enough rows for the rounded share"
    assert not trained & tested
    assert len(trained) + len(tested) == 1200  # 400 x 30 draws: every row is somebody's
    assert split == "pooled" or min(tested) == 900
    assert one.train(399).tolist() == again.train(399).tolist() != other.train(399).tolist()
    assert one.hash == again.hash != other.hash
    fewer = make_partition(dataset, rng=Rng((0,)), **settings_ | {"num_clients": 10**6})
    assert fewer.train(399).tolist() == one.train(399).tolist()  # who else there is does not matter
    with pytest.raises(IndexError):
        one.train(400)


def test_resampled_mixes_follow_alpha_and_testing_follows_training() -> None:
    dataset = labelled(np.arange(6000) % 10, 10)

    def counts(alpha: float) -> tuple[np.ndarray, np.ndarray]:
        partition = make_partition(
            dataset, kind="resampled", num_clients=200, rng=Rng((0,)), samples_per_client=50, alpha=alpha
        )
        return partition.counts(dataset.y, 10), partition.counts(dataset.y, 10, "test")

    for alpha in (0.1, 1.0, 1e6):
        train, test = counts(alpha)
        share = (train + test) / 50
        # The variance of one share of Dirichlet(alpha), and on top of it that of 50 draws.
        of_mix = 0.09 / (10 * alpha + 1)
        assert share.var() == pytest.approx(of_mix + (0.09 - of_mix) / 50, rel=0.1)
        assert share.mean(axis=0) == pytest.approx(0.1, abs=0.08)
        assert np.abs(test - (train + test) * 0.2).max() <= 1
        assert (train[train + test > 1] > 0).all()
    assert (counts(0.1)[0] > 0).sum(axis=1).mean() < 5 < (counts(1e6)[0] > 0).sum(axis=1).mean()


def test_resampled_keeps_nothing_per_client(tmp_path: Path) -> None:
    """Catches arrays that grow with the clients; counted in bytes, in memory and on disk."""
    sizes = {}
    for clients in (100, 10**6):
        partition = make_partition(
            some_labels(), kind="resampled", num_clients=clients, rng=Rng((0,)), samples_per_client=5, alpha=1.0
        )
        for client in range(0, clients, clients // 50):
            partition.train(client)
        partition.save(tmp_path / "p.npz")
        loaded = Partition.load(tmp_path / "p.npz")
        assert loaded.hash == partition.hash
        assert loaded.test(99).tolist() == partition.test(99).tolist()
        arrays = (partition.train_rows, partition.train_offsets, partition.test_rows, partition.test_offsets)
        sizes[clients] = sum(a.nbytes for a in arrays)
        assert sizes[clients] == 8 * (1200 + 2 * 7)
    assert partition._drawn.cache_info().maxsize == 1024


def test_resampled_takes_what_there_is() -> None:
    """Catches a client that wants more of a class than there is, and settings that cannot be met."""
    dataset = labelled(np.repeat([0, 1, 2], [100, 10, 1]), 3)  # the one row of class 2 is for training only
    kind = {"kind": "resampled", "num_clients": 50, "rng": Rng((0,)), "alpha": 0.01}
    partition = make_partition(dataset, samples_per_client=70, **kind)
    both = partition.counts(dataset.y, 3) + partition.counts(dataset.y, 3, "test")
    assert (both.sum(axis=1) == 70).all()
    assert both[:, 1].max() == 8
    assert both[:, 2].max() == 0
    with pytest.raises(DataError, match=r"at most 88 together, the training rows of the classes"):
        make_partition(dataset, samples_per_client=89, **kind)
    with pytest.raises(DataError, match=r"3 rows are 1 for training and 2 for testing; .* at least 2"):
        make_partition(dataset, samples_per_client=3, test_fraction=0.7, **kind)


def test_resampled_clients_validate_on_rows_of_the_training_pool() -> None:
    """Catches a test row that is seen while hyper-parameters are chosen."""
    dataset = some_labels()
    kind = {"kind": "resampled", "num_clients": 300, "rng": Rng((0,)), "alpha": 1.0, "samples_per_client": 20}
    whole = make_partition(dataset, **kind)
    chosen = whole.validating(0.25, dataset.y, Rng((1,)))
    assert chosen.num_clients == 300
    assert chosen.hash != whole.hash
    assert not set(chosen.train_rows) & set(chosen.test_rows)
    assert {*chosen.train_rows, *chosen.test_rows} == set(whole.train_rows)
    held = [(len(chosen.train(client)), len(chosen.test(client))) for client in range(300)]
    assert {sum(sizes) for sizes in held} == {16}
    assert max(test for _, test in held) == 4
    assert set(np.concatenate([chosen.test(client) for client in range(300)])) <= set(chosen.test_rows)
    with pytest.raises(DataError, match="expected at least 16 for training"):
        make_partition(dataset, **kind, min_samples=16).validating(0.25, dataset.y, Rng((1,)))


def test_official_test_rows_follow_training_proportions() -> None:
    dataset = some_labels(6000, official=1500)
    for kind in ("classes", "dirichlet", "balanced-dirichlet"):
        partition = make_partition(dataset, kind=kind, num_clients=8, rng=Rng((1,)), split="official", **OPTIONS[kind])
        train, test = partition.counts(dataset.y, 6), partition.counts(dataset.y, 6, "test")
        expected = train / train.sum(axis=0) * test.sum(axis=0)
        assert np.abs(test - expected).max() <= 1
        assert (test[train == 0] == 0).all()


def test_tests_of_another_draw_are_of_equal_size_and_say_nothing_of_training() -> None:
    """Catches test rows in the training proportions, and another draw of the training rows."""
    dataset = some_labels(6000, official=1500)
    kind = {"kind": "balanced-dirichlet", "num_clients": 10, "rng": Rng((1,)), "split": "official", "alpha": 0.3}
    own, other = make_partition(dataset, **kind), make_partition(dataset, **kind, tests="independent")
    check_laws(other, dataset)
    assert np.array_equal(own.train_rows, other.train_rows)
    assert {len(other.test(k)) for k in range(10)} == {150}
    shares = [
        [p.counts(dataset.y, 6, part)[k] / len(getattr(p, part)(k)) for k in range(10)]
        for p, part in ((own, "train"), (own, "test"), (other, "test"))
    ]
    train, same, independent = map(np.array, shares)
    assert np.abs(train - same).sum(axis=1).mean() < 0.5 < np.abs(train - independent).sum(axis=1).mean()
    with pytest.raises(ConfigError, match="it deals official test rows"):
        make_partition(dataset, **{**kind, "split": "pooled"}, tests="independent")


def test_official_gives_every_client_a_test_row() -> None:
    y = np.concatenate([np.arange(300) % 2, np.arange(30) % 2])
    dataset = labelled(y, 2, test_rows=np.arange(300, 330))
    for seed in range(20):
        partition = make_partition(
            dataset, kind="dirichlet", num_clients=12, rng=Rng((seed,)), split="official", alpha=0.5
        )
        check_laws(partition, dataset)


def test_a_client_of_single_rows_gives_one_to_testing() -> None:
    dataset = labelled(np.arange(4), 4)
    partition = make_partition(dataset, kind="iid", num_clients=1, rng=Rng((0,)))
    assert (len(partition.train(0)), len(partition.test(0))) == (3, 1)


@pytest.mark.parametrize("split", ["pooled", "official"])
def test_cap_keeps_the_mix(split: str) -> None:
    dataset = some_labels(6000, official=1000)
    settings_ = {"kind": "dirichlet", "num_clients": 8, "rng": Rng((1,)), "split": split, "alpha": 1.0}
    whole = make_partition(dataset, **settings_)
    capped = make_partition(dataset, **settings_, samples_per_client=60)
    check_laws(capped, dataset)
    sizes = np.diff(capped.train_offsets) + np.diff(capped.test_offsets)
    assert (sizes == 60).all()
    assert set(capped.train_rows) | set(capped.test_rows) <= set(whole.train_rows) | set(whole.test_rows)
    mix = whole.counts(dataset.y, 6) / np.diff(whole.train_offsets)[:, None]
    small = capped.counts(dataset.y, 6) / np.diff(capped.train_offsets)[:, None]
    assert np.abs(mix - small).max() < 2.5 / 48
    fraction = 1 / 6 if split == "official" else 0.2
    assert np.diff(capped.test_offsets).mean() == pytest.approx(60 * fraction, abs=0.5)


@pytest.mark.parametrize("kind", ["iid", "natural"])
def test_a_cap_takes_rows_without_a_label_by_their_share(kind: str) -> None:
    """Catches rows without a label counted as the last class of the client before, which is thinned in their place."""
    y = np.tile([-1, -1, 0, 1], 100)
    data = labelled(y, 2, groups=np.repeat(np.arange(4), 100), unlabelled=True)
    found = make_partition(data, kind=kind, num_clients=4, rng=Rng((0,)), samples_per_client=40)
    for client in range(4):
        train, test = y[found.train(client)], y[found.test(client)]
        assert len(train) + len(test) == 40
        assert (test >= 0).all()
        assert 3 <= len(test) <= 5  # a fifth of the labelled rows
        assert abs((train < 0).sum() - 20) <= (1 if kind == "natural" else 6)


def test_official_test_rows_follow_the_labelled_training_rows() -> None:
    """Catches rows without a label that count as a class of another client."""
    y = np.concatenate([[0] * 20 + [-1] * 60, [1] * 20 + [-1] * 20, [0, 1] * 20])
    owner = np.repeat([0, 1, 0], [80, 40, 40])
    data = labelled(y, 2, groups=owner, unlabelled=True, test_rows=np.arange(120, 160))
    found = make_partition(data, kind="iid", num_clients=3, rng=Rng((0,)), split="official")
    train, test = (found.counts(data.strata, 2, which) for which in ("train", "test"))
    assert np.abs(test - 20 * train / train.sum(axis=0)).max() < 1
    assert len(found.train_rows) == 120


def test_kinds_that_deal_classes_need_the_label_of_every_row() -> None:
    data = labelled(np.tile([-1, -1, 0, 1], 100), 2, unlabelled=True)
    for kind, options in {**OPTIONS, "resampled": {"alpha": 0.5, "samples_per_client": 20}}.items():
        if kind not in ("iid", "natural"):
            with pytest.raises(ConfigError, match=r"deals classes, and 200 of 400 rows .* choose 'iid' or 'natural'"):
                make_partition(data, kind=kind, num_clients=4, rng=Rng((0,)), **options)
    groups = np.repeat([0, 1], [2, 398])
    with pytest.raises(DataError, match=r"client 0 has 2 training and 0 test rows.* a row without a label is no test"):
        make_partition(replace(data, groups=groups), kind="natural", num_clients=2, rng=Rng((0,)))


def test_natural_follows_groups() -> None:
    dataset = some_labels(600, clients=5)
    assert dataset.groups is not None
    for number in (None, 0, 5):
        partition = make_partition(dataset, kind="natural", num_clients=number, rng=Rng((0,)))
        assert partition.num_clients == 5
        for client in range(5):
            rows = np.concatenate([partition.train(client), partition.test(client)])
            assert set(rows) == set(np.flatnonzero(dataset.groups == client))
    with pytest.raises(ConfigError, match=r"got 3, but 'labels' has 5 groups.* partition.groups = .largest."):
        make_partition(dataset, kind="natural", num_clients=3, rng=Rng((0,)))
    with pytest.raises(ConfigError, match=r"set it to 5, or to fewer with partition.groups = .largest."):
        make_partition(dataset, kind="natural", num_clients=6, rng=Rng((0,)))
    largest = make_partition(dataset, kind="natural", num_clients=3, rng=Rng((0,)), groups="largest")
    top = np.sort(np.argsort(-np.bincount(dataset.groups), kind="stable")[:3])
    assert largest.about["group_names"] == [str(g) for g in top]
    assert set(dataset.groups[largest.train(0)]) == {top[0]}


def test_natural_with_gaps_and_tiny_groups() -> None:
    groups = np.repeat([0, 4, 9], [10, 1, 10])
    dataset = labelled(np.arange(21) % 2, 2, groups=groups, group_names=tuple("abcdefghij"))
    with pytest.raises(
        DataError, match=r"client 1 has 0 training .* \(1 of 3 clients have too few\); lower partition.min_samp"
    ):
        make_partition(dataset, kind="natural", num_clients=None, rng=Rng((0,)))
    kept = make_partition(dataset, kind="natural", num_clients=2, rng=Rng((0,)), groups="largest")
    assert kept.about["group_names"] == ["a", "j"]


@pytest.mark.parametrize(
    ("settings_", "faults"),
    [
        ({"kind": "iids"}, ["did you mean 'iid'"]),
        ({"kind": "iid", "alpha": 1.0}, ["alpha: not an option"]),
        ({"kind": "dirichlet"}, ["alpha: got None"]),
        ({"kind": "dirichlet", "alpha": float("nan")}, ["alpha: got nan"]),
        ({"kind": "dirichlet", "alpha": -1, "test_fraction": 1.0, "min_samples": 0}, ["test_fr", "min_s", "alpha"]),
        ({"kind": "classes", "classes_per_client": 7}, ["from 1 to 6"]),
        ({"kind": "classes"}, ["classes_per_client: got None"]),
        ({"kind": "iid", "num_clients": 0}, ["num_clients: got 0"]),
        ({"kind": "iid", "split": "both"}, ["split: got 'both'"]),
        ({"kind": "iid", "samples_per_client": 2}, ["at least 3"]),
        ({"kind": "natural", "groups": "first"}, ["groups: got 'first'"]),
        ({"kind": "resampled", "alpha": 1.0}, ["samples_per_client: missing"]),
    ],
)
def test_settings_are_checked_together(settings_: dict, faults: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_partition(some_labels(), **{"num_clients": 8, "rng": Rng((0,)), **settings_})
    assert len(caught.value.faults) == len(faults)
    for said, fault in zip(caught.value.faults, faults, strict=True):
        assert fault in said


def test_too_few_rows() -> None:
    def fails(says: str, dataset: Dataset, **more) -> None:
        with pytest.raises(DataError, match=says):
            make_partition(dataset, **{"rng": Rng((0,)), "kind": "iid", **more})

    fails("10 rows for 11 clients", labelled(np.arange(10) % 2, 2), num_clients=11)
    fails(
        r"client 0 has 1 training and 1 test rows; .* lower clients.count",
        labelled(np.arange(10) % 2, 2),
        num_clients=5,
    )
    fails(
        "class 1 has 2 rows for 4 clients",
        labelled(np.repeat([0, 1], [50, 2]), 2),
        num_clients=4,
        kind="classes",
        classes_per_client=2,
    )
    fails(
        "only 2 classes have rows", labelled(np.arange(90) % 2, 3), num_clients=4, kind="classes", classes_per_client=3
    )
    fails("no official test rows", some_labels(), num_clients=2, split="official")
    fails("has no groups", image_dataset(), num_clients=None, kind="natural")


def test_options_and_summaries_name_the_same_kinds() -> None:
    assert PARTITIONS.keys() == PARTITION_OPTIONS.keys() == {*OPTIONS, "resampled"}
