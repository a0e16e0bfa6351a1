"""Metrics: equal to slow definitions and to scikit-learn's, and additive over batches and clients."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.metrics.catalogue import METRICS, aim, of_task, reaches
from polyfed.metrics.metrics import COMPUTED, by_class, plus, read_sums, sent_sums, tallies, value
from polyfed.metrics.tallies import EDGES, Predictions, Scores

CLASSES, TARGETS = of_task("classification"), of_task("regression")


def rows(seed: int, n: int, classes: int, *, coarse: bool = False, absent: int | None = None) -> Predictions:
    """Random labels and probabilities; coarse ones have many ties, and ``absent`` is a class without rows."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(1, 4, (n, classes)).astype(float) if coarse else rng.gamma(0.5, size=(n, classes)) + 1e-9
    y = rng.choice([k for k in range(classes) if k != absent], n)
    return Predictions(y.astype(np.int64), scores / scores.sum(axis=1, keepdims=True))


def found(name: str, seen: Predictions) -> float | None:
    return value(name, tallies([name], seen))


def pairs(y: np.ndarray, score: np.ndarray) -> float | None:
    """AUROC by its definition: every pair of a row in the class and a row outside."""
    each = [(a > b) + (a == b) / 2 for a, b in itertools.product(score[y], score[~y])]
    return float(np.mean(each)) if each else None


def precision(y: np.ndarray, score: np.ndarray) -> float | None:
    """Average precision by its definition: at the score of each row of the class, the share of the class above it."""
    each = [y[score >= a].mean() for a in score[y]]
    return float(np.mean(each)) if each else None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(2, 4), st.booleans())
def test_areas_are_their_definitions_with_ties_and_absent_classes(seed: int, n: int, classes: int, coarse: bool):
    seen = rows(seed, n, classes, coarse=coarse)
    for name, slow in (("auroc", pairs), ("auprc", precision)):
        each = [slow(seen.y == k, seen.scores[:, k]) for k in range(classes)]
        got = by_class(name, tallies([name], seen), ())
        assert list(got.values()) == [None if v is None else pytest.approx(v, abs=1e-12) for v in each]
        there = [v for v in each if v is not None]
        expected = each[1] if classes == 2 else float(np.mean(there)) if there else None
        assert found(name, seen) == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_counts_by_hand():
    """Catches sensitivity and specificity of the wrong class, and classes that do not occur counted as 0."""
    seen = Predictions(np.array([0, 0, 0, 1, 1]), np.eye(2)[[0, 0, 1, 1, 0]])
    assert found("accuracy", seen) == 3 / 5
    assert found("sensitivity", seen) == 1 / 2
    assert found("specificity", seen) == 2 / 3
    assert found("balanced_accuracy", seen) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found("macro_f1", seen) == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert by_class("sensitivity", tallies(["sensitivity"], seen), ("well", "ill")) == {"well": 2 / 3, "ill": 1 / 2}
    alone = Predictions(np.array([2, 2]), np.eye(4)[[2, 1]])  # classes 0 and 3 are nowhere, 1 is predicted alone
    assert found("balanced_accuracy", alone) == 1 / 2
    assert found("macro_f1", alone) == pytest.approx((0 + 2 / 3) / 2)
    assert found("auroc", alone) is None
    assert found("sensitivity", alone) == 1 / 2
    healthy = Predictions(np.array([0, 0]), np.eye(2))
    assert found("sensitivity", healthy) is None
    assert found("auprc", healthy) is None
    assert found("specificity", healthy) == 1 / 2


def test_calibration_and_squares_by_hand():
    """Catches bins of another number, an edge in the wrong bin, and the halves of two classes."""
    seen = Predictions(np.array([0, 0, 1]), np.array([[0.95, 0.05], [0.65, 0.35], [0.6, 0.4]]))
    # 0.6 = 9/15 ends bin 8; 0.65 is in bin 9, and 0.95 in bin 14
    assert found("ece", seen) == pytest.approx((0.05 + 0.35 + 0.6) / 3)
    assert found("brier", seen) == pytest.approx((0.05**2 + 0.35**2 + 0.6**2) / 3)
    three = Predictions(np.array([2]), np.array([[0.5, 0.25, 0.25]]))
    assert found("brier", three) == pytest.approx(0.25 + 0.0625 + 0.5625)


