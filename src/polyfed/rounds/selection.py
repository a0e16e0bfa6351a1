"""Who takes part in a round: drawn by seed and round, at a cost that depends on the cohort and not on all clients.

docs/clocks.md says what each kind of selection means for the average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyfed.base.rng import Rng
from polyfed.base.types import ClientId
from polyfed.core.clients import Cohort
from polyfed.rounds.sampling import draw_available

if TYPE_CHECKING:
    from polyfed.rounds.federation import Federation


def draw_cohort(federation: Federation, round_: int, now: float = 0.0) -> Cohort:
    """The clients that are asked in a round.

    Args:
        federation: whose clients.
        round_: number of the round.
        now: simulated seconds since the beginning of the run.
    """
    config = federation.config
    clients, devices = config.clients, config.devices
    count = clients.wanted if devices is None else devices.asked(clients)
    rng = federation.rng.at("round", round_)
    chosen = _chosen(federation, rng.at("cohort"), count, now)
    return Cohort(tuple(map(federation.info, chosen)), round_, config.run.rounds, rng.at("server"))


def _chosen(federation: Federation, rng: Rng, count: int, now: float) -> range | list[ClientId]:
    total, availability = federation.config.clients.count, federation.availability
    if federation.config.clients.selection == "available":
        assert availability is not None, "the configuration was checked"
        return draw_available(rng.numpy(), total, count, lambda clients: availability.available(clients, now))
    if count == total:
        return range(total)
    if federation.weighted is not None:
        return federation.weighted.draw(rng.numpy(), count)
    # NumPy's way (Floyd's) costs the cohort where that is at most a fiftieth of many clients.
    return sorted(rng.numpy().choice(total, count, replace=False).tolist())


def sample(federation: Federation, size: int | None, round_: int, purpose: str) -> list[ClientId]:
    """So many different clients, ascending, drawn for a round and a purpose; None takes all."""
    count = federation.config.clients.count
    if size is None or size >= count:
        return list(range(count))
    rng = federation.rng.at("round", round_, purpose).numpy()
    return sorted(int(k) for k in rng.choice(count, size, replace=False))
