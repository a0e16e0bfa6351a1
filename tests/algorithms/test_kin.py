"""FedAPEN, FedKD, FedMRL-E and adaptive FedMRL: what is looked at, what travels and what it weighs, who holds what."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from polyfed.algorithms.fedapen import FedAPEN
from polyfed.algorithms.fedkd import FedKD
from polyfed.algorithms.fedmrl import FedMRL
from polyfed.algorithms.fedmrl_adaptive import FedMRLAdaptive
from polyfed.algorithms.fedmrl_e import FedMRLE
from polyfed.base import tree
from polyfed.base.errors import MessageError, ModelError
from polyfed.core.algorithm import Algorithm
from polyfed.core.requests import drive
from polyfed.execute.local_training import bind
from polyfed.rounds.evaluation import Evaluator
from polyfed.rounds.federation import Federation

IMAGE = (1, 16, 16)
MODELS = ("mlp(hidden=(12, 9))", "mlp(hidden=(11,))")
MLP = "mlp(hidden=(12, 7))"  # G: 256 inputs, 12, d1, 4 classes
BODY = 256 * 12 + 12


def federation(algorithm: Algorithm, sizes: tuple[int, ...] = (11, 8, 6), **more: Any) -> Federation:
    keys = {"models": MODELS, "train": {"epochs": 1, "momentum": 0.9}, **more}
    return toy.federation(algorithm, shape=IMAGE, sizes=sizes, **keys)


def adaptive(**keys: Any) -> FedMRLAdaptive:
    return FedMRLAdaptive(**{"auxiliary": MLP, "rep_dim": 8, "granularities": (2, 5), "holdout": 0.3, **keys})


def relabelled(fed: Federation, rows: Any, *, noise: bool = False) -> Federation:
    """The same with other labels (and pictures) at these rows."""
    x, y = fed.dataset.x.clone(), fed.dataset.y.clone()
    rows = torch.as_tensor(rows)
    y[rows] = (y[rows] + 1) % 4
    if noise:
        x[rows] = 255 - x[rows]
    return Federation(fed.config, replace(fed.dataset, x=x, y=y), fed.partition, fed.algorithm)


def told(game: toy.Game) -> Any:
    """Everything that a run led to."""
    return game.server, {k: game.private(k) for k in range(3)}


def equal(a: Any, b: Any) -> bool:
    from polyfed.testing.compare import differences

    return not differences(a[0], b[0]) and not any(differences(a[1][k], b[1][k]) for k in a[1])


# ---------------------------------------------------------------------------------------------------- held-out examples


@pytest.mark.parametrize("algorithm", [FedAPEN(auxiliary=MLP, holdout=0.3), adaptive()], ids=lambda a: a.name)
def test_test_data_decide_nothing(algorithm: Algorithm) -> None:
    """Catches a lambda, or a width, that is chosen by test data: their labels may be anything."""
    fed = federation(algorithm)
    rows = [int(row) for k in range(3) for row in fed.partition.test(k)]
    assert equal(told(toy.play(fed, 3)), told(toy.play(relabelled(fed, rows, noise=True), 3)))


@pytest.mark.parametrize(
    "algorithm", [FedAPEN(auxiliary=MLP, holdout=0.3, lr_lambda=0.0), adaptive(tolerance=1e9)], ids=lambda a: a.name
)
def test_held_out_examples_are_not_trained_on(algorithm: Algorithm) -> None:
    """Catches a fit that sees them: with the choice taken away, they may be anything, over several rounds."""
    fed = federation(algorithm)
    rows = torch.cat([fed.local(k, 1).held_out.rows for k in range(3)])  # type: ignore[union-attr]
    assert len(rows) == 3 + 2 + 2
    assert equal(told(toy.play(fed, 2)), told(toy.play(relabelled(fed, rows, noise=True), 2)))
    trained = fed.local(0, 2).train.rows[:3]  # type: ignore[attr-defined]
    assert not equal(told(toy.play(fed, 2)), told(toy.play(relabelled(fed, trained), 2)))


def test_held_out_examples_decide() -> None:
    """Catches a choice that looks at nothing."""
    for algorithm in (FedAPEN(auxiliary=MLP, holdout=0.3), adaptive()):
        fed = federation(algorithm)
        rows = torch.cat([fed.local(k, 1).held_out.rows for k in range(3)])  # type: ignore[union-attr]
        assert not equal(told(toy.play(fed, 3)), told(toy.play(relabelled(fed, rows), 3)))


# ----------------------------------------------------------------------------------------------------------- predictors


def body(p: Any, x: Tensor) -> Tensor:
    """A dense network before its last layer, by hand."""
    x = x.flatten(1)
    for layer in range(1, len(p) // 2):
        x = torch.relu(x @ p[f"fc{layer}.weight"].T + p[f"fc{layer}.bias"])
    return x


def last(p: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of its last layer."""
    return p[f"fc{len(p) // 2}.weight"], p[f"fc{len(p) // 2}.bias"]


