"""Standalone: nothing travels, and every client goes on where it was."""

import toy

from polyfed.algorithms.standalone import Standalone
from polyfed.base import tree

TRAIN = {"momentum": 0.9, "lr": 0.05}


def test_standalone_sends_nothing_and_goes_on_where_it_was() -> None:
    """Catches bytes, a server that learns something, and a model that starts anew."""
    game = toy.play(toy.federation(Standalone(), train=TRAIN, models=(toy.MLP, "mlp(hidden=(5,))")), 3)
    assert all(m is None for exchange in (*game.sent, *game.got) for m in exchange.values())
    assert all(r.up.total + r.down.total == 0 for p in game.played for r in p.reports.values())
    alone = toy.play(toy.federation(Standalone(), train=TRAIN, sizes=(11,)), 3)
    assert tree.same(game.private(0).model, alone.private(0).model)
    assert not tree.same(alone.private(0).model, toy.play(alone.federation, 2).private(0).model)


def test_standalone_trains_only_who_is_drawn() -> None:
    """Catches clients that train in every round, whatever the participation."""
    fed = toy.federation(Standalone(), sizes=(6,) * 4, clients={"participation": 0.25})
    game = toy.play(fed)
    for _ in range(4):
        before = {k: game.private(k).model for k in range(4)}
        game.round()
        (drawn,) = [client.id for client in game.played[-1].cohort]
        assert [k for k in range(4) if not tree.same(before[k], game.private(k).model)] == [drawn]
