"""Deals the rows of a data set to clients, for training and for testing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from polyfed.base.errors import ConfigError, DataError
from polyfed.base.rng import Rng
from polyfed.base.text import nearest
from polyfed.data.catalogue import CLASSLESS, PARTITION_OPTIONS, PARTITIONS
from polyfed.data.dataset import Dataset
from polyfed.data.partition.apportion import (
    Bools,
    Ints,
    cap_rows,
    pick_later,
    pick_test,
    pick_units,
    size_of_test,
)
from polyfed.data.partition.kinds import (
    deal_balanced,
    deal_classes,
    deal_dirichlet,
    deal_iid,
    deal_like,
)
from polyfed.data.partition.partition import Partition, Pick, Resampled, grouped

#: How a client's rows become training and test rows.
SPLITS = ("pooled", "official", "groups", "time")


def make_partition(
    dataset: Dataset,
    *,
    kind: str,
    num_clients: int | None,
    rng: Rng,
    test_fraction: float = 0.2,
    split: str = "pooled",
    min_samples: int = 2,
    samples_per_client: int | None = None,
    first_client: int = 0,
    **options: Any,
) -> Partition:
    """Deal the rows of a data set to clients.

    With ``split="pooled"`` official training and test rows are one pool; each client's part of it is split
    into train and test, class by class, by draws that depend on the client's number and on its own rows alone.
    With ``split="official"`` training rows come from the official training part, and the official test rows are
    dealt in each client's own class proportions (for "natural": by group). "groups" and "time" split a client's rows as
    "pooled" does, but by unit (all rows of a patient on one side) or by time (the later rows for testing).

    A row without a label is never a test row. With "groups" and "time" those of test units, or from the first test
    row's moment on, are nobody's: who trains on them has seen the patients, or the time, of its test.

    Args:
        dataset: the data set.
        kind: one of ``catalogue.PARTITIONS``.
        num_clients: number of clients; None or 0 means one per group, for "natural" only.
        rng: names the randomness; the same name gives the same partition.
        test_fraction: fraction of a client's labelled rows for testing, above 0 and below 1; not for "official".
        split: one of ``SPLITS``.
        min_samples: the fewest training rows of a client; each client also has at least one test row.
        samples_per_client: the most train and test rows together of a client, in its own class proportions;
            None for no limit. For "resampled" it is required, and is their exact number.
        first_client: number of the first client: a node that has the rows of client k alone splits them as a
            simulation does, with ``num_clients=1`` and ``first_client=k``.
        options: options of the kind: ``classes_per_client`` for "classes", ``alpha`` for both Dirichlet kinds and
            "resampled", for "natural" ``groups="largest"``, which permits fewer clients than groups, and for
            "balanced-dirichlet" with split "official" ``tests="independent"``: test rows have class mixes of their own.

    Raises:
        ConfigError: an unknown kind or option, or a value out of range; all faults at once.
        DataError: the data set lacks what the kind needs, or has too few rows.
    """
    clients = num_clients or 0
    about = {
        "dataset": dataset.name,
        "rows": len(dataset),
        "kind": kind,
        "num_clients": clients,
        **_check_settings(dataset, kind, num_clients, test_fraction, split, min_samples, samples_per_client, options),
        "seed": list(rng.key),
    }
    y = dataset.strata
    pool = np.arange(len(y), dtype=np.int64)
    if split == "official":
        if dataset.test_rows is None:
            raise DataError(f"split 'official': {dataset.name!r} has no official test rows; use split='pooled'")
        if kind != "resampled" and len(dataset.test_rows) < clients:
            raise DataError(
                f"split 'official': {dataset.name!r} has {len(dataset.test_rows)} official test rows for {clients} "
                "clients, and each needs a row of its own; use split='pooled', or kind 'resampled', whose clients share"
            )
        pool = np.setdiff1d(pool, dataset.test_rows)
    if kind == "resampled":
        return _resample(dataset, y, pool, about, rng)
    owner = np.full(len(y), -1, dtype=np.int64)
    if kind == "natural":
        if split == "official" and dataset.groups is not None:
            _check_groups_of_both(dataset, dataset.groups, pool)
        owner, names = _natural(dataset, pool, clients, options.get("groups"))
        about |= {"num_clients": len(names), "group_names": names}
        clients = len(names)
    else:
        if len(pool) < clients:
            raise DataError(f"{dataset.name!r} has {len(pool)} rows for {clients} clients; lower clients.count")

        def enough(sizes: Ints) -> Bools:
            return sizes - (size_of_test(sizes, test_fraction) if split != "official" else 0) >= min_samples

        owner[pool] = _deal(kind, y[pool], dataset.num_classes, clients, options, enough, rng)
    train, test = np.zeros((2, len(y)), dtype=np.bool_)
    train[pool] = owner[pool] >= 0
    if split == "official" and dataset.test_rows is not None:
        rows = dataset.test_rows
        if options.get("tests"):
            owner[rows] = _deal(kind, y[rows], dataset.num_classes, clients, options, None, rng.at("test"))
        elif kind != "natural":  # by group, test rows have their owners already
            known = train & (y >= 0)
            held = np.bincount(owner[known] * dataset.num_classes + y[known], minlength=clients * dataset.num_classes)
            owner[rows] = deal_like(held.reshape(clients, -1), y[rows], rng.at("test").numpy())
        test[rows] = owner[rows] >= 0
    if samples_per_client is not None:
        # A site that has its own file alone knows its own share of test rows only.
        for_test = _shares(owner, train, test, clients if kind == "natural" else 0, samples_per_client)
        for name, mask, limit in (("cap train", train, samples_per_client - for_test), ("cap test", test, for_test)):
            rows = np.flatnonzero(mask)
            mask[rows] = cap_rows(owner[rows], y[rows], clients, limit, rng.at(name), first=first_client)
    if split != "official":
        rows = np.flatnonzero(train)
        pick = splitter(dataset, split, kind, least=min_samples, first=first_client)
        taken = pick(rows, owner[rows], clients, test_fraction, rng.at("split"))
        test[rows], train[rows] = taken & (y[rows] >= 0), ~taken
    partition = Partition(*grouped(owner, train, clients), *grouped(owner, test, clients), about)
    _check_sizes(partition, kind, min_samples, split, partial=dataset.num_unlabelled > 0)
    return partition


def splitter(dataset: Dataset, split: str, kind: str, *, least: int = 1, first: int = 0) -> Pick:
    """Return the function that chooses test rows for "pooled", "groups" or "time", and what no client may train on.

    Args:
        dataset: the data set; for "groups" its units are kept whole, or without units its groups.
        split: the split.
        kind: the kind of partition.
        least: training rows of a client, where the split permits.
        first: number of the client that owner 0 stands for.

    Raises:
        DataError: the split is "groups" and the data set has no units, nor groups that are not clients.
    """
    y = dataset.strata
    units = dataset.units if dataset.units is not None or kind == "natural" else dataset.groups
    if split == "groups" and units is None:
        raise DataError(
            f"split 'groups': {dataset.name!r} does not say which rows belong together, such as those of a patient; "
            + ("its groups are the clients themselves; " if dataset.groups is not None else "")
            + "read the data with an array 'units' (npz) or a column 'unit' (see docs/data.md)"
        )

    def pick(rows: Ints, owner: Ints, clients: int, fraction: float, rng: Rng) -> Bools:
        if split == "groups" and units is not None:
            # Two hospitals may both have a patient 1, and a deployed client knows its own patients only.
            whole = units[rows] + (owner * (units.max() + 1) if kind == "natural" else 0)
            return pick_units(owner, y[rows], clients, fraction, rng, units=whole, first=first)
        if split == "time":
            moments = rows if dataset.times is None else dataset.times[rows]
            return pick_later(owner, y[rows], clients, fraction, rng, times=moments, least=least, first=first)
        return pick_test(owner, y[rows], clients, fraction, rng, least=least, first=first)

    return pick


def _deal(
    kind: str, y: Ints, num_classes: int, clients: int, options: Mapping[str, Any], enough: Any, rng: Rng
) -> Ints:
    draw = rng.at("deal").numpy()
    if kind == "iid":
        return deal_iid(len(y), clients, draw)
    if kind == "classes":
        return deal_classes(y, num_classes, clients, options["classes_per_client"], draw)
    if kind == "dirichlet":
        return deal_dirichlet(y, num_classes, clients, options["alpha"], enough, draw)
    return deal_balanced(y, num_classes, clients, options["alpha"], draw)


def _resample(dataset: Dataset, y: Ints, pool: Ints, about: dict[str, Any], rng: Rng) -> Resampled:
    if dataset.test_rows is not None and about["split"] == "official":
        return Resampled.of(pool, dataset.test_rows, y, dataset.num_classes, len(dataset.test_rows) / len(y), about)
    for_test = pick_test(np.zeros_like(y), y, 1, about["test_fraction"], rng.at("split"))
    return Resampled.of(pool[~for_test], pool[for_test], y, dataset.num_classes, about["test_fraction"], about)


def _natural(dataset: Dataset, pool: Ints, clients: int, choice: str | None) -> tuple[Ints, list[str]]:
    """Return the client of each row of the whole data set (-1: no client), and the name of each client's group."""
    if dataset.groups is None:
        raise DataError(
            f"partition 'natural': {dataset.name!r} has no groups; choose another kind; a table of your own "
            "has groups by the option group of csv, arrays by the array groups of npz"
        )
    sizes = np.bincount(dataset.groups[pool], minlength=int(dataset.groups.max()) + 1)
    present = np.flatnonzero(sizes)
    wanted = clients or len(present)
    if wanted > len(present) or (wanted < len(present) and choice != "largest"):
        raise ConfigError(
            f"clients.count: got {wanted}, but {dataset.name!r} has {len(present)} groups; set it to {len(present)}"
            + (
                ', or partition.groups = "largest" to keep the largest groups only'
                if wanted < len(present)
                else ", or to fewer"
                if choice == "largest"
                else ', or to fewer with partition.groups = "largest"'
            )
        )
    # The groups with the most rows (ties: lower number), in the order of their numbers.
    kept = np.sort(present[np.argsort(-sizes[present], kind="stable")[:wanted]])
    client_of = np.full(len(sizes), -1, dtype=np.int64)
    client_of[kept] = np.arange(wanted)
    return client_of[dataset.groups], [dataset.group_names[g] if dataset.group_names else str(g) for g in kept]


