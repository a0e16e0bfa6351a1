"""DepthFL: depths by capacity, bytes, the mean by name, FedAvg at one depth, FedDyn's memory, predictors."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from polyfed.algorithms.depthfl import DepthFL
from polyfed.algorithms.fedavg import FedAvg
from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.blocks.aggregate import MeanByName
from polyfed.blocks.depths import each_logits
from polyfed.core.message import size
from polyfed.core.net import Net
from polyfed.models.exits import stage_ends, with_exits
from polyfed.testing import laws, settings
from polyfed.testing.subject import Subject

RESNET = "resnet8(width=4)"
BACKWARDS = "slice_nets:Backwards"


def game(capacities: list[float], rounds: int = 1, net: str = RESNET, **keys: Any) -> toy.Game:
    shape = (1, 8, 8) if net.startswith("resnet") else (6,) if net == BACKWARDS else (7,)
    sizes = keys.pop("sizes", (11, 8, 6))
    run = keys.pop("clients", {})
    fed = toy.federation(
        DepthFL(**keys), models=(net,), shape=shape, sizes=sizes, clients={"capacities": capacities, **run}
    )
    return toy.play(fed, rounds)


# -------------------------------------------------------------------------------------------------------------- depths


def test_a_capacity_allows_the_deepest_stages_that_fit() -> None:
    """Catches a share of the stages instead of the parameters, buffers that count, and rounding just below a share."""
    played = game([1.0, 0.26, 0.01], 0)
    depths, net = played.server.depths, played.federation.task.common("depthfl")
    ends = stage_ends(net)
    sizes = [
        sum(with_exits(net, ends, d).shapes[n].numel() for n in with_exits(net, ends, d).parameter_names)
        for d in (1, 2, 3)
    ]
    assert sizes == [368, 1348, 5096]
    shares = [size_ / sizes[-1] for size_ in sizes]
    assert [depths.at(c) for c in (1.0, 0.99, shares[1], 0.999 * shares[1], shares[0], 0.001)] == [3, 2, 2, 1, 1, 1]
    assert [len(played.local(k, 1).models["model"].shapes) for k in range(3)] == [60, 20, 20]
    one, two, three = map(set, depths.names)
    assert one < two < three == set(played.server.model)


def test_depths_can_be_a_table() -> None:
    """Catches a table read by client, or from the smallest capacity on, and a depth that no capacity has."""
    depths = game([1.0, 0.5, 0.2], 0, depths=(2, 2, 1)).server.depths
    assert [depths.at(c) for c in (1.0, 0.5, 0.3, 0.2, 0.1)] == [2, 2, 1, 1, 1]
    for wrong in ((3, 2), (4, 2, 1), (1, 2, 3)):
        with pytest.raises(ModelError, match=r"capacities 1, 0\.5, 0\.2 one of the depths 1 to 3 of .* above the one"):
            game([1.0, 0.5, 0.2], 0, depths=wrong).federation.algorithm.check(game([1.0, 0.5, 0.2], 0).federation.task)


def test_networks_that_differ_or_cannot_be_cut_are_refused() -> None:
    """Catches a fault that shows in the first round only."""
    fed = toy.federation(DepthFL(), models=(toy.MLP, "mlp(hidden=(5,))"))
    with pytest.raises(ModelError, match="depthfl needs one architecture"):
        fed.algorithm.check(fed.task)
    with pytest.raises(ModelError, match="no submodule 'act9' to be its exit"):
        DepthFL(exits=("act9",)).check(toy.federation(DepthFL()).task)


def test_a_single_stage_for_unlike_capacities_is_refused() -> None:
    """Catches capacities that are passed over without a word."""
    for capacities in ([1.0, 0.5, 0.5], [0.5, 0.5, 0.5]):
        fed = toy.federation(DepthFL(), models=("mlp(hidden=())",), clients={"capacities": capacities})
        if len(set(capacities)) == 1:
            fed.algorithm.check(fed.task)
            continue
        with pytest.raises(ModelError, match=r"single stage, .*attribute `stages` .*algorithm\.exits"):
            fed.algorithm.check(fed.task)


def test_bytes_are_those_of_the_stages() -> None:
    """Catches the full network sent to all, classifiers of stages that a client lacks, and a memory that travels."""
    played = game([1.0, 0.3, 0.1], depths=(3, 2, 1), feddyn=True)

    def values(depth: int) -> int:
        widths = [4, 8, 16]
        norms, weights = [4], [9 * 4]
        for number, (before, n) in enumerate(zip([4, *widths], widths[:depth], strict=False)):
            weights += [9 * before * n, 9 * n * n] + [before * n] * (number > 0)
            norms += [n, n] + [n] * (number > 0)
            weights.append(4 * n + 4)  # the classifier behind it
        return 4 * sum(weights) + 4 * 4 * sum(norms) + 8 * len(norms)

    for sent in (played.sent[0], played.got[0]):
        assert [size(sent[k]).values for k in range(3)] == [values(d) for d in (3, 2, 1)]
        assert all(size(sent[k]).indices == 0 for k in range(3))


# ------------------------------------------------------------------------------------------------------------ the mean


def test_tensors_are_averaged_by_name_whatever_their_order() -> None:
    """Catches a mean by the order of state dicts, in which a shallow client's tensors meet a deep client's others."""
    played = game([1.0, 0.5], net=BACKWARDS, depths=(3, 1), exits=("first", "second"), feddyn=False)
    assert next(iter(played.server.model)).startswith("net.third")
    first, got = toy.play(played.federation).server.model, played.got[0]
    for name, value in played.server.model.items():
        own = [got[k].model[name].double() for k in range(3) if name in got[k].model]
        expected = sum(own) / len(own) if own else first[name].double()
        assert torch.allclose(value.double(), expected, rtol=1e-6, atol=1e-9), name


def by_order(self: Any, total: Any, client: Any, value: Any, upload: Any) -> Any:
    """The released way: the first tensors of a shallow client are taken for the first of the whole network."""
    renamed = dict(zip(self.default, value.values(), strict=False))
    total.add({n: v for n, v in renamed.items() if v.shape == self.default[n].shape}, 1.0)
    return total


def test_a_mean_by_order_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a network in the test above whose shallow part is a prefix of its state dict after all."""
    monkeypatch.setattr(MeanByName, "add", by_order)
    with pytest.raises(AssertionError, match=r"net|heads"):
        test_tensors_are_averaged_by_name_whatever_their_order()


