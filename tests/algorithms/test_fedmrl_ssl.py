"""FedMRL without labels: what reads labels, what predicts, what travels, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from auxiliary import BODY, body, equal, federation, relabelled, told, weighs
from torch import Tensor

from polyfed.algorithms.fedmrl_ssl import FedMRLSSL
from polyfed.base.errors import ConfigError, ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.linear_probe import moments, ridge
from polyfed.blocks.losses import nt_xent
from polyfed.blocks.matryoshka import fuse
from polyfed.blocks.views import Views, draw_views, two_views
from polyfed.core.plan import Step
from polyfed.core.requests import drive
from polyfed.execute.local_training import bind
from polyfed.rounds.federation import check_single_examples

MLP = "mlp(hidden=(12, 7))"  # G: 256 inputs, 12, d1, p


def ssl(**keys: Any) -> FedMRLSSL:
    return FedMRLSSL(**{"auxiliary": MLP, "rep_dim": 8, "head_dim": 6, **keys})


def test_no_label_is_read_in_training() -> None:
    """Catches a supervised term, class weights, and a probe that trains what it reads: other labels, the same bits."""
    train = {"epochs": 1, "class_weights": "balanced", "label_smoothing": 0.1}
    fed = federation(ssl(), train=train)
    other = relabelled(fed, fed.partition.train_rows.tolist())
    assert not torch.equal(fed.dataset.y, other.dataset.y)
    runs = [toy.play(one, 2) for one in (fed, other)]
    assert equal(*map(told, runs))
    probes = [parts(run)["probe-large"]["W"] for run in runs]
    assert not torch.equal(*probes)  # which read labels


def test_rows_without_a_label_train_and_no_probe_reads_them() -> None:
    """Catches rows that are dropped from training or from its weights, and -1 read as a class by a probe."""
    fed = federation(ssl())
    rows = torch.tensor(fed.partition.train(0)[:8])
    y, x = fed.dataset.y.clone(), fed.dataset.x.clone()
    y[rows], x[rows] = -1, 255 - x[rows]
    some = replace(fed, dataset=replace(fed.dataset, y=y, unlabelled=True))
    runs = [toy.play(one, 1) for one in (fed, some)]
    assert equal(*map(told, runs))  # as if they had labels
    assert runs[1].got[0][0].num_examples == 11
    assert not equal(told(runs[1]), told(toy.play(replace(some, dataset=replace(some.dataset, x=x)), 1)))
    found, local = parts(runs[1]), runs[1].local(0)
    x, y = local.train.batch(torch.arange(8, 11))
    with torch.no_grad():
        z = fuse(bind(local.models, found), x)[2]
    for name, width in (("probe-large", 9), ("probe-small", 8)):
        probe = ridge(moments(z, y, 4), width, 0.01)
        assert torch.allclose(found[name]["W"], probe["W"], rtol=1e-3, atol=1e-4), name
        assert torch.allclose(found[name]["b"], probe["b"], rtol=1e-3, atol=1e-4), name


def parts(game: toy.Game) -> Any:
    """What client 0 predicts with."""
    algorithm, local = game.federation.algorithm, game.local(0)
    message = algorithm.message_for(game.server, local.info)
    return drive(algorithm.predictor_parts(game.private(0), message, local), game.driver.perform)


def test_probes_are_ridge_regressions_of_the_own_training_examples() -> None:
    """Catches probes of test rows, of an unfused part, with a penalty of the bias, under each other's names."""
    game = toy.play(federation(ssl(penalty=0.1)), 1)
    algorithm, local = game.federation.algorithm, game.local(0)
    found = parts(game)
    x, y = local.train.batch(torch.arange(len(local.train)))

    def fused(x: Tensor) -> Tensor:
        R = torch.cat([body(found["G"], x), body(found["F"], x)], 1)  # noqa: N806
        return R @ found["P"]["fc1.weight"].T + found["P"]["fc1.bias"]

    test, _ = game.federation.data.test(0).batch(torch.arange(4))
    expected = {}
    for name, width in (("probe-large", 9), ("probe-small", 8)):
        z, wanted = fused(x)[:, :width].double(), torch.eye(4, dtype=torch.float64)[y]
        centred, v = z - z.mean(0), z.var(0, correction=0).mean()
        # As least squares with one more row for each weight.
        A = torch.cat([centred, (0.1 * v * len(z)).sqrt() * torch.eye(width)])  # noqa: N806
        W = torch.linalg.lstsq(A, torch.cat([wanted - wanted.mean(0), torch.zeros(width, 4)])).solution  # noqa: N806
        expected[name] = ((fused(test)[:, :width].double() - z.mean(0)) @ W + wanted.mean(0)).float()
    got = algorithm.predict(bind(local.models, found), test)
    assert list(got) == list(expected)
    for name, scores in expected.items():
        assert torch.allclose(got[name], scores, rtol=1e-3, atol=1e-4), name