def _check_groups_of_both(dataset: Dataset, groups: Ints, pool: Ints) -> None:
    if not np.intersect1d(groups[pool], groups[dataset.test_rows]).size:
        raise DataError(
            f"split 'official': the official test rows of {dataset.name!r} belong to groups without training rows, so "
            "no client of kind 'natural' has both; set data.split = \"pooled\", testing each group on a part of its "
            "own rows, or take another kind of partition, which deals these test rows to all clients"
        )


def _shares(owner: Ints, train: Bools, test: Bools, clients: int, cap: int) -> Ints:
    """Return how many of a client's ``cap`` rows are for testing.

    The share is that of each of ``clients`` clients, ``(clients,)``; or, if it is 0, that of all rows, ``(1,)``.
    """
    owners = owner if clients else np.zeros_like(owner)
    tests, both = (np.bincount(owners[mask], minlength=max(1, clients)) for mask in (test, train | test))
    return np.where(tests > 0, np.maximum(1, (tests / np.maximum(both, 1) * cap + 0.5).astype(np.int64)), 0)


#: Test rows of a class below which its accuracy moves by more than 20 points with a single row. A class is named if it
#: has, besides, less than half of the average of all classes, or none, and that average is at least 2: in a smaller
#: test set no class is tested, and its size says so.
LEAST_TESTED = 5


