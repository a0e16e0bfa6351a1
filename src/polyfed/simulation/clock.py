"""The simulated clock: how long a round lasts on the clients' devices, which replies are in time, and what is wasted.

Rounds end, and replies are lost, as in a deployment; docs/clocks.md has the definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np

from polyfed.base.types import ClientId
from polyfed.config.profiles import Profile
from polyfed.core.clients import Cohort
from polyfed.core.gather import Gathered
from polyfed.core.requests import Exchange
from polyfed.execute.drivers import Sequential
from polyfed.rounds.availability import Availability
from polyfed.rounds.clients import SimulatedClients, TooFewRepliesError
from polyfed.rounds.federation import Federation
from polyfed.rounds.round import Played, play_round
from polyfed.rounds.scoring import Score
from polyfed.rounds.selection import draw_cohort
from polyfed.rounds.timing import REASONS, Timing, Wasted
from polyfed.rounds.unit import Down, Report


def ended(
    arrivals: Mapping[ClientId, float],
    silent: Collection[ClientId],
    *,
    told: float = 0.0,
    deadline: float | None = None,
    enough: int | None = None,
) -> tuple[float, dict[ClientId, str]]:
    """Return when an exchange ends, and which replies are not used.

    It ends with the reply number ``enough``; else at the deadline, if a client has not answered by then; else when
    the last client has answered or reported its failure.

    Args:
        arrivals: seconds after which each reply arrives.
        silent: the clients that will neither answer nor report a failure.
        told: seconds after which the last client that reports a failure has reported it.
        deadline: seconds; None waits for all clients, so that none may be silent.
        enough: number of replies with which the exchange ends.

    Returns:
        The seconds, and "late" or "surplus" for each reply that is not used.
    """
    limit = float("inf") if deadline is None else deadline
    timely = sorted((seconds, client) for client, seconds in arrivals.items() if seconds <= limit)
    if enough is not None and len(timely) >= enough:
        used = {client for _, client in timely[:enough]}
        return timely[enough - 1][0], {client: "surplus" for client in arrivals if client not in used}
    if silent or told > limit or len(timely) < len(arrivals):
        return limit, {client: "late" for client, seconds in arrivals.items() if seconds > limit}
    return max((told, *arrivals.values())), {}


def done(profile: Profile, report: Report, until: float) -> Wasted:
    """Return a client's work up to ``until`` seconds after the request; it receives, computes and sends in turn."""
    amounts = (report.down.total, report.work.flops, report.up.total)
    begun, shares = 0.0, list[int]()
    for amount, needed in zip(amounts, profile.seconds(*amounts), strict=True):
        share = 1.0 if needed == 0 or until >= begun + needed else max(0.0, (until - begun) / needed)
        shares.append(round(share * amount))
        begun += needed
    return Wasted("", shares[2], shares[0], shares[1], min(until, begun))


