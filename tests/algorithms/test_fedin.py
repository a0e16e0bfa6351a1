"""FedIN: whose pairs, which layers, which statistics, and who owns what; the method card's acceptance tests."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from polyfed import simulate
from polyfed.algorithms.fedin import Features, FedIN
from polyfed.base import tree
from polyfed.base.errors import ConfigError, ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.aggregate import by_name_mean
from polyfed.blocks.inco import mixed
from polyfed.blocks.losses import supervised
from polyfed.config import Config
from polyfed.core.clients import ClientInfo, Cohort
from polyfed.core.message import Nothing
from polyfed.core.requests import Reduce, fit
from polyfed.execute.local_training import bind, run_fit, run_reduce
from polyfed.execute.placement import Placement
from polyfed.models.zoo import build

SMALL = ("in-resnet10-small(width=4)", "in-resnet14-small(width=4)", "in-resnet18-small(width=4)")
IMAGE = (1, 16, 16)
CPU = Placement(torch.device("cpu"))


def federation(models: tuple[str, ...] = SMALL, sizes: tuple[int, ...] = (8, 12, 8), **keys: Any) -> Any:
    train = keys.pop("train", {"epochs": 1, "lr": 0.01})
    clients = keys.pop("clients", None)
    return toy.federation(
        FedIN(**{"feature_batch": 6, **keys}), models=models, shape=IMAGE, sizes=sizes, train=train, clients=clients
    )


def test_cut_tensors_have_one_shape_at_all_depths() -> None:
    """Catches a cut that moves with the depth (card, a), at the paper's size too."""
    for cut, shape in (("stem", (64, 8, 8)), ("stage1", (64, 8, 8)), ("stage2", (128, 4, 4))):
        sizes = (10, 14, 18, 22, 26) if cut == "stem" else (10, 26)
        five = [build(f"in-resnet{n}(cut={cut})", input_shape=(3, 32, 32), num_classes=10) for n in sizes]
        assert {model.s_in_shape for model in five} == {shape}
        assert {model.s_out_shape for model in five} == {(512,)}
    game = toy.play(federation(), 1)
    assert {tuple(p.s_in.shape) for p in game.server.bank.values()} == {(6, 4, 4, 4)}
    assert {tuple(p.s_out.shape) for p in game.server.bank.values()} == {(6, 32)}


def test_a_pair_is_what_the_trained_client_makes_of_one_unaugmented_batch_in_eval_mode() -> None:
    """Catches pairs captured before training, in training mode, or shuffled against each other (card, c)."""
    fed = federation()
    game = toy.play(fed, 1)
    for k in range(3):
        local = fed.local(k, 1)
        model, w = local.models["model"], game.got[0][k].layers
        (pair,) = game.got[0][k].pairs
        model.train(False)
        with torch.no_grad():
            assert torch.allclose(model.intermediate(w, pair.s_in), pair.s_out, rtol=1e-6, atol=1e-7)
            everything = model.extract(w, local.train.batch(torch.arange(len(local.train)))[0])
        distances = torch.cdist(pair.s_in.flatten(1), everything.flatten(1))
        nearest = distances.argmin(1).tolist()
        assert len(set(nearest)) == 6  # different examples of the client's own
        assert float(distances.min(1).values.max()) < 1e-4
        assert pair.round == 1