def hardly_tested(dataset: Dataset, partition: Partition) -> str:
    """Return a warning that names the classes that clients train on and hardly test; "" if there are none.

    A class counts the test rows of all clients that train on it, together: that a single client tests a rare class by
    chance or not is no cause for a warning.
    """
    if dataset.y.is_floating_point():
        return ""
    counts = partition.tested(dataset.y.cpu().numpy(), dataset.num_classes)
    average = counts[counts >= 0].mean()
    rare = (counts >= 0) & (counts < LEAST_TESTED) & ((2 * counts < average) | (counts == 0))
    few = [int(c) for c in np.flatnonzero(rare)]
    if not few or average < 2:
        return ""
    named = ", ".join(f"{dataset.classes[c]!r} ({counts[c]})" for c in few[:10])
    more = f" and {len(few) - 10} more" if len(few) > 10 else ""
    return (
        f"hardly tested: class {named}{more}: fewer than {LEAST_TESTED} test rows in all clients that train on it, so "
        "its results are chance; raise data.test_fraction, or gather more rows"
    )


def _check_sizes(partition: Partition, kind: str, min_samples: int, split: str, *, partial: bool) -> None:
    train, test = np.diff(partition.train_offsets), np.diff(partition.test_offsets)
    bad = np.flatnonzero((train < min_samples) | (test < 1))
    if len(bad):
        k = int(bad[0])
        advice = {
            "natural": 'lower partition.min_samples, or keep large groups: fewer clients, partition.groups = "largest"',
            "dirichlet": "raise partition.alpha, or lower clients.count or partition.min_samples",
        }.get(kind, "lower clients.count or partition.min_samples, or raise partition.samples_per_client")
        if split in ("groups", "time"):
            whole = {"groups": "units (patients, devices)", "time": "moments in time"}[split]
            advice = f"split {split!r} keeps {whole} whole, so a client needs rows of at least two; {advice}"
        if partial and test[k] < 1:
            advice = f"a row without a label is no test row: label rows of this client, or leave it out; or {advice}"
        raise DataError(
            f"partition {kind!r}: client {k} has {train[k]} training and {test[k]} test rows; expected at "
            f"least {min_samples} and 1 ({len(bad)} of {partition.num_clients} clients have too few); "
            f"{advice}"
        )