class TimedClients:
    """Clients whose replies take the time of their devices. A `polyfed.rounds.clients.Clients` for `play_round`.

    Every available client trains, as its time is known only then; of a client that does not answer in time only the
    costs are kept.

    Args:
        federation: a federation with devices.
        clients: the clients that do the work.
        say: receives, once for each kind of client, the notice that its device cannot hold a training step.
    """

    def __init__(self, federation: Federation, clients: SimulatedClients, say: Callable[[str], None]) -> None:
        assert federation.availability is not None
        assert federation.config.devices is not None
        self.federation, self.clients, self.say = federation, clients, say
        self.availability: Availability = federation.availability
        self.rules = federation.config.devices
        self.timing = Timing(0.0)
        self._phase = 0
        self._wanted: int | None = None
        self._counted: list[tuple[ClientId, Report]] = []
        self._said: set[tuple[str, str]] = set()

    def play(self, server: Any, round_: int, driver: Sequential, now: float, *, score: bool) -> Played:
        """Play a round that begins ``now``, in simulated seconds; `Algorithm.void_round` says what a void one does."""
        self.timing, self._phase, self._counted = Timing(now, self.availability.hour(now) % 24), 0, []
        self._wanted = self.federation.config.clients.wanted if self.rules.oversample else None
        cohort = draw_cohort(self.federation, round_, now)
        try:
            if not len(cohort):
                raise TooFewRepliesError(f"round {round_}: no client is available at this hour; expected at least one")
            return replace(play_round(self.federation, server, cohort, self, driver, score=score), timing=self.timing)
        except TooFewRepliesError as error:
            self._void()
            server = self.federation.algorithm.void_round(server, cohort, error.seconds)
            return Played(server, cohort, {}, self.timing)

    def _void(self) -> None:
        self.clients.discard_round()
        for client, report in self._counted:
            self._lose(client, report, "void")
        self.timing.clients.clear()
        self.timing.void = True
        if self.timing.seconds == 0:  # no client was available, or could begin: the server waits for the next full hour
            self.timing.seconds = self.availability.next_hour(self.timing.start)

    def exchange(self, request: Exchange, *, score: bool = False) -> tuple[Gathered, dict[ClientId, Report]]:
        """Send each client its message and add up the replies that come in time.

        Raises:
            TooFewRepliesError: fewer than ``min_replies`` replies do.
        """
        self._phase += 1
        cohort, down = request.cohort, request.down
        asked = sorted(down)
        there = self.availability.available(asked, self.timing.start + self.timing.seconds)
        present = {client: down[client] for client in compress(asked, there)}
        with self.clients.gathering(request) as gathering:
            reports = self.clients.gather(gathering, replace(request, down=present), score=score)
            kept, failed, took = self._ended(cohort, asked, present, reports)
            gathered = gathering.settle(kept, {client: REASONS[reason] for client, reason in failed.items()})
        return replace(gathered, seconds=took), kept

    def _ended(
        self, cohort: Cohort, asked: Sequence[ClientId], present: Down, reports: Mapping[ClientId, Report]
    ) -> tuple[dict[ClientId, Report], dict[ClientId, str], dict[ClientId, float]]:
        """Return the reports of replies that count, why others do not, and `Gathered.seconds`; discard others' states.

        Raises:
            TooFewRepliesError: fewer than ``min_replies`` replies count.
        """
        profiles = {client: self.availability.profile(client) for client in reports}
        needed = {client: sum(self._legs(profiles[client], report)) for client, report in reports.items()}
        failed = dict.fromkeys((client for client in asked if client not in present), "absent")
        failed |= dict.fromkeys(
            (k for k, report in reports.items() if self._overfull(k, profiles[k], report)), "memory"
        )
        vanishing = {k: at for k, at in self._vanishing(cohort.round, present).items() if k not in failed}
        failed |= dict.fromkeys(vanishing, "dropped")
        # A client without enough memory reports that when it begins to compute.
        told = {k: self._legs(profiles[k], reports[k])[0] for k, reason in failed.items() if reason == "memory"}
        seconds, late = ended(
            {client: needed[client] for client in reports if client not in failed},
            vanishing,
            told=max(told.values(), default=0.0),
            deadline=self.rules.deadline,
            enough=self._wanted,
        )
        failed |= late
        self.timing.seconds += seconds
        self.clients.discard([client for client in reports if client in failed])
        for client, reason in failed.items():
            until = told.get(client, needed.get(client, 0.0) * vanishing.get(client, 1.0))
            self._lose(client, reports.get(client), reason, until)
        kept = {client: report for client, report in reports.items() if client not in failed}
        self.timing.clients |= {client: self.timing.clients.get(client, 0.0) + needed[client] for client in kept}
        self._counted += kept.items()
        took = {k: needed[k] if k in kept else float("inf") for k in sorted({*kept, *late}) if late.get(k) != "surplus"}
        if len(kept) < self.rules.min_replies:
            raise TooFewRepliesError(
                f"round {cohort.round}: {len(kept)} of {len(asked)} clients answered in time; expected at least "
                f"devices.min_replies = {self.rules.min_replies}",
                took,
            )
        return kept, failed, took

    def commit(self) -> None:
        """Count the round: the states that its clients kept become their private states."""
        self.clients.commit()

    def evaluate(self, round_: int, down: Down, *, final: bool = False) -> dict[ClientId, Score]:
        """Test the clients; testing takes no simulated time."""
        return self.clients.evaluate(round_, down, final=final)

    def _legs(self, profile: Profile, report: Report) -> tuple[float, float, float]:
        return profile.seconds(report.down.total, report.work.flops, report.up.total)

    def _vanishing(self, round_: int, present: Down) -> dict[ClientId, float]:
        """Return the clients that vanish, and after which share of their time."""
        rng = self.federation.rng.at("round", round_, "dropout", self._phase)
        clients = np.array(sorted(present), dtype=np.int64)
        gone = clients[rng.uniform(clients) < self.rules.dropout]
        return dict(zip(gone.tolist(), rng.at("when").uniform(gone).tolist(), strict=True))

    def _overfull(self, client: ClientId, profile: Profile, report: Report) -> bool:
        needed = report.work.peak_bytes / 1e6
        if needed <= profile.memory_mb:
            return False
        kind = (self.federation.info(client).architecture, profile.device)
        if kind not in self._said:
            self._said.add(kind)
            self.say(
                f"client {client} and others with its network and device never answer: a step of {kind[0]} takes "
                f"{needed:,.0f} MB, and a {kind[1]} has {profile.memory_mb:,.0f} MB"
            )
        return True

    def _lose(self, client: ClientId, report: Report | None, reason: str, until: float = float("inf")) -> None:
        if report is None:
            loss = Wasted(reason)
        else:
            loss = replace(done(self.availability.profile(client), report, until), reason=reason)
            self.timing.testing += report.score.seconds if report.score else 0.0
        earlier = self.timing.losses.get(client)
        self.timing.losses[client] = loss if earlier is None else earlier + loss