def test_a_probe_of_numbers_that_never_vary_says_how_often_each_class_is() -> None:
    """Catches a division by a variance of 0: one example, or representations that collapsed."""
    y = torch.tensor([0, 0, 2, 0])
    probe = ridge(moments(torch.ones(4, 3), y, 3), 2, 0.01)
    assert torch.allclose(torch.ones(1, 2) @ probe["W"].T + probe["b"], torch.tensor([[0.75, 0.0, 0.25]]))


def test_bytes_are_those_of_the_formula() -> None:
    """Catches more on the wire than the small network: a private head, a probe."""
    weighs(ssl(), BODY + 12 * 8 + 8 + 8 * 6 + 6)


def test_rows_of_a_table_are_refused() -> None:
    with pytest.raises(ModelError, match=r"fedmrl-ssl makes views of images and signals; examples have shape \(7,\)"):
        ssl().check(toy.federation(ssl(rep_dim=6)).task)


@pytest.mark.parametrize(("shape", "last"), [((3, 8, 6), False), ((3, 20), False), ((20, 3), True)])
def test_views_are_crops_that_differ_and_stay_in_their_ranges(shape: tuple[int, ...], last: bool) -> None:
    """Catches places outside the example, crops smaller than asked for, views alike, and draws that steps share."""
    views, step = Views(crop=0.5, jitter=0.3), Step(torch.arange(300), 4, 0)
    drawn = draw_views(views, shape, not last, Rng((0,)), step)
    axes, channels = ((2, 3), 1) if len(shape) == 3 else ((1,), 2) if last else ((2,), 1)
    for axis in axes:
        at, n = drawn[f"axis-{axis}"], shape[axis - 1]
        assert at.shape == (2, 300, n)
        assert (int(at.min()), int(at.max())) == (0, n - 1)
        spans = (at[..., 0] - at[..., -1]).abs() + 1
        assert 0.5 * n - 1 <= int(spans.min()) <= 0.6 * n
        assert int(spans.max()) == n
        assert not torch.equal(*at)
    mirrored = float((drawn[f"axis-{axes[-1]}"][..., 0] > drawn[f"axis-{axes[-1]}"][..., -1]).double().mean())
    assert 0.4 < mirrored < 0.6 if len(shape) == 3 else mirrored == 0
    for name, middle in (("gain", 1.0), ("bias", 0.0)):
        assert drawn[name].shape == (2, 300, shape[channels - 1])
        assert 0.28 < float((drawn[name] - middle).abs().max()) <= 0.3001
    again, other = (draw_views(views, shape, not last, Rng((0,)), Step(torch.arange(300), i, 0)) for i in (4, 5))
    for name, values in drawn.items():
        assert torch.equal(values, again[name])
        assert not torch.equal(values, other[name])


def test_views_of_nothing_random_are_the_examples() -> None:
    """Catches a crop of everything that moves anything."""
    views, x = Views(crop=1.0, flip=False, jitter=0.0, grey=0.0, noise=0.0), torch.randn(4, 3, 6, 5)
    drawn = draw_views(views, (3, 6, 5), False, Rng((0,)), Step(torch.arange(4), 0, 0))
    assert torch.equal(two_views(x, drawn), torch.cat([x, x]))


def test_keys_without_an_effect_are_refused() -> None:
    """Catches a temperature that is tuned under Barlow Twins."""
    for keys, key in (({"contrast": "barlow", "temperature": 0.1}, "temperature"), ({"redundancy": 1.0}, "redundancy")):
        with pytest.raises(ConfigError, match=f"{key}: got .* does not use it; leave it at"):
            ssl(**keys)


@pytest.mark.parametrize("contrast", ["simclr", "barlow"])
def test_batches_of_one_are_refused(contrast: str) -> None:
    """Catches a run that trains nothing and says nothing."""
    for keys, named in (({"train": {"batch_size": 1}}, "clients 0, 1, 2"), ({"sizes": (5, 1, 4)}, "client 1")):
        with pytest.raises(ModelError, match=f"compares the examples of a batch, .* {named} would have such"):
            check_single_examples(federation(ssl(contrast=contrast), **keys))


def test_a_batch_of_one_has_nothing_to_tell_apart() -> None:
    z = torch.randn(2, 5, requires_grad=True)
    loss = nt_xent(z, 0.5)
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros(2, 5))  # type: ignore[arg-type]