@pytest.mark.parametrize("feddyn", [False, True])
def test_what_nobody_holds_stays_bitwise(feddyn: bool) -> None:
    """Catches deep stages that move without a client, by a bit or by FedDyn's correction."""
    played = game([0.3], 2, depths=(2,), feddyn=feddyn)
    first = toy.play(played.federation).server
    deep = set(played.server.model) - set(played.got[0][0].model)
    assert deep
    for name, value in played.server.model.items():
        assert torch.equal(value, first.model[name]) == (name in deep), name
    assert all(not value.any() for name, value in played.server.h.items() if name in deep)


def test_examples_do_not_weigh() -> None:
    """Catches a mean weighted by n_k."""
    played = game([1.0], net="mlp(hidden=())", feddyn=False)
    got = [played.got[0][k].model["net.fc1.weight"] for k in range(3)]
    assert torch.allclose(played.server.model["net.fc1.weight"], sum(got) / 3, atol=1e-7)


@pytest.mark.parametrize("net", ["mlp(hidden=())", "resnet8(width=4, norm=group)"])
def test_at_one_depth_and_full_capacity_it_is_fedavg_with_equal_weights(net: str, monkeypatch: Any) -> None:
    """Catches anything that DepthFL does besides: with the network's own classifier alone."""
    monkeypatch.setattr("polyfed.models.exits.stage_ends", lambda own, chosen: ())
    played = game([1.0], 0, net=net, sizes=(8, 8, 8), feddyn=False)
    shape = (1, 8, 8) if net.startswith("resnet") else (7,)
    plain = toy.play(toy.federation(FedAvg(), models=(net,), shape=shape, sizes=(8, 8, 8)))
    for _ in range(2):
        got = {name.removeprefix("net."): value for name, value in played.round().server.model.items()}
        toy.close(got, plain.round().server.model, 1e-6)