def agree(got: Any, expected: dict[str, Tensor]) -> None:
    """The same predictors, the headline first, with the same logits."""
    assert list(got) == list(expected)
    for name, logits in expected.items():
        assert torch.allclose(got[name], logits, rtol=1e-5, atol=1e-6), name


def fedapen_predicts(cls: type[FedAPEN]) -> None:
    game = toy.play(federation(cls(auxiliary=MLP, holdout=0.3)))
    local, own, shared = game.local(0, 1), game.private(0).F, game.server.G
    x, _ = local.train.batch(torch.arange(5))
    nets = bind(local.models, {"F": own, "G": shared, "lambda": {"weight": torch.tensor(0.3)}})
    (W, b), (V, c) = last(own), last(shared)  # noqa: N806
    z, g = body(own, x) @ W.T + b, body(shared, x) @ V.T + c
    agree(game.federation.algorithm.predict(nets, x), {"ensemble": 0.3 * z + 0.7 * g, "private": z, "shared": g})


def fedmrl_e_predicts(cls: type[FedMRLE]) -> None:
    game = toy.play(federation(cls(auxiliary=MLP, rep_dim=8, granularities=(3, 8))))
    algorithm, local = game.federation.algorithm, game.local(0, 1)
    parts = algorithm.predictor_parts(game.private(0), algorithm.message_for(game.server, local.info), local)
    x, _ = local.train.batch(torch.arange(5))
    small, large, (W, b) = body(parts["G"], x), body(parts["F"], x), last(parts["F"])  # noqa: N806
    fused = torch.cat([small, large], 1) @ parts["P"]["fc1.weight"].T + parts["P"]["fc1.bias"]
    assert (small.shape[1], fused.shape[1]) == (8, 9)
    agree(
        algorithm.predict(bind(local.models, parts), x),
        {
            "mix-large": fused @ W.T + b,
            "mix-3": fused[:, :3] @ W[:, :3].T + b,
            "mix-8": fused[:, :8] @ W[:, :8].T + b,
            "single-large": large @ W.T + b,
        },
    )


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


class WeightOfTheOther(FedAPEN):
    """lambda on the shared network."""

    def predict(self, nets: Any, x: Tensor) -> Any:
        got, lam = super().predict(nets, x), nets["lambda"]["weight"]
        return {**got, "ensemble": (1 - lam) * got["private"] + lam * got["shared"]}


class OfProbabilities(FedAPEN):
    """A third party's: the ensemble is of probabilities, not of logits."""

    def predict(self, nets: Any, x: Tensor) -> Any:
        got, lam = super().predict(nets, x), nets["lambda"]["weight"]
        return {**got, "ensemble": lam * got["private"].softmax(1) + (1 - lam) * got["shared"].softmax(1)}


class Unfused(FedMRLE):
    """Two names exchanged: the headline is F alone."""

    def predict(self, nets: Any, x: Tensor) -> Any:
        got = super().predict(nets, x)
        return {**got, "mix-large": got["single-large"], "single-large": got["mix-large"]}


