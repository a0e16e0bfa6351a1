"""``driver = "auto"``: find out the fastest way of each kind of client, once, and then go that way.

At the first round, and whenever a kind of client appears that was not there before, one client of the kind plays a dry
round under the clock (`polyfed.execute.choice.Calibration`). The findings are written beside the run, so a resumed run
does not ask the clock again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from polyfed.base.types import ClientId, Parts
from polyfed.core.clients import Cohort, Replies
from polyfed.core.message import Message
from polyfed.core.requests import drive
from polyfed.execute.choice import MARGIN, Calibration, ExecutionChoice, find_testing, kind_of_client, kind_of_testing
from polyfed.execute.drivers import Auto, Work
from polyfed.execute.local_training import bind, tree_to
from polyfed.execute.placement import Placement
from polyfed.execute.stacked import has_images
from polyfed.parallel.clients import WorkerClients
from polyfed.rounds.clients import Down, LocalClients, Report, measure
from polyfed.rounds.scoring import Score

#: Bytes per second and seconds per message between processes, measured low: written, mapped, read and freed.
PIPE, CALL = 1.2e9, 2e-4


class AutoClients:
    """Clients of this process or of several, whichever was found to be faster.

    Args:
        local: them, here.
        driver: of this process.
        choice: what is known of earlier; added to.
        start: starts that many workers, and deals the clients to them.
        most: the most workers to consider.
        found: told of every addition to ``choice``, before anything is done by it.
    """

    def __init__(
        self,
        local: LocalClients,
        driver: Auto,
        choice: ExecutionChoice,
        *,
        start: Callable[[int], WorkerClients],
        most: int,
        found: Callable[[ExecutionChoice], None],
    ) -> None:
        self.local, self.driver, self.choice = local, driver, choice
        self.federation = local.federation
        self.start, self.most, self.found = start, most, found
        self._workers: WorkerClients | None = None
        self._now = 0

    def _at(self, round_: int) -> LocalClients | WorkerClients:
        """Who works in a round."""
        self._now = round_
        if (self.choice.workers or 1) == 1 or round_ < self.choice.since:
            return self.local
        if self._workers is None:
            self._workers = self.start(self.choice.workers or 1)
        return self._workers

    @property
    def _clients(self) -> LocalClients | WorkerClients:
        return self._at(self._now)

    def exchange(self, cohort: Cohort, down: Down, *, score: bool = False) -> tuple[Replies, dict[ClientId, Report]]:
        """Find out what is not known yet, then run the client's side of the round for each message."""
        self._find_out(cohort, down)
        return self._at(cohort.round).exchange(cohort, down, score=score)

    def private(self, client: ClientId) -> Any:
        """A client's state, made (and not kept) if it has none."""
        return self._clients.private(client)

    def discard(self, clients: Iterable[ClientId]) -> None:
        """Take back the last exchange of some clients: nobody had their replies."""
        self._clients.discard(clients)

    def discard_round(self) -> None:
        """Take back the whole round: it is void."""
        self._clients.discard_round()

    def commit(self) -> None:
        """The round is complete: what the clients of it keep becomes their state."""
        self._clients.commit()

    def flush(self) -> None:
        """Put into the store what only workers know."""
        self._clients.flush()

    def evaluate(self, round_: int, down: Down) -> dict[ClientId, Score]:
        """Find out what is not known yet, then test each client on its own test data."""
        self._find_testing(round_, down)
        return self._at(round_).evaluate(round_, down)

    def _find_out(self, cohort: Cohort, down: Down) -> None:
        kinds: dict[str, list[ClientId]] = {}
        for info in cohort:
            if info.id in down:
                kinds.setdefault(kind_of_client(info), []).append(info.id)
        new = {kind: clients for kind, clients in kinds.items() if kind not in self.choice.seconds}
        if not new:
            return
        with self.driver.costs.aside():
            timed = {kind: self._time(clients, cohort, down) for kind, clients in new.items()}
        # Who trains nothing in this round, as in a method's warm-up, is asked again in the next.
        found = {kind: trial.alone / self.federation.data.train_size(new[kind][0]) for kind, trial in timed.items()}
        self.choice.seconds |= {kind: seconds for kind, seconds in found.items() if seconds > 0}
        if self.choice.workers is None and kinds.keys() <= self.choice.seconds.keys():
            each = {client: timed[kind] for kind, clients in kinds.items() if kind in timed for client in clients}
            self.choice.workers, self.choice.since = self._decide(each, down), cohort.round
        for trial in timed.values():
            trial.choose(workers=(self.choice.workers or 1) > 1)
        if self.choice.seconds.keys() & new.keys():
            self.found(self.choice)

    def _time(self, clients: list[ClientId], cohort: Cohort, down: Down) -> Calibration:
        """A dry round of the first of some clients of one kind."""
        client = clients[0]
        algorithm, local = self.federation.algorithm, self.local.federation.local(client, cohort.round)
        trial = Calibration(self.choice, self.driver.placement, len(clients), self.driver.most)
        trial.client(algorithm.client_round(self.private(client), down[client], local))
        return trial

    def _find_testing(self, round_: int, down: Down) -> None:
        kinds = {kind_of_testing(self.federation.info(client)): client for client in list(down)[::-1]}
        new = {kind: client for kind, client in kinds.items() if kind not in self.choice.by_kind}
        if not new:
            return
        with self.driver.costs.aside():
            for client in new.values():
                self._time_testing(client, round_, down)
        self.found(self.choice)

    def _time_testing(self, client: ClientId, round_: int, down: Down) -> None:
        algorithm, local = self.federation.algorithm, self.local.federation.local(client, round_)
        private, data = self.private(client), self.local.federation.data.test(client)
        scorer = self.local.scorer

        def predict(placement: Placement) -> Callable[[], Any]:
            steps = algorithm.predictor_parts(private, down[client], local)
            parts: Parts = drive(steps, lambda request: self.driver.perform(request, Work()))
            nets, x = bind(local.models, tree_to(parts, placement)), placement.batch(data, scorer.rows(data))[0]
            return lambda: scorer.predict(nets, x, placement)

        find_testing(self.choice, self.driver.placement, local.info, has_images(local.models), predict)

    def _decide(self, timed: dict[ClientId, Calibration], down: Down) -> int:
        """How many processes: several with one thread each, or one with all of them, whichever is faster."""
        alone = [found.alone for found in timed.values()]
        # What goes to several clients is sent once; what comes back is taken to be as long.
        once = {id(down[client]): down[client] for client in timed}.values()
        moved = (sum(map(_bytes, once)) + sum(_bytes(down[client]) for client in timed)) / PIPE + CALL * len(timed)
        apart = max(sum(alone) / self.most, max(alone, default=0.0)) + moved
        pays = self.most > 1 and len(timed) > 1 and apart < MARGIN * sum(found.together for found in timed.values())
        return self.most if pays else 1


def _bytes(message: Message | None) -> int:
    return measure(message).total