@pytest.mark.parametrize("law", ["equal_answers_count_once", "idle_rounds_change_nothing"])
def test_without_feddyn_no_law_is_exempt(law: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches what FedDyn's exemption would hide."""
    monkeypatch.setitem(settings.KEYS, "depthfl", {"feddyn": False})  # type: ignore[arg-type]
    getattr(laws, f"test_{law}")(Subject("depthfl", tmp_path))


# ------------------------------------------------------------------------------------------------------- distillation


def test_a_shallow_client_has_one_classifier_and_teaches_none() -> None:
    """Catches a division by d - 1 = 0."""
    one, other = (game([0.1], distill=distill, feddyn=False) for distill in (True, False))
    assert tree.same(one.server.model, other.server.model)


# ------------------------------------------------------------------------------------------------------------- memory


def test_a_client_that_rests_remembers() -> None:
    """Catches a memory that fades, or that the next client of the round takes over; and h over the cohort's size."""
    played = game([1.0], 3, net=toy.MLP, clients={"participation": 0.34}, sizes=(8, 8, 8, 8, 8, 8))
    name, alpha = "net.fc1.weight", 0.1
    memory = {k: torch.zeros(12, 7) for k in range(6)}
    h = torch.zeros(12, 7)
    for sent, got in zip(played.sent, played.got, strict=True):
        assert len(got) == 2
        for k in got:
            step = got[k].model[name] - sent[k].model[name]
            memory[k] = memory[k] - alpha * step
            h = h - alpha * step / 6
    for k, value in memory.items():
        assert torch.allclose(played.private(k).memory[name], value, atol=1e-7)
    assert torch.allclose(played.server.h[name], h, atol=1e-7)
    assert any({*played.got[0]} & {*later} for later in played.got[1:])  # a client came twice


def test_without_feddyn_nobody_remembers() -> None:
    """Catches a memory that costs its size in vain."""
    played = game([1.0], feddyn=False)
    assert played.private(0).memory == {}
    assert played.server.h == {}


# ---------------------------------------------------------------------------------------------------------- predictors


def test_the_ensemble_predicts_and_single_classifiers_beside_it() -> None:
    """Catches a mean of probabilities, and a global classifier that is another stage's."""
    played = game([1.0, 0.3, 0.1], depths=(3, 2, 1))
    algorithm, x, task = played.federation.algorithm, torch.randn(4, 1, 8, 8), played.federation.task
    nets = algorithm.global_nets(played.server, task)
    assert list(nets) == [f"{kind} {i}" for kind in ("depth", "classifier") for i in (3, 2, 1)]
    z = each_logits(nets["depth 3"]["model"], x)
    assert [own.shape for own in z] == [(4, 4)] * 3
    for i in (1, 2, 3):
        found = algorithm.predict(nets[f"depth {i}"], x)
        assert list(found) == ["ensemble", "first", "last"]
        assert torch.allclose(found["ensemble"], torch.stack(z[:i]).mean(0), atol=1e-6)
        assert torch.equal(found["first"], z[0])
        assert torch.equal(found["last"], z[i - 1])
        alone = algorithm.predict(nets[f"classifier {i}"], x)
        assert list(alone) == ["last"]
        assert torch.equal(alone["last"], z[i - 1])
    local = played.local(1)
    parts = algorithm.predictor_parts(played.private(1), algorithm.message_for(played.server, local.info), local)
    own = algorithm.predict({"model": Net(local.models["model"], parts["model"])}, x)
    assert torch.allclose(own["ensemble"], torch.stack(z[:2]).mean(0), atol=1e-6)