class WithoutPrefix(FedMRLE):
    """Every granularity sees the whole fused vector."""

    def predict(self, nets: Any, x: Tensor) -> Any:
        got = super().predict(nets, x)
        return {name: got["mix-large"] if name[-1].isdigit() else logits for name, logits in got.items()}


class SmallFirst(FedMRLAdaptive):
    """Two names exchanged: the headline is the small header's."""

    def predict(self, nets: Any, x: Tensor) -> Any:
        got = super().predict(nets, x)
        return {"mix-large": got["mix-small"], "mix-small": got["mix-large"]}


PREDICTS: list[Any] = [
    (fedapen_predicts, FedAPEN, [WeightOfTheOther, OfProbabilities]),
    (fedmrl_e_predicts, FedMRLE, [Unfused, WithoutPrefix]),
    (adaptive_predicts, FedMRLAdaptive, [SmallFirst]),
]


@pytest.mark.parametrize(("check", "cls"), [case[:2] for case in PREDICTS], ids=[case[1].name for case in PREDICTS])
def test_predictors_are_their_formulas(check: Any, cls: Any) -> None:
    """Catches predictors under each other's names, a weight of the wrong network, prefixes that are none."""
    check(cls)


@pytest.mark.parametrize(
    ("check", "faulty"), [pytest.param(case[0], fault, id=fault.__name__) for case in PREDICTS for fault in case[2]]
)
def test_formulas_tell_faulty_predictors(check: Any, faulty: Any) -> None:
    """Catches a comparison of names alone."""
    with pytest.raises(AssertionError):
        check(faulty)


# -------------------------------------------------------------------------------------------------------------- FedAPEN


def test_the_weight_that_predicts_is_the_weight_that_trains_next() -> None:
    """Catches a stale lambda at prediction, one that evaluation keeps, a pass for free or taken for a prediction."""
    game = toy.play(federation(FedAPEN(auxiliary=MLP, holdout=0.3, lr_lambda=0.02)), 2)
    fed, was = game.federation, [game.private(k).weight for k in range(3)]
    found = {}
    for k in range(3):
        local = game.local(k, 2)
        made = drive(
            fed.algorithm.predictor_parts(game.private(k), fed.algorithm.message_for(game.server, local.info), local),
            game.driver.perform,
        )
        found[k] = float(made["lambda"]["weight"])
        assert found[k] != was[k]
    scores = game.clients.evaluate(2, {k: fed.algorithm.message_for(game.server, fed.info(k)) for k in range(3)})
    assert [game.private(k).weight for k in range(3)] == was
    for k, held in enumerate((3, 2, 2)):
        both = {**game.private(k).F, **{f"G.{name}": value for name, value in game.server.G.items()}}
        products = sum(value.numel() for value in both.values() if value.dim() > 1)
        assert scores[k].flops == 2 * products * 6  # six test examples
        assert scores[k].flops_parts == 2 * products * held
    whole = Evaluator(fed, game.driver.placement, game.driver.costs).evaluate(game.server, game.clients, 2)
    assert whole.flops_per_example == pytest.approx(sum(score.flops for score in scores.values()) / 6 / 3)
    shared = (
        2 * sum(value.numel() for value in game.server.G.values() if value.dim() > 1) * 18
    )  # G on all test examples
    assert whole.flops == sum(score.flops + score.flops_parts for score in scores.values()) + shared
    assert list(scores[0].correct) == ["ensemble", "private", "shared"]
    game.round()
    assert [game.private(k).weight for k in range(3)] == pytest.approx([found[k] for k in range(3)], abs=1e-12)


