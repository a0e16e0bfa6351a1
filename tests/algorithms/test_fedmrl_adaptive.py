"""Adaptive FedMRL: who holds what, which width is asked for, what predicts and what travels."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import toy
from auxiliary import (
    BODY,
    MLP,
    agree,
    body,
    federation,
    held_out_are_not_trained_on,
    held_out_decide,
    labels_of_tests_decide_nothing,
    last,
    weighs,
)
from torch import Tensor

from polyfed.algorithms.fedmrl_adaptive import FedMRLAdaptive
from polyfed.base.errors import MessageError, ModelError
from polyfed.execute.local_training import bind


def adaptive(**keys: Any) -> FedMRLAdaptive:
    return FedMRLAdaptive(**{"auxiliary": MLP, "rep_dim": 8, "granularities": (2, 5), "holdout": 0.3, **keys})


def adaptive_predicts(cls: type[FedMRLAdaptive]) -> None:
    """At width 5 of 8."""
    game = toy.play(federation(cls(auxiliary=MLP, rep_dim=8, granularities=(2, 5), holdout=0.3)))
    algorithm, local = game.federation.algorithm, game.local(0, 1)
    server = replace(game.server, widths={0: 5})
    parts = algorithm.predictor_parts(game.private(0), algorithm.message_for(server, local.info), local)
    x, _ = local.train.batch(torch.arange(5))
    small, large, P = body(server.G, x), body(parts["F"], x), parts["P"]["fc1.weight"]  # noqa: N806
    fused = small[:, :5] @ P[:, :5].T + large @ P[:, 8:].T + parts["P"]["fc1.bias"]
    (W, b), (V, c) = last(parts["F"]), last(server.G)  # noqa: N806
    got = algorithm.predict(bind(local.models, parts), x)
    agree(got, {"mix-large": fused @ W.T + b, "mix-small": fused[:, :5] @ V[:, :5].T + c})


class SmallFirst(FedMRLAdaptive):
    """Two names exchanged: the headline is the small header's."""

    def predict(self, nets: Any, x: Tensor) -> Any:
        got = super().predict(nets, x)
        return {"mix-large": got["mix-small"], "mix-small": got["mix-large"]}


@pytest.mark.parametrize("width", [2, 5, 8])
def test_traffic_falls_with_the_width(width: int) -> None:
    """Catches coordinates that travel although nobody uses them: |theta| - (D - d)(w + 1 + L) each way, measured."""
    game = toy.play(federation(adaptive()))
    game.server = replace(game.server, widths={1: width})
    game.round()
    full = BODY + 12 * 8 + 8 + 8 * 4 + 4
    report = game.played[0].reports
    assert report[1].up.values == report[1].down.values == 4 * (full - (8 - width) * (12 + 1 + 4))
    assert report[0].up.values == report[0].down.values == 4 * full


def test_coordinates_that_nobody_holds_stay() -> None:
    """Catches zeros averaged in for who does not hold a coordinate."""
    game = toy.play(federation(adaptive()))
    game.server = replace(game.server, widths=dict.fromkeys(range(3), 2))
    before = game.server.G
    game.round()
    behind = {
        "fc2.weight": (slice(2, None),),
        "fc2.bias": (slice(2, None),),
        "fc3.weight": (slice(None), slice(2, None)),
    }
    for name, value in game.server.G.items():
        assert not torch.equal(value, before[name])
        if name in behind:
            assert torch.equal(value[behind[name]], before[name][behind[name]])


def test_nothing_behind_the_width_is_read() -> None:
    """Catches a projector or a header that sees coordinates which the client does not hold."""
    game = toy.play(federation(adaptive()))
    algorithm, local = game.federation.algorithm, game.local(0, 1)
    game.server = replace(game.server, widths={0: 5})
    parts = algorithm.predictor_parts(game.private(0), algorithm.message_for(game.server, local.info), local)
    assert parts["widths"]["masks"].tolist() == [[1.0] * m + [0.0] * (8 - m) for m in (2, 5)]
    other = toy.copy(parts["G"])
    other["fc2.bias"][5:], other["fc3.weight"][:, 5:] = 7.0, 7.0
    x, y = local.train.batch(torch.arange(4))
    nets, noisy = bind(local.models, parts), bind(local.models, {**parts, "G": other})
    assert torch.equal(algorithm.loss(nets, (x, y)), algorithm.loss(noisy, (x, y)))
    for name, logits in algorithm.predict(nets, x).items():
        assert torch.equal(logits, algorithm.predict(noisy, x)[name])


