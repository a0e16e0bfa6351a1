"""Draws the clients of a round by seed and round, at a cost that grows with the cohort, not with all clients.

docs/clocks.md explains the effect of each kind of selection on the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from polyfed.base.rng import Rng
from polyfed.base.types import ClientId
from polyfed.config.sections import oversampled
from polyfed.core.clients import Cohort
from polyfed.rounds.federation import Federation, ServerView
from polyfed.rounds.sampling import Strata, Weighted, capacity_draw, draw_available


def draw_cohort(federation: Federation, round_: int, now: float = 0.0) -> Cohort:
    """Draw the cohort of a round.

    Args:
        federation: the federation.
        round_: number of the round.
        now: simulated seconds since the beginning of the run.
    """
    clients, devices = federation.config.clients, federation.config.devices
    count = clients.wanted if devices is None else devices.asked(clients)
    rng = federation.rng.at("round", round_)
    if clients.selection == "available":
        availability = federation.availability
        assert availability is not None, "the configuration was checked"
        chosen = draw_available(
            rng.at("cohort").numpy(), clients.count, count, partial(availability.available, now=now)
        )
    else:
        chosen = pick(rng.at("cohort"), clients.count, count, federation.draw)
    return cohort_of(federation, chosen, round_)


def draw_connected(view: ServerView, round_: int, connected: Sequence[ClientId], oversample: float) -> Cohort:
    """Draw the cohort of a round of a deployment; it is that of a simulation if all clients are connected.

    Args:
        view: the server's knowledge of the federation.
        round_: number of the round.
        connected: the connected clients, ascending.
        oversample: share of further clients to ask.
    """
    clients = view.config.clients
    count = min(len(connected), oversampled(clients.wanted, oversample))
    draw = capacity_draw(clients.selection, [view.info(client).capacity for client in connected])
    places = pick(view.rng.at("round", round_, "cohort"), len(connected), count, draw)
    return cohort_of(view, [connected[place] for place in places], round_)


def pick(rng: Rng, total: int, count: int, draw: Weighted | Strata | None = None) -> Sequence[int]:
    """Draw ``count`` different numbers below ``total``, ascending: equally likely, or by weight or stratum."""
    if count == total and not (isinstance(draw, Weighted) and draw.positive < total):
        return range(total)
    if draw is not None:
        return draw.draw(rng.numpy(), count)
    # NumPy's algorithm (Floyd's) costs as much as the cohort if that is at most a fiftieth of many clients.
    return sorted(rng.numpy().choice(total, count, replace=False).tolist())


def cohort_of(view: ServerView, chosen: Sequence[ClientId], round_: int) -> Cohort:
    """Return these clients as the cohort of a round."""
    return Cohort(tuple(map(view.info, chosen)), round_, view.config.run.rounds, view.rng.at("round", round_, "server"))


def sample(view: ServerView, size: int | None, round_: int, purpose: str) -> list[ClientId]:
    """Draw ``size`` different clients, ascending, for a round and a purpose; None takes all."""
    count = view.config.clients.count
    return list(pick(view.rng.at("round", round_, purpose), count, count if size is None else min(size, count)))