def test_the_weight_goes_to_the_better_network_and_no_further() -> None:
    """Catches the weight on the wrong network, an ascent, and a lambda outside [0, 1]."""
    y = torch.tensor([0, 1, 2, 0])
    good, bad = 9.0 * torch.nn.functional.one_hot(y, 3).double(), torch.zeros(4, 3, dtype=torch.float64)
    algorithm = FedAPEN(lr_lambda=100.0)
    assert algorithm.learnt(0.5, {"z": good, "g": bad, "y": y}, 64) == 1.0
    assert algorithm.learnt(0.5, {"z": bad, "g": good, "y": y}, 64) == 0.0
    assert FedAPEN(lr_lambda=0.0).learnt(0.5, {"z": good, "g": bad, "y": y}, 64) == 0.5


@pytest.mark.parametrize(
    ("algorithm", "up", "down"),
    [
        (FedAPEN(auxiliary=MLP), BODY + 12 * 7 + 7 + 7 * 4 + 4, None),
        (FedMRLE(auxiliary=MLP, rep_dim=8), BODY + 12 * 8 + 8, None),  # |theta| - L (d1 + 1)
        (FedMRLE(auxiliary=MLP, rep_dim=8, header="shared"), BODY + 12 * 8 + 8 + 8 * 4 + 4, None),
        (FedMRL(auxiliary=MLP, rep_dim=8, header="local"), BODY + 12 * 8 + 8, None),
        (adaptive(granularities=(8,)), BODY + 12 * 8 + 8 + 8 * 4 + 4, None),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bytes_are_those_of_the_formula(algorithm: Algorithm, up: int, down: None) -> None:
    """Catches more on the wire than the shared network: a header of FedMRL-E's, a lambda, a private part."""
    game = toy.play(federation(algorithm), 1)
    for report in game.played[0].reports.values():
        assert report.up.values == report.down.values == 4 * up


# ---------------------------------------------------------------------------------------------------------------- FedKD


def test_who_took_part_in_the_last_round_receives_an_update_all_others_the_student() -> None:
    """Catches students that drift apart, updates for clients that cannot use them, downloads that never shrink."""
    fed = federation(FedKD(auxiliary=MLP, energy=(0.6, 0.7)), sizes=(9, 8, 7, 6), clients={"participation": 0.5})
    game = toy.play(fed)
    last: set[int] = set()
    dense = 4 * (BODY + 12 * 7 + 7 + 7 * 4 + 4)
    seen = set()
    for _ in range(8):
        before = game.server.G
        game.round()
        for k, report in game.played[-1].reports.items():
            assert tree.same(game.private(k).G, before), "a client trained another student than the server's"
            current = k in last
            assert (report.down.values < dense / 2) if current else (report.down.values == dense)
            assert report.up.values < dense
            seen.add(current)
        last = {client.id for client in game.played[-1].cohort}
    assert seen == {False, True}


def test_a_client_that_lost_its_state_says_so() -> None:
    """Catches an update added to a student of another round."""
    game = toy.play(federation(FedKD(auxiliary=MLP)), 1)
    local = game.local(0, 2)
    message = FedKD.Broadcast(game.server.update, {}, 1, 0.95)
    fresh = game.federation.algorithm.init_client(game.local(0, 0))
    with pytest.raises(MessageError, match=r"round 1; this client did in 0"):
        drive(game.federation.algorithm.client_round(fresh, message, local), game.driver.perform)


def test_an_update_of_another_student_is_refused() -> None:
    game = toy.play(federation(FedKD(auxiliary=MLP)), 1)
    task, upload = game.federation.task, game.got[0][0]
    game.federation.algorithm.check_upload(task, game.federation.info(0), None, upload)
    wrong = replace(upload, update=replace(upload.update, whole=tree.drop(upload.update.whole, ["fc1.bias"])))
    with pytest.raises(MessageError, match="expected"):
        game.federation.algorithm.check_upload(task, game.federation.info(0), None, wrong)


def test_only_the_teacher_predicts_at_a_client_and_nothing_is_sent_for_it() -> None:
    game = toy.play(federation(FedKD(auxiliary=MLP)), 1)
    algorithm, local = game.federation.algorithm, game.local(1)
    assert algorithm.message_for(game.server, local.info) is None
    nets = bind(local.models, algorithm.predictor_parts(game.private(1), None, local))
    x, _ = local.train.batch(torch.arange(3))
    assert list(algorithm.predict(nets, x)) == ["teacher"]
    ((name, student),) = algorithm.global_nets(game.server, game.federation.task).items()
    assert name == "student"
    assert torch.equal(algorithm.predict(student, x)["student"], student["G"](x))


# ------------------------------------------------------------------------------------------------------------- FedMRL-E


def test_there_is_one_header_and_the_small_network_has_none() -> None:
    """Catches a second header anywhere: kept, sent, trained or read."""
    game = toy.play(federation(FedMRLE(auxiliary=MLP, rep_dim=8, granularities=(3, 8))), 1)
    algorithm, local = game.federation.algorithm, game.local(0)
    assert not {"fc3.weight", "fc3.bias"} & (set(game.server.G) | set(game.got[0][0].G))
    parts = algorithm.predictor_parts(game.private(0), game.sent[0][0], local)
    x, y = local.train.batch(torch.arange(4))
    noisy = {**parts, "G": {**parts["G"], "fc3.weight": torch.randn(4, 8), "fc3.bias": torch.randn(4)}}
    outputs, others = (algorithm.predict(bind(local.models, p), x) for p in (parts, noisy))
    assert list(outputs) == ["mix-large", "mix-3", "mix-8", "single-large"]
    assert all(torch.equal(outputs[name], others[name]) for name in outputs)
    assert torch.equal(*(algorithm.loss(bind(local.models, p), (x, y)) for p in (parts, noisy)))


def test_a_shared_header_is_the_mean_of_its_first_columns() -> None:
    """Catches a header that is shared whole, or whose shared columns a client does not take over."""
    game = toy.play(federation(FedMRLE(auxiliary=MLP, rep_dim=8, header="shared")), 2)
    sent = [game.got[1][k] for k in range(3)]
    n = [upload.num_examples for upload in sent]
    for name, last in (("weight", "fc3.weight"), ("bias", "fc3.bias")):
        mean = sum(k * upload.H[name].double() for k, upload in zip(n, sent, strict=True)) / sum(n)
        assert torch.allclose(game.server.H[name], mean.float(), rtol=1e-6, atol=1e-8)
        own = game.private(0).F[last]
        assert torch.equal(sent[0].H[name], own[:, :8] if name == "weight" else own)
    local = game.local(0, 3)
    message = game.federation.algorithm.message_for(game.server, local.info)
    used = game.federation.algorithm.predictor_parts(game.private(0), message, local)["F"]
    assert torch.equal(used["fc3.weight"][:, :8], game.server.H["weight"])
    assert torch.equal(used["fc3.weight"][:, 8:], game.private(0).F["fc3.weight"][:, 8:])
    assert torch.equal(used["fc3.bias"], game.server.H["bias"])
    assert not torch.equal(used["fc3.weight"], game.private(0).F["fc3.weight"])


def test_a_local_header_of_fedmrl_learns_at_home() -> None:
    """Catches a header that stays as it was, and one that is everybody's all the same."""
    game = toy.play(federation(FedMRL(auxiliary=MLP, rep_dim=8, header="local")))
    before = {k: game.private(k).G["fc3.weight"] for k in range(3)}
    game.round()
    assert not {"fc3.weight", "fc3.bias"} & set(game.server.G)
    for k in range(3):
        assert set(game.private(k).G) == {"fc3.weight", "fc3.bias"}
        assert not torch.equal(game.private(k).G["fc3.weight"], before[k])
    assert not tree.same(game.private(0).G, game.private(2).G)


def test_prefixes_wider_than_the_private_network_are_refused() -> None:
    with pytest.raises(ModelError, match=r"d2 = 9; set algorithm.granularities \(4, 10\) <= 9"):
        federation(FedMRLE(auxiliary=MLP, rep_dim=4, granularities=(10, 4))).local(0, 1)


# ------------------------------------------------------------------------------------------------------ adaptive FedMRL


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