def test_errors_by_hand_also_far_from_zero():
    """Catches digits lost by sums of squares: targets of a billion that differ by ones."""
    y = 1e9 + np.array([0.0, 1, 2, 3])
    seen = Predictions(y, (y + np.array([1, -1, 1, 1]))[:, None])
    assert found("mae", seen) == 1
    assert found("rmse", seen) == 1
    assert found("r2", seen) == pytest.approx(1 - 4 / 5)
    halves = [Predictions(seen.y[at], seen.scores[at]) for at in (slice(0, 1), slice(1, 4))]
    assert value("r2", plus(*(tallies(["r2"], half) for half in halves))) == pytest.approx(1 - 4 / 5, abs=1e-12)
    assert found("r2", Predictions(np.ones(3), np.ones((3, 1)))) is None


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_adds_over_batches_and_clients(name: str):
    rng = np.random.default_rng(1)
    numbers = Predictions(rng.normal(5, 3, 60), rng.normal(5, 3, (60, 1)))
    whole = numbers if name in TARGETS else rows(3, 60, 3, coarse=True)
    cuts = [(0, 7), (7, 8), (8, 60)]
    parts = [tallies([name], Predictions(whole.y[a:b], whole.scores[a:b])) for a, b in cuts]
    first, *rest = parts
    for more in rest:
        first = plus(first, more)
    for together in (first, plus(*parts)):
        assert value(name, together) == pytest.approx(found(name, whole), abs=1e-12)
    assert set(COMPUTED) == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_sums_travel_as_plain_numbers(name: str):
    """Of scores only counts leave a client; their area is that of scores which are equal within a bin."""
    rng = np.random.default_rng(5)
    outputs = 1 if name in TARGETS else 3
    seen = Predictions(rng.normal(size=500), rng.normal(size=(500, 1))) if outputs == 1 else rows(5, 500, 3)
    sums = sent_sums(tallies([name], seen))
    back = {kind: read_sums(kind, one, outputs) for kind, one in sums.items()}
    assert value(name, back) == pytest.approx(found(name, seen), abs=0.01 if name in ("auroc", "auprc") else 1e-12)
    if name in ("auroc", "auprc"):
        with np.errstate(divide="ignore"):
            place = np.searchsorted(EDGES, np.log(seen.scores / (1 - seen.scores)))
        assert value(name, back) == pytest.approx(value(name, {"Scores": Scores(seen.y, place.astype(float))}))
    for kind, numbers in sums.items():
        for wrong in (numbers[1:], [*numbers, 0.0], [float("nan"), *numbers[1:]], []):
            with pytest.raises(ValueError, match="sums of"):
                read_sums(kind, wrong, outputs)
    with pytest.raises(ValueError, match="expected one of"):
        read_sums("Tally", [1.0], outputs)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_scikit_learn(classes: int, coarse: bool, seed: int):
    sk = pytest.importorskip("sklearn.metrics")
    seen = rows(seed, 200, classes, coarse=coarse)
    y, p, guess = seen.y, seen.scores, seen.guess
    two, onehot = classes == 2, np.eye(classes)[seen.y]
    expected = {
        "accuracy": sk.accuracy_score(y, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(y, guess),
        "macro_f1": sk.f1_score(y, guess, average="macro"),
        "sensitivity": sk.recall_score(y, guess, average="binary" if two else "macro"),
        "auroc": sk.roc_auc_score(y, p[:, 1]) if two else sk.roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "auprc": sk.average_precision_score(y, p[:, 1]) if two else sk.average_precision_score(onehot, p),
        "brier": sk.brier_score_loss(y, p[:, 1]) if two else ((p - onehot) ** 2).sum(axis=1).mean(),
    }
    for name, wanted in expected.items():
        assert found(name, seen) == pytest.approx(wanted, abs=1e-9), name
    recalls = sk.recall_score(y, guess, average=None, labels=range(classes))
    assert [*by_class("sensitivity", tallies(["sensitivity"], seen), ()).values()] == pytest.approx([*recalls])
    rng = np.random.default_rng(seed)
    y, p = rng.normal(40, 5, 99), rng.normal(40, 5, 99)
    of_numbers = {"rmse": sk.root_mean_squared_error, "mae": sk.mean_absolute_error, "r2": sk.r2_score}
    for name, theirs in of_numbers.items():
        assert found(name, Predictions(y, p[:, None])) == pytest.approx(theirs(y, p), abs=1e-9)


def test_targets_are_read_and_have_a_direction():
    assert (aim(0.5), aim("auroc=0.9"), aim(" rmse = 3 ")) == (("accuracy", 0.5), ("auroc", 0.9), ("rmse", 3.0))
    for wrong in ("auroc", "auroc=", "auroc=nan", "auroc=inf", "roc=0.9", "0.9", "=0.9"):
        with pytest.raises(ValueError, match="expected a fraction"):
            aim(wrong)
    assert reaches("auroc", 0.9, 0.9)
    assert not reaches("auroc", 0.8, 0.9)
    assert reaches("rmse", 3, 3.5)
    assert not reaches("rmse", 4, 3.5)


def test_every_metric_has_its_task():
    assert {*CLASSES, *TARGETS} == set(METRICS) == set(COMPUTED)


def test_scores_are_sorted_once(monkeypatch: pytest.MonkeyPatch):
    """Catches a sort for each metric and each call; what is kept does not travel between processes."""
    sums, sort, sorts = tallies(["auroc", "auprc"], rows(0, 40, 3)), np.unique, list[int]()
    monkeypatch.setattr(np, "unique", lambda *a, **more: (sorts.append(1), sort(*a, **more))[1])
    first = [(value(name, sums), by_class(name, sums, ())) for name in ("auroc", "auprc")]
    assert [(value(name, sums), by_class(name, sums, ())) for name in ("auroc", "auprc")] == first
    assert len(sorts) == 3
    back = pickle.loads(pickle.dumps(sums))
    assert vars(back["Scores"]).keys() == {"y", "scores"}
    assert value("auroc", back) == first[0][0]