def _check_settings(
    dataset: Dataset,
    kind: str,
    num_clients: int | None,
    test_fraction: float,
    split: str,
    min_samples: int,
    samples_per_client: int | None,
    options: Mapping[str, Any],
) -> dict[str, object]:
    """The settings as they go into ``about``; every fault is reported at once."""
    if kind not in PARTITIONS:
        raise ConfigError(f"kind: got {kind!r}; expected one of {', '.join(PARTITIONS)}{nearest(kind, PARTITIONS)}")
    known = PARTITION_OPTIONS[kind]
    faults = [
        f"{name}: not an option of partition {kind!r}; it has {', '.join(known) or 'none'}"
        for name in sorted(options.keys() - set(known))
    ]
    if (kind != "natural" or num_clients not in (None, 0)) and not _whole(num_clients, 1):
        faults.append(f"num_clients: got {num_clients!r}; expected a whole number of at least 1")
    if split not in SPLITS:
        faults.append(f"split: got {split!r}; expected one of {', '.join(SPLITS)}")
    if kind == "resampled" and split in ("groups", "time"):
        faults.append(f"split: got {split!r}; kind 'resampled' deals single rows of a pool: 'pooled' or 'official'")
    if not 0 < test_fraction < 1:
        faults.append(f"test_fraction: got {test_fraction!r}; expected a fraction above 0 and below 1")
    if not _whole(min_samples, 1):
        faults.append(f"min_samples: got {min_samples!r}; expected a whole number of at least 1")
    elif samples_per_client is not None and not _whole(samples_per_client, min_samples + 1):
        faults.append(
            f"samples_per_client: got {samples_per_client!r}; expected a whole number of at least "
            f"{min_samples + 1} (min_samples for training and one for testing)"
        )
    if dataset.task == "regression" and kind not in CLASSLESS:
        faults.append(
            f"kind: got {kind!r}, which deals classes; a regression has none: "
            f"choose {' or '.join(map(repr, CLASSLESS))}"
        )
    if dataset.num_unlabelled and kind not in CLASSLESS:
        faults.append(
            f"kind: got {kind!r}, which deals classes, and {dataset.num_unlabelled} of {len(dataset)} rows have no "
            f"label: choose {' or '.join(map(repr, CLASSLESS))}"
        )
    if kind == "resampled" and samples_per_client is None:
        faults.append("samples_per_client: missing; partition 'resampled' draws this number of rows for each client")
    if "classes_per_client" in known:
        k = options.get("classes_per_client")
        if not _whole(k, 1) or int(k or 0) > dataset.num_classes:
            faults.append(
                f"classes_per_client: got {k!r}; expected a whole number from 1 to {dataset.num_classes}, "
                f"the classes of {dataset.name!r}"
            )
    if "alpha" in known:
        alpha = options.get("alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 1e-3 <= alpha <= 1e6:
            faults.append(f"alpha: got {alpha!r}; expected a number from 0.001 (very uneven) to 1000000 (even)")
    if "groups" in known and options.get("groups") not in (None, "largest"):
        faults.append(f"groups: got {options['groups']!r}; expected 'largest', or leave it out")
    if "tests" in known and options.get("tests") not in (None, "independent"):
        faults.append(f"tests: got {options['tests']!r}; expected 'independent', or leave it out")
    elif options.get("tests") and split != "official":
        faults.append(f"tests: got 'independent' with split {split!r}; it deals official test rows: split = 'official'")
    if faults:
        raise ConfigError(*faults)
    return {
        "split": split,
        "test_fraction": None if split == "official" else test_fraction,
        "min_samples": min_samples,
        "samples_per_client": samples_per_client,
        "options": dict(options),
    }


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