@pytest.mark.parametrize(
    ("losses", "needed", "expected"),
    [
        ([1.0, 1.0, 1.0], 0, (2, 0)),  # all alike: the narrowest
        ([1.2, 1.04, 1.0], 2, (5, 0)),  # within 5 %: the narrower; the count begins anew
        ([1.2, 1.06, 1.0], 0, (8, 1)),  # needed
        ([1.2, 1.06, 1.0], 9, (8, 10)),  # there is no wider one
        ([1.06, 1.0], 0, (5, 1)),
        ([1.06, 1.0], 1, (8, 0)),  # needed twice in a row: wider
        ([1.0], 0, (2, 1)),  # the narrowest is always needed
        ([1.0], 1, (5, 0)),
    ],
)
def test_the_narrowest_width_that_will_do_is_asked_for(losses: list[float], needed: int, expected: Any) -> None:
    """Catches a tolerance of the wrong side, growth at once, never or beyond D."""
    assert adaptive(tolerance=0.05, patience=2).next_width(losses, needed) == expected


def test_widths_shrink_and_grow_again_and_bytes_follow() -> None:
    """Catches a client that is sent another width than it asked for, and one that never comes back."""
    game = toy.play(federation(adaptive(tolerance=0.3, patience=1)), 7)
    for before, after in zip(range(6), range(1, 7), strict=True):
        for k in range(3):
            assert game.sent[after][k].width == game.got[before][k].width
    widths = [[game.sent[t][k].width for t in range(7)] for k in range(3)]
    assert all(path[0] == 8 for path in widths)
    assert any(b < a for path in widths for a, b in pairwise(path))
    assert any(b > a for path in widths for a, b in pairwise(path))
    sizes = {
        (m.width, r.down.values)
        for p, s in zip(game.played, game.sent, strict=True)
        for m, r in zip(s.values(), p.reports.values(), strict=True)
    }
    assert len(sizes) == len({width for width, _ in sizes}) > 1
    assert sorted(sizes) == sorted(sizes, key=lambda pair: pair[1])


def test_a_width_that_does_not_exist_is_refused() -> None:
    game = toy.play(federation(adaptive()), 1)
    task, sent, up = game.federation.task, game.sent[0][0], game.got[0][0]
    with pytest.raises(MessageError, match=r"Upload.width is 3; expected one of \(2, 5, 8\)"):
        game.federation.algorithm.check_upload(task, game.federation.info(0), sent, replace(up, width=3))
    with pytest.raises(ModelError, match=r"granularities go up to 9; set them <= algorithm.rep_dim = 8"):
        federation(adaptive(granularities=(9,))).local(0, 1)
    assert adaptive(granularities=(), rep_dim=3).ladder == (1, 2, 3)
    assert adaptive(granularities=(), rep_dim=100).ladder == (25, 50, 75, 100)


def test_test_data_decide_nothing() -> None:
    """Catches a width that is chosen by test data: their labels may be anything."""
    labels_of_tests_decide_nothing(adaptive())


def test_held_out_examples_are_not_trained_on() -> None:
    """Catches a fit that sees them: with the choice taken away, they may be anything, over several rounds."""
    held_out_are_not_trained_on(adaptive(tolerance=1e9))


def test_held_out_examples_decide() -> None:
    """Catches a choice that looks at nothing."""
    held_out_decide(adaptive())


def test_predictors_are_their_formulas() -> None:
    """Catches predictors under each other's names, a weight of the wrong network, prefixes that are none."""
    adaptive_predicts(FedMRLAdaptive)


@pytest.mark.parametrize("faulty", [SmallFirst])
def test_formulas_tell_faulty_predictors(faulty: type[FedMRLAdaptive]) -> None:
    """Catches a comparison of names alone."""
    with pytest.raises(AssertionError):
        adaptive_predicts(faulty)


def test_bytes_are_those_of_the_formula() -> None:
    """Catches more on the wire than the shared network: a private part."""
    weighs(adaptive(granularities=(8,)), BODY + 12 * 8 + 8 + 8 * 4 + 4)
