"""FD: what it sends, forgets and leaves out."""

import pytest
import torch
import toy
from by_class import federation

from polyfed.algorithms.fd import FD, Means
from polyfed.algorithms.standalone import Standalone
from polyfed.base import tree
from polyfed.core.clients import ClientInfo
from polyfed.core.message import size


def test_fd_sends_what_the_card_says() -> None:
    """Catches weights on the wire, and tables at full size upwards: L numbers for each class of the client."""
    game = toy.play(federation(FD()), 2)
    for k in range(3):
        own = set(game.local(k).train.labels.tolist())
        assert set(game.got[-1][k].means) == {str(c) for c in own}
        assert game.played[-1].reports[k].up.values == 4 * len(own) * 8
        held = {int(c) for j in range(3) if j != k for c in game.got[0][j].means}
        assert game.played[-1].reports[k].down.values == 4 * len(held) * 8
        assert game.played[0].reports[k].down.values == 0
        for mean in game.got[-1][k].means.values():
            assert bool((mean >= 0).all())
            assert float(mean.sum()) == pytest.approx(1)
    row = torch.zeros(10)
    assert size(FD.Upload({"0": row, "7": row})).values == 4 * 20
    assert size(FD.Broadcast({str(c): row for c in range(10)})).values == 4 * 100
    row = torch.zeros(100)
    assert size(FD.Upload({str(c): row for c in range(10)})).values == 4 * 1_000
    assert size(FD.Broadcast({str(c): row for c in range(100)})).values == 4 * 10_000


def test_fd_leaves_out_the_clients_own_vector() -> None:
    """Catches a target that holds the client's own, a wrong divisor, and one where nobody else has the class."""
    e = torch.eye(3)
    bank = {0: Means({"0": e[0], "1": e[1]}, 4), 1: Means({"0": e[1]}, 4), 2: Means({"0": e[2]}, 3)}
    server, algorithm = FD.Server(bank), FD()
    targets = algorithm.targets(server, ClientInfo(0))
    assert targets.keys() == {"0"}
    total = e[0] + e[1] + e[2]
    assert torch.allclose(targets["0"], (total - e[0]) / (3 - 1))
    assert torch.allclose(algorithm.targets(server, ClientInfo(9))["0"], total / 3)
    assert torch.equal(algorithm.targets(server, ClientInfo(1))["1"], e[1])
    assert algorithm.targets(FD.Server({}), ClientInfo(0)) == {}


def test_fd_forgets_after_max_age_and_no_sooner() -> None:
    """Catches a bank that grows stale for ever, or one that forgets who is away for a round."""
    fed = federation(FD(max_age=2), sizes=(4,) * 6, clients={"participation": 0.34})
    game = toy.play(fed)
    last: dict[int, int] = {}
    for round_ in range(1, 7):
        game.round()
        last |= {client.id: round_ for client in game.played[-1].cohort}
        assert {k: means.round for k, means in game.server.bank.items()} == {
            k: r for k, r in last.items() if round_ - r < 2
        }
    assert len(last) > len(game.server.bank)


def test_fd_with_weight_zero_is_standalone() -> None:
    """Catches a term that gamma does not reach, and a first round with a term."""
    with_it, without, alone = (toy.play(federation(a)) for a in (FD(), FD(weight=0.0), Standalone()))
    for round_ in (1, 2):
        for game in (with_it, without, alone):
            game.round()
        for k in range(3):
            assert tree.same(without.private(k).model, alone.private(k).model)
            assert tree.same(with_it.private(k).model, alone.private(k).model) is (round_ == 1)
