"""InclusiveFL: layer-wise FedAvg where nothing stays apart, which keys a size has for itself, bytes, and refusals."""

import pytest
import torch
import toy
from layers_by_hand import DEPTHS, TOWERS

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.inclusivefl import InclusiveFL
from polyfed.base import tree
from polyfed.base.errors import ConfigError, ModelError
from polyfed.config import load_algorithm
from polyfed.core.message import size
from polyfed.models.zoo import build


@pytest.mark.parametrize("participation", [1.0, 0.34])
def test_where_nothing_stays_apart_it_is_layerwise_fedavg(participation: float) -> None:
    """Catches another start or mean; bitwise."""
    clients = {"participation": participation}
    ours, theirs = (
        toy.play(toy.federation(a, models=TOWERS, sizes=(8, 9, 7), clients=clients), 3)
        for a in (InclusiveFL(own_last=False, own_classifier=False), FedAvg(average="layer"))
    )
    assert tree.same(ours.server.model, theirs.server.model)
    assert ours.server.donors == ours.server.change == {}


def test_one_size_is_fedavg() -> None:
    """Catches copies, or a search for stages, where there is no other size; bitwise."""
    ours, theirs = (toy.play(toy.federation(a), 2) for a in (InclusiveFL(), FedAvg(average="layer")))
    assert tree.same(ours.server.model, theirs.server.model)


def test_without_distillation_sizes_share_all_but_last_blocks_and_classifiers() -> None:
    """Catches beta = 0 that is not the mean bit by bit, and a state that it does not need."""
    game = toy.play(toy.federation(InclusiveFL(beta=0.0), models=TOWERS, sizes=(8, 9, 7)), 2)
    assert game.server.donors == game.server.change == {}
    before = game.server.model
    game.round()
    for k, spec in enumerate(TOWERS):
        own = {n for n in game.got[-1][k].model if n.startswith("fc.") or (k < 2 and n.startswith(f"tower.{k}."))}
        apart = {key.partition(": ")[2] for key in game.server.owns[spec] if key.startswith(spec)}
        assert apart == own
        for name in own:  # of one client: what it sent
            assert torch.equal(game.server.model[f"{spec}: {name}"], game.got[-1][k].model[name])
    assert not torch.equal(game.server.model["tower.0.0.weight"], before["tower.0.0.weight"])


def test_the_family_of_resnets_keeps_last_blocks_that_a_larger_one_goes_on_behind() -> None:
    """Catches block 0, which halves maps, taught by blocks of other shapes, and statistics that are taught."""
    names = tuple(f"in-resnet{n}-small(width=4)" for n in (14, 10, 18))
    server = toy.play(toy.federation(InclusiveFL(), models=names, shape=(1, 16, 16), sizes=(8, 8, 8))).server
    fourteen, ten, _ = names
    found = {key.partition(": ")[2]: donors for key, donors in server.donors.items() if key.startswith(f"{ten}: ")}
    assert {name[:8] for name in found} == {"layer1.0", "layer2.0", "layer3.0", "layer4.0"}
    assert found["layer1.0.conv1.weight"] == (f"{fourteen}: layer1.0.conv1.weight",)
    assert found["layer3.0.conv1.weight"] == ("layer3.0.conv1.weight",)
    assert found["layer3.0.conv2.weight"] == ("layer3.0.conv2.weight", "layer3.1.conv2.weight")
    assert found["layer3.0.downsample.0.weight"] == ("layer3.0.downsample.0.weight",)
    assert not any("running" in name or "num_batches" in name for name in found)
    theirs = {key.partition(": ")[2][:8] for key in server.owns[fourteen] if key.startswith(fourteen)}
    assert theirs == {"layer1.0", "layer2.0", "fc.weigh", "fc.bias"}
    first = server.model
    assert torch.equal(first[f"{ten}: layer3.0.conv1.weight"], first["layer3.0.conv1.weight"])


