"""FedMRL-E: one header, what is shared of it, what predicts and what travels."""

from typing import Any

import pytest
import torch
import toy
from auxiliary import BODY, MLP, agree, body, federation, last, weighs
from torch import Tensor

from polyfed.algorithms.fedmrl_e import FedMRLE
from polyfed.base.errors import ModelError
from polyfed.execute.local_training import bind


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
    for name, full in (("weight", "fc3.weight"), ("bias", "fc3.bias")):
        mean = sum(k * upload.H[name].double() for k, upload in zip(n, sent, strict=True)) / sum(n)
        assert torch.allclose(game.server.H[name], mean.float(), rtol=1e-6, atol=1e-8)
        own = game.private(0).F[full]
        assert torch.equal(sent[0].H[name], own[:, :8] if name == "weight" else own)
    local = game.local(0, 3)
    message = game.federation.algorithm.message_for(game.server, local.info)
    used = game.federation.algorithm.predictor_parts(game.private(0), message, local)["F"]
    assert torch.equal(used["fc3.weight"][:, :8], game.server.H["weight"])
    assert torch.equal(used["fc3.weight"][:, 8:], game.private(0).F["fc3.weight"][:, 8:])
    assert torch.equal(used["fc3.bias"], game.server.H["bias"])
    assert not torch.equal(used["fc3.weight"], game.private(0).F["fc3.weight"])


def test_prefixes_wider_than_the_private_network_are_refused() -> None:
    with pytest.raises(ModelError, match=r"d2 = 9; set algorithm.granularities \(4, 10\) <= 9"):
        federation(FedMRLE(auxiliary=MLP, rep_dim=4, granularities=(10, 4))).local(0, 1)


def test_predictors_are_their_formulas() -> None:
    """Catches predictors under each other's names, a weight of the wrong network, prefixes that are none."""
    fedmrl_e_predicts(FedMRLE)


@pytest.mark.parametrize("faulty", [Unfused, WithoutPrefix])
def test_formulas_tell_faulty_predictors(faulty: type[FedMRLE]) -> None:
    """Catches a comparison of names alone."""
    with pytest.raises(AssertionError):
        fedmrl_e_predicts(faulty)


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("local", BODY + 12 * 8 + 8),  # |theta| - L (d1 + 1)
        ("shared", BODY + 12 * 8 + 8 + 8 * 4 + 4),
    ],
)
def test_bytes_are_those_of_the_formula(header: Any, values: int) -> None:
    """Catches more on the wire than the shared network: a header, a private part."""
    weighs(FedMRLE(auxiliary=MLP, rep_dim=8, header=header), values)