def losses(nets: Any, fed: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    value = fed.algorithm.in_loss(nets, None)
    names = [n for n, v in leaves.items() if v.requires_grad]
    grads = torch.autograd.grad(value, [leaves[n] for n in names], allow_unused=True)
    return {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def test_the_in_loss_reaches_intermediate_layers_alone_and_moves_no_statistics() -> None:
    """Catches gradients to stem or head (card, d), and running statistics polluted by foreign features (card, e)."""
    fed = federation()
    game = toy.play(fed, 1)
    local = fed.local(0, 2)
    model = local.models["model"]
    leaves = {n: v.clone().requires_grad_(n in model.parameter_names) for n, v in game.sent[0][0].layers.items()}
    pair = game.server.bank[1]
    nets = bind(local.models, {"model": leaves, "pair": {"s_in": pair.s_in, "s_out": pair.s_out}})
    model.train(True)
    before = {n: leaves[n].clone() for n in model.buffer_names}
    found = losses(nets, fed, leaves)
    assert set(found) == {n for n in model.intermediate_names if n in model.parameter_names}
    assert all(torch.equal(leaves[n], before[n]) for n in before)
    model.train(False)


def test_the_in_loss_of_ones_own_pair_is_zero() -> None:
    """Catches a loss that is not zero where the mapping is already right (card, c)."""
    fed = federation()
    game = toy.play(fed, 1)
    local, mine = fed.local(0, 1), game.got[0][0]
    pair = {"s_in": mine.pairs[0].s_in, "s_out": mine.pairs[0].s_out}
    nets = bind(local.models, {"model": mine.layers, "pair": pair})
    local.models["model"].train(False)
    assert float(fed.algorithm.in_loss(nets, None)) < 1e-12


def names(spec: str) -> set[str]:
    return set(build(spec, input_shape=IMAGE, num_classes=4).shapes)


def test_owners_are_those_of_the_card() -> None:
    """Catches layers matched by position instead of by name (card, f): what only R18 or R14 and R18 have."""
    r10, r14, r18 = map(names, SMALL)
    assert r10 < r14 < r18
    assert {n.rsplit(".", 2)[0] for n in r14 - r10 if n.endswith("conv1.weight")} == {"layer3.1", "layer4.1"}
    assert {n.rsplit(".", 2)[0] for n in r18 - r14 if n.endswith("conv1.weight")} == {"layer1.1", "layer2.1"}


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_layer_is_averaged_over_its_owners(weighting: Any) -> None:
    """Catches a mean over all clients, and weights that are not the setting's."""
    game = toy.play(federation(weighting=weighting), 1)
    sizes = (8, 12, 8) if weighting == "examples" else (1, 1, 1)
    for name, value in game.server.layers.items():
        owners = [k for k in range(3) if name in game.got[0][k].layers]
        total = sum(sizes[k] * game.got[0][k].layers[name].double() for k in owners) / sum(sizes[k] for k in owners)
        expected = total.to(value.dtype) if value.is_floating_point() else total.round().to(value.dtype)
        assert torch.allclose(value.double(), expected.double(), rtol=1e-6, atol=1e-8), name
    assert {len([k for k in range(3) if n in game.got[0][k].layers]) for n in game.server.layers} == {1, 2, 3}


def test_a_layer_without_owner_in_the_round_stays() -> None:
    """Catches layers that vanish or move while nobody trains them (card, j)."""
    fed = federation(clients={"participation": 0.34})
    game, unowned = toy.play(fed), 0
    for _ in range(4):
        before = game.server.layers
        game.round()
        (drawn,) = game.got[-1]
        for name, value in before.items():
            if name not in game.got[-1][drawn].layers:
                unowned += 1
                assert torch.equal(game.server.layers[name], value)
        assert game.server.layers.keys() == before.keys()
    assert unowned > 0


def test_nobody_ever_gets_its_own_pair() -> None:
    """Catches self-distillation (card, k); pairs come from all others and change."""
    game = toy.play(federation(sizes=(8, 8, 8)))
    donors: dict[int, set[int]] = {k: set() for k in range(3)}
    for round_ in range(1, 7):
        bank = dict(game.server.bank)
        game.round()
        for k, message in game.sent[-1].items():
            assert len(message.pairs) == (0 if round_ == 1 else 1)
            for pair in message.pairs:
                (whose,) = [j for j, p in bank.items() if p is pair]
                donors[k].add(whose)
    assert all(k not in whose for k, whose in donors.items())
    assert {len(whose) for whose in donors.values()} == {2}


def test_a_single_client_has_nobody_to_learn_from() -> None:
    """Catches a draw from an empty bank."""
    game = toy.play(federation(models=SMALL[:1], sizes=(8,)), 3)
    assert all(message.pairs == () for sent in game.sent for message in sent.values())


@pytest.mark.parametrize("max_age", [1, 2])
def test_old_pairs_leave_the_bank(max_age: int) -> None:
    """Catches pairs that are used long after the models that made them, and an age that is off by one."""
    fed = federation(clients={"participation": 0.34}, max_age=max_age)
    game = toy.play(fed)
    for round_ in range(1, 9):
        game.round()
        ages = {k: round_ - pair.round for k, pair in game.server.bank.items()}
        assert all(age < max_age for age in ages.values())
        trained = {k for n in range(max(0, round_ - max_age), round_) for k in game.got[n]}
        assert set(game.server.bank) == trained


def test_bytes_are_the_formula_of_the_card() -> None:
    """Catches features that travel in vain, twice, or with the evaluation (card, h)."""
    fed = federation(models=SMALL[:2])
    game = toy.play(fed, 2)
    for k in range(3):
        model = fed.local(k, 1).models["model"]
        layers = 0
        for name, shape in model.shapes.items():
            layers += shape.numel() * (8 if name.endswith("num_batches_tracked") else 4)
        pair = 4 * 6 * (torch.Size(model.s_in_shape).numel() + model.rep_dim)
        first, second = (played.reports[k] for played in game.played)
        assert first.down.values == layers
        assert first.up.values == second.up.values == second.down.values == layers + pair
    assert fed.algorithm.message_for(game.server, fed.info(0)).pairs == ()


def test_without_in_steps_no_features_travel_and_it_is_layerwise_averaging() -> None:
    """Catches an ablation that is none (card, i): every = never equals weight 0, bitwise in round 1 of both."""
    off, on = toy.play(federation(every="never"), 1), toy.play(federation(), 1)
    assert tree.same(off.server.layers, on.server.layers)
    assert off.server.bank == {}
    off.round()
    assert all(m.pairs == () for m in (*off.sent[1].values(), *off.got[1].values()))
    on.round()
    assert not tree.same(off.server.layers, on.server.layers)
    zero = toy.play(federation(weight=0.0), 2)
    toy.close(zero.server.layers, off.server.layers, 1e-6)


def test_without_in_steps_it_is_layerwise_fedavg_bit_by_bit() -> None:
    """Catches an ablation whose local training, draws or mean are not those of layer-wise averaging (card, i)."""
    game = toy.play(federation(every="never"))
    for round_ in (1, 2):
        layers, ended = game.server.layers, []
        game.round()
        for k in range(3):
            local = game.local(k, round_)
            own = tree.pick(layers, local.models["model"].shapes)
            ended.append(run_fit(next(fit(local, {"model": own}, loss=supervised)), CPU).parts["model"])  # type: ignore[arg-type]
        assert tree.same(game.server.layers, by_name_mean(ended, [8, 12, 8], default=layers))


@pytest.mark.parametrize(("every", "due"), [("step", 4), ("epoch", 2), ("round", 1)])
def test_in_steps_are_as_frequent_as_asked(every: Any, due: int) -> None:
    """Catches a cadence that is another, or counts epochs from one."""
    fed = federation(every=every, sizes=(8, 8, 8), train={"epochs": 2, "lr": 0.01})
    game = toy.play(fed, 1)
    calls = []
    algorithm, loss = fed.algorithm, fed.algorithm.in_loss
    object.__setattr__(algorithm, "in_loss", lambda nets, batch: calls.append(1) or loss(nets, batch))
    charge = game.driver.charge
    game.driver.charge = lambda *args: None  # type: ignore[method-assign]  # counting costs takes steps of its own
    game.round()
    game.driver.charge = charge  # type: ignore[method-assign]
    assert len(calls) == 3 * due


def test_every_layer_starts_as_in_the_largest_network_that_has_it() -> None:
    """Catches sub-models that start apart: what R10 gets first is cut from R18."""
    fed = federation()
    game = toy.play(fed)
    largest = build(SMALL[2], input_shape=IMAGE, num_classes=4).init(fed.rng.at("server").at("layers"))
    assert tree.same(game.server.layers, largest)
    game.round()
    for k in range(3):
        assert set(game.sent[0][k].layers) == names(SMALL[k])
        assert all(torch.equal(v, largest[n]) for n, v in game.sent[0][k].layers.items())


def test_cuts_that_do_not_fit_are_refused_with_both_shapes() -> None:
    """Catches features of one network that another cannot take."""
    fed = federation(models=("in-resnet10-small(width=4)", "in-resnet14-small(width=8)"))
    with pytest.raises(ModelError, match=r"width=4.*width=8"):
        fed.algorithm.check(fed.task)


def test_the_donor_depends_on_seed_round_and_client_alone() -> None:
    """Catches a draw that moves with the order of clients or with who else takes part."""
    server = FedIN.Server({}, {}, {k: Features(torch.zeros(1), torch.zeros(1), 1) for k in range(6)})
    algorithm = FedIN()

    def donors(clients: tuple[int, ...], round_: int) -> dict[int, Any]:
        cohort = Cohort(tuple(ClientInfo(k) for k in clients), round_, 9, Rng((0, "round", round_)))
        return {c.id: algorithm.draw(server, c, cohort)[0] for c in cohort}

    all_, some = donors((0, 1, 2, 3), 2), donors((1, 3), 2)
    assert all(all_[k] is some[k] for k in some)
    found = [tuple(id(p) for p in donors((0, 1, 2, 3), n).values()) for n in range(2, 8)]
    assert any(a != b for a, b in pairwise(found))


def test_captured_features_are_not_augmented() -> None:
    """Catches pairs made of shifted images: reduce hands the client's rows as they are."""
    fed = federation()
    local = fed.local(0, 1)
    w = local.models["model"].init(fed.rng)
    request = Reduce(local, {"model": w}, fed.algorithm.capture, torch.tensor([2, 0]))
    made = run_reduce(request, Placement(torch.device("cpu")))
    local.models["model"].train(False)
    with torch.no_grad():
        expected = local.models["model"].extract(w, local.train.batch(torch.tensor([2, 0]))[0])
    assert torch.equal(made["s_in"], expected)


def test_the_in_loss_of_ones_own_pair_is_zero_in_training_with_running_statistics() -> None:
    """Catches ``norm`` that is none: in training, the batch's statistics give another output than evaluation did."""
    game = {norm: toy.play(federation(norm=norm), 1) for norm in ("batch", "running")}
    found = {}
    for norm, played in game.items():
        local, mine = played.local(0, 1), played.got[0][0]
        model = local.models["model"]
        model.train(True)
        nets = bind(
            local.models, {"model": mine.layers, "pair": {"s_in": mine.pairs[0].s_in, "s_out": mine.pairs[0].s_out}}
        )
        before = tree.pick(mine.layers, model.buffer_names)
        kept = toy.copy(before)
        found[norm] = float(played.federation.algorithm.in_loss(nets, None))
        assert model.training  # the mode is as it was
        assert tree.same(before, kept)
        model.train(False)
    assert found["running"] < 1e-12
    assert found["batch"] > 1e-4


def test_at_the_level_of_a_round_intermediate_weights_alone_differ_from_local_training() -> None:
    """Catches a level that moves stem, head, norms or statistics (card, d, e), or that moves nothing."""
    models, keys = SMALL[:1] * 3, {"every": "round", "level": "round"}
    off, on, wide = (
        toy.play(federation(models, (8, 8, 8), **given), 2)
        for given in ({"every": "never"}, keys, {**keys, "vectors": True})
    )

    def moved(game: toy.Game) -> set[str]:
        return {n for n, v in off.got[1][0].layers.items() if not torch.equal(v, game.got[1][0].layers[n])}

    model = on.local(0, 2).models["model"]
    inner = model.intermediate_names & model.parameter_names
    assert moved(on) == {n for n in inner if len(model.shapes[n]) > 1}
    assert moved(wide) == inner


@pytest.mark.parametrize(("every", "due"), [("step", 4), ("epoch", 2), ("round", 1)])
def test_at_the_level_of_a_round_in_training_has_as_many_steps_as_are_due(every: Any, due: int) -> None:
    """Catches IN training over the whole plan, whatever the cadence, and a loss that is not the local one."""
    game = toy.play(federation(every=every, level="round", sizes=(8, 8, 8), train={"epochs": 2, "lr": 0.01}), 2)
    assert [game.played[r].reports[0].work.steps for r in (0, 1)] == [4, 4 + due]
    off = toy.play(federation(every="never", sizes=(8, 8, 8), train={"epochs": 2, "lr": 0.01}), 2)
    assert game.played[1].reports[0].work.loss == off.played[1].reports[0].work.loss


def test_a_pinned_batch_is_the_same_at_each_participation() -> None:
    """Catches a choice that is forgotten, made anew, or the same for all clients; else it is new each time."""
    pinned, free = (toy.play(federation(pin=pin, sizes=(24, 24, 24)), 3) for pin in (True, False))
    kept = [pinned.private(k).rows.tolist() for k in range(3)]
    assert len({tuple(rows) for rows in kept}) == 3
    assert free.private(0) == Nothing()
    for game, same in ((pinned, True), (free, False)):
        shown = []
        for round_ in range(3):
            local, up = game.local(1, round_ + 1), game.got[round_][1]
            model = local.models["model"]
            model.train(False)
            with torch.no_grad():
                everything = model.extract(up.layers, local.train.batch(torch.arange(24))[0])
            shown.append(torch.cdist(up.pairs[0].s_in.flatten(1), everything.flatten(1)).argmin(1).tolist())
        assert (shown[0] == shown[1] == shown[2]) is same
        if same:
            assert shown[0] == kept[1]


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_protected_features_travel_and_teach(driver: str) -> None:
    """Catches a veil that is not used, bytes that do not shrink, and receivers that cannot read what was sent."""
    keys = {"pool": 2, "clip": 0.9, "noise": 0.3, "half": True}
    games = [toy.play(federation(SMALL[:1] * 3, (8, 8, 8), **given), 2, driver=driver) for given in ({}, keys)]
    values = [game.played[0].reports[0].up.values for game in games]
    assert values[0] - values[1] == 6 * (4 * (64 + 32) - 2 * (16 + 32))
    assert games[1].got[0][0].pairs[0].s_in.dtype == torch.float16
    assert tuple(games[1].got[0][0].pairs[0].s_in.shape) == (6, 4, 2, 2)
    assert tree.same(games[0].got[0][0].layers, games[1].got[0][0].layers)  # nobody has learnt from features yet
    assert not tree.same(games[0].got[1][0].layers, games[1].got[1][0].layers)
    info, (sent, up) = games[1].federation.info(0), (games[1].sent[1][0], games[1].got[1][0])
    games[1].federation.algorithm.check_upload(games[1].federation.task, info, sent, up)


@pytest.mark.parametrize("driver", ["sequential", "batched"])
def test_nopeek_mixing_and_other_architectures_train(driver: str) -> None:
    """Catches a term that stacked clients do not have, donors of all kinds, and donors that are forgotten."""
    keys = {"nopeek": 50.0, "mix": 2, "donor_architecture": "other"}
    models = (SMALL[0], SMALL[0], SMALL[1], SMALL[1])
    game = toy.play(federation(models, (8, 8, 8, 8), **keys), 2, driver=driver)
    plain = toy.play(federation(models, (8, 8, 8, 8)), 1, driver=driver)
    name = "bn1.weight"
    assert game.server.architectures == {k: models[k] for k in range(4)}
    assert not torch.allclose(game.got[0][0].layers[name], plain.got[0][0].layers[name], rtol=1e-3)
    others = torch.cat([game.got[0][k].pairs[0].s_out for k in (2, 3)])
    given = torch.stack([row for message in (game.sent[1][0], game.sent[1][1]) for row in message.pairs[0].s_out])
    assert torch.cdist(given, others).min(1).values.max() < 1e-6
    assert all(float(torch.cdist(given, one).min(1).values.max()) > 1e-3 for one in others.split(6))
    if driver == "batched":
        one = toy.play(federation(models, (8, 8, 8, 8), **keys), 1)
        toy.close(game.got[0][0].layers, one.got[0][0].layers, 1e-4, floor=0.1)


def test_the_control_gets_its_own_pair() -> None:
    """Catches a control that is the method."""
    game = toy.play(federation(donor="own", sizes=(8, 8, 8)), 1)
    bank = dict(game.server.bank)
    game.round()
    assert all(message.pairs == (bank[k],) for k, message in game.sent[-1].items())


def test_the_ages_of_the_pairs_that_were_used_are_told() -> None:
    """Catches ages that nobody sees, of pairs that lay in the bank unused, or counted from the wrong round."""
    fed = federation(clients={"participation": 0.34})
    game = toy.play(fed)
    seen: set[int] = set()
    for round_ in range(1, 9):
        game.round()
        used = {k: round_ - pair.round for k, m in game.sent[-1].items() for pair in m.pairs}
        assert game.server.ages == used
        assert fed.algorithm.facts(game.server) == {"pair_ages": {str(age): 1 for age in used.values()}}
        seen |= set(used.values())
    assert len(seen) > 1
    assert min(seen) == 1


def test_keys_without_an_effect_are_refused_all_at_once() -> None:
    """Catches an ablation that looks like a run of its own and is none."""
    with pytest.raises(ConfigError) as error:
        FedIN(every="never", align="none", granularity="kernel", pin=True, noise=0.5, donor="own")
    assert sorted(text.split(":")[0] for text in error.value.faults) == [
        "align",
        "donor",
        "granularity",
        "noise",
        "pin",
    ]
    with pytest.raises(ConfigError) as error:
        Config.parse(
            {
                "clients": {"models": ["in-resnet10-small"], "count": 0},
                "algorithm": {"name": "fedin", "every": "never", "half": True, "clip": 0.5},
            }
        )
    text = str(error.value)
    assert all(
        f"algorithm.{key}: got {value}, which has no effect" in text
        for key, value in {"half": True, "clip": 0.5}.items()
    )
    assert "clients.count" in text
    with pytest.raises(ConfigError) as error:
        FedIN(donor="own", mix=2, donor_architecture="same")
    assert [text.split(":")[0] for text in error.value.faults] == ["donor_architecture", "mix"]
    with pytest.raises(ConfigError, match="nopeek"):
        FedIN(every="never", nopeek=0.1)
    with pytest.raises(ConfigError, match="inco_stages"):
        FedIN(inco_stages=("layer1",), align="none")
    assert FedIN(every="never", feature_batch=8, max_age=3, weighting="uniform").every == "never"
    for align in ("local_primary", "always"):
        with pytest.raises(ConfigError, match=f"weight: got 2.0, which has no effect: align = '{align}'"):
            FedIN(align=align, weight=2.0)


@dataclass(frozen=True, kw_only=True)
class Slowed(FedIN):
    """With a key of its own."""

    server_rate: float = 1.0


def test_a_key_of_ones_own_is_not_idle() -> None:
    """Catches keys that are refused because nobody has thought of them."""
    assert Slowed(every="never", server_rate=0.5).server_rate == 0.5


@pytest.mark.parametrize(
    ("keys", "what"), [({}, "norm = 'batch'"), ({"norm": "running", "donor": "shuffled"}, "donor = 'shuffled'")]
)
def test_an_only_example_is_refused_before_the_run(keys: dict[str, Any], what: str) -> None:
    """Catches a failure in round 2 that names the batch, and a control that is none."""
    fed = federation(feature_batch=1, **keys)
    with pytest.raises(ModelError, match=f"feature_batch = 1 with {what}"):
        fed.algorithm.check(fed.task)
    fine = federation(feature_batch=1, norm="running")
    fine.algorithm.check(fine.task)


def test_features_of_no_positions_are_not_pooled() -> None:
    """Catches a fault that is found in the first round."""
    fed = toy.federation(FedIN(pool=2))
    with pytest.raises(ModelError, match=r"algorithm\.pool = 2"):
        fed.algorithm.check(fed.task)
    for spec in ("vit(width=8, depth=1)", "resnet8(width=4)"):
        model = build(spec, input_shape=(3, 16, 16), num_classes=4)
        if spec.startswith("vit"):  # a mean over neighbouring numbers of a token
            with pytest.raises(ModelError, match="with the channels last"):
                FedIN(pool=2).check_features([model], batch_statistics=False)
        else:
            FedIN(pool=2).check_features([model], batch_statistics=False)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_inco_acts_after_the_mean_on_deeper_layers_alone(form: Any) -> None:
    """Catches an option without an effect, another round's changes, and clients that would notice it."""
    keys = {"every": "never", "train": {"epochs": 1, "lr": 0.1}}
    plain, other = toy.play(federation(**keys), 1), toy.play(federation(inco=form, **keys))
    start = other.server.layers
    other.round()
    mixes = {n: f"{n.split('.')[0]}.0.conv2.weight" for n in start if ".1.conv" in n}
    changes = {n: plain.server.layers[n] - start[n] for n in (*mixes, *mixes.values())}
    expected = mixed(changes, mixes, form)
    for name, value in other.server.layers.items():
        if name in mixes:
            assert torch.allclose(value - start[name], expected[name], rtol=1e-4, atol=1e-6)
            assert not torch.equal(value, plain.server.layers[name])
        else:
            assert torch.equal(value, plain.server.layers[name])
    assert [r.up for r in other.played[0].reports.values()] == [r.up for r in plain.played[0].reports.values()]


def test_the_log_of_a_round_says_how_old_the_pairs_were(tmp_path: Path) -> None:
    """Catches facts of the server's state that no file has."""
    config = Config.parse(
        {
            "run": {"rounds": 3, "driver": "sequential", "threads": 1},
            "partition": {"kind": "iid", "samples_per_client": 20},
            "clients": {"count": 3, "models": ["in-resnet10-small(width=4)"]},
            "algorithm": {"name": "fedin", "feature_batch": 6},
        }
    )
    simulate(config, out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["algorithm"] for line in lines] == [{"pair_ages": {}}] * 2 + [{"pair_ages": {"1": 3}}] * 2