def test_transformers_of_two_depths_share_all_but_one_block_and_the_classifier() -> None:
    """Catches a transformer that is refused or whose blocks are cut."""
    names = tuple(f"vit(depth={d}, heads=2, patch=4, width=8)" for d in (2, 4))
    game = toy.play(toy.federation(InclusiveFL(), models=names, shape=(1, 8, 8), sizes=(8, 8, 8)), 2)
    donors = game.server.donors[f"{names[0]}: block2.fc1.weight"]
    assert donors == tuple(f"block{n}.fc1.weight" for n in (2, 3, 4))
    assert {key.partition(": ")[2].partition(".")[0] for key in game.server.donors} == {"block2"}


def test_a_size_without_clients_in_a_round_stays_but_for_what_others_share() -> None:
    """Catches a last block that deeper ones move although no client trained it."""
    fed = toy.federation(InclusiveFL(), models=TOWERS, sizes=(8, 9, 7), clients={"participation": 0.67})
    game, seen = toy.play(fed), 0
    for _ in range(5):
        before = game.server.model
        game.round()
        here = {client.architecture for client in game.played[-1].cohort}
        for spec in set(TOWERS[:2]) - here:
            seen += 1
            assert all(torch.equal(game.server.model[k], before[k]) for k in before if k.startswith(f"{spec}: "))
    assert seen


def test_a_donor_counts_for_one_round() -> None:
    """Catches the change of an older round, where nobody has trained the donor in the last."""
    fed = toy.federation(InclusiveFL(), models=TOWERS, sizes=(8, 9, 7), clients={"participation": 0.34})
    game, absent = toy.play(fed), 0
    for _ in range(6):
        game.round()
        (client,) = game.played[-1].cohort
        donors = {donor for some in game.server.donors.values() for donor in some}
        assert set(game.server.change) == donors & set(game.server.owns[client.architecture])
        absent += len(donors - set(game.server.change))
    assert absent


def test_traffic_is_that_of_the_clients_network() -> None:
    """Catches changes or copies of other sizes that travel."""
    game = toy.play(toy.federation(InclusiveFL(), models=TOWERS, sizes=(8, 9, 7)), 2)
    for k in range(3):
        weights = 7 * 9 + 9 + k * (9 * 9 + 9) + (k + 1) * 2 * 9 + 9 * 4 + 4
        for sent, got in zip(game.sent, game.got, strict=True):
            assert size(sent[k]).values == size(got[k]).values == 4 * (weights + (k + 1) * 2 * 9) + 8 * (k + 1)
            assert size(sent[k]).indices == size(got[k]).indices == 0


def test_networks_that_are_not_nested_are_refused_before_the_run() -> None:
    """Catches silence about networks without blocks, without a classifier, or of two families."""
    cases = {
        tuple(DEPTHS): r"'layers_by_hand:Chain\(.*' names no blocks; .*attribute `stages`.*algorithm\.stages",
        (toy.MLP, "mlp(hidden=(5,))"): r"layer 'fc1\.weight' is \(12, 7\) in .* but \(5, 7\) in",
        (TOWERS[0], "layers_by_hand:Tower(depth=2)"): r"inclusivefl .* 'layers_by_hand:Tower\(depth=2\)' names none",
    }
    for models, match in cases.items():
        fed = toy.federation(InclusiveFL(), models=models)
        with pytest.raises(ModelError, match=match):
            fed.algorithm.check(fed.task)
    InclusiveFL(own_last=False).check(toy.federation(FedAvg(), models=tuple(DEPTHS)).task)
    assert build(TOWERS[0], input_shape=(7,), num_classes=4).cuts[0] == "fc"


def test_keys_that_need_last_blocks_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_algorithm("inclusivefl", {"own_last": False, "beta": 0.5, "stages": ["tower"]})
    assert [key for key in ("beta", "stages") if key in str(caught.value)] == ["beta", "stages"]
    assert len(caught.value.faults) == 2
