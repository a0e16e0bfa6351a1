"""FjORD: the widths that a capacity allows, the bytes, the statistics of each width, and FedAvg at one width."""

from collections import Counter
from typing import Any

import pytest
import torch
import toy

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fjord import FjORD
from polyfed.base import tree
from polyfed.base.errors import ConfigError, ModelError
from polyfed.blocks.submodel import prefix_inside
from polyfed.config import load_algorithm
from polyfed.core.message import size

RESNET = "resnet8(width=4)"


def game(widths: tuple[float, ...], capacities: list[float], rounds: int = 1, **keys: Any) -> toy.Game:
    fed = toy.federation(
        FjORD(widths=widths, **keys),
        models=(RESNET,), shape=(1, 8, 8), sizes=(11, 8, 6), clients={"capacities": capacities},
    )  # fmt: skip
    return toy.play(fed, rounds)


def test_a_capacity_allows_widths_up_to_its_root() -> None:
    """Catches a capacity taken for a width, and a root that rounding puts just below a width."""
    algorithm = FjORD()
    assert [algorithm.held(c)[-1] for c in (1.0, 0.64, 0.6, 0.36, 0.04)] == [1.0, 0.8, 0.6, 0.6, 0.2]
    assert FjORD(widths=(1.0, 0.5, 0.5)).held(0.3) == (0.5,)


def test_a_capacity_without_a_width_is_refused() -> None:
    """Catches an index error at the first round."""
    fed = toy.federation(FjORD(), clients={"capacities": [1.0, 0.01]})
    text = r"capacity 0\.01: the smallest width 0\.2 needs 0\.04; add a width of at most 0\.1 to algorithm\.widths"
    with pytest.raises(ModelError, match=text):
        fed.algorithm.check(fed.task)


def test_no_width_at_all_is_refused() -> None:
    """Catches an empty list of widths that fails where the smallest is taken."""
    with pytest.raises(ConfigError, match=r"algorithm\.widths: got \[\]; expected a list of at least 1"):
        load_algorithm("fjord", {"widths": []})


def test_bytes_are_those_of_the_width_and_its_statistics() -> None:
    """Catches the full network sent to all, statistics of widths that a client lacks, and positions."""
    played = game((0.5, 1.0), [1.0, 0.3, 0.3])

    def weights(p: float) -> int:
        a, b, c = int(4 * p), int(8 * p), int(16 * p)
        blocks = 9 * (a + 2 * a * a + a * b + b * b + b * c + c * c) + a * b + b * c
        return blocks + 2 * (3 * a + 3 * b + 3 * c) + 4 * c + 4

    def statistics(p: float) -> int:
        return 4 * 2 * sum(3 * int(n * p) for n in (4, 8, 16)) + 8 * 9  # nine layers, each with a counter

    for sent in (played.sent[0], played.got[0]):
        assert size(sent[0]).values == 4 * weights(1.0) + statistics(0.5) + statistics(1.0)
        assert size(sent[1]).values == 4 * weights(0.5) + statistics(0.5)
        assert size(sent[0]).indices == size(sent[1]).indices == 0


def test_one_width_is_fedavg() -> None:
    """Catches anything that FjORD does besides: its weights and statistics are FedAvg's."""
    played = game((1.0,), [1.0], rounds=2)
    plain = toy.play(
        toy.federation(FedAvg(), models=(RESNET,), shape=(1, 8, 8), sizes=(11, 8, 6), clients={"capacities": [1.0]}), 2
    )
    got = {name.removeprefix("1/"): value for name, value in played.server.model.items()}
    toy.close(got, plain.server.model, 1e-6)


def test_channels_that_nobody_holds_stay() -> None:
    """Catches a weight beyond every width that moves by a bit, and statistics of a width without a client."""
    played = game((0.25, 0.5, 1.0), [0.3])
    first = toy.play(played.federation).server.model
    last = played.server.model
    assert torch.equal(last["layer3.0.conv2.weight"][8:], first["layer3.0.conv2.weight"][8:])
    assert not torch.equal(last["layer3.0.conv2.weight"][:8, :8], first["layer3.0.conv2.weight"][:8, :8])
    assert all(torch.equal(value, first[name]) for name, value in last.items() if name.startswith("1/"))


def test_statistics_move_where_their_width_was_drawn() -> None:
    """Catches one draw for a round, a draw that all clients share, and statistics that another width moves."""
    played = game((0.25, 0.5, 1.0), [1.0])
    drawn = []
    for k in range(3):
        local, sent = played.local(k, 1), played.got[0][k].model
        steps = local.plan.count(len(local.train))
        draws = torch.randint(3, (steps,), generator=local.rng.at("widths").torch()).tolist()
        counts = Counter(draws)
        for number, p in enumerate(("0.25", "0.5", "1")):
            assert int(sent[f"{p}/bn1.num_batches_tracked"]) == counts[number]
        drawn.append(draws)
    assert len({tuple(draws) for draws in drawn}) > 1
    assert any(len(set(draws)) > 1 for draws in drawn)


def test_distillation_runs_the_widest_at_every_step() -> None:
    """Catches a teacher that is not trained in the steps of a narrower width."""
    played = game((0.25, 0.5, 1.0), [1.0], distill=True)
    for k in range(3):
        local = played.local(k, 1)
        sent = played.got[0][k].model
        assert int(sent["1/bn1.num_batches_tracked"]) == local.plan.count(len(local.train))


def test_every_width_is_tested_with_its_own_statistics() -> None:
    """Catches a global model of a width that has the statistics of another."""
    played = game((0.5, 1.0), [1.0, 0.3])
    algorithm, x = played.federation.algorithm, torch.randn(4, 1, 8, 8)
    nets = algorithm.global_nets(played.server, played.federation.task)
    assert list(nets) == ["width 1", "width 0.5"]  # the first is the server's model by default
    full = played.federation.task.common("fjord")
    for name, p in (("width 0.5", 0.5), ("width 1", 1.0)):
        model = played.local(0).models[f"{p:g}"]
        whole = {n: v for n, v in played.server.model.items() if "/" not in n}
        held = {n: v[tuple(map(slice, model.shapes[n]))] for n, v in whole.items()}
        expected = model({**held, **tree.under(played.server.model, f"{p:g}/")}, x)
        assert torch.equal(algorithm.predict(nets[name], x)["submodel"], expected)
    with pytest.raises(TypeError, match="this part has no network"):
        prefix_inside(None, 0.5, 1.0)
    assert not prefix_inside(full, 1.0, 1.0)
