"""``driver = "auto"``: find out the fastest way of each kind of client, once, and then go that way.

At the first round, and whenever a kind of client appears that was not there before, one client of the kind plays a dry
round under the clock (`polyfed.execute.ways.Calibration`). The findings are written beside the run, so a resumed run
does not ask the clock again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from polyfed.compute import drive
from polyfed.config.loading import cores
from polyfed.execute.drivers import Auto, Work
from polyfed.execute.fitting import bind, tree_to
from polyfed.execute.ways import MARGIN, Calibration, Ways, kind_of_client
from polyfed.parties import Cohort, Replies
from polyfed.runtime.clients import Down, LocalClients, Report, measure
from polyfed.runtime.scoring import Score
from polyfed.runtime.workers import WorkerClients
from polyfed.typing import ClientId, Parts

#: Bytes per second and seconds per message between processes, measured low: codec, pipe, and codec again.
PIPE, CALL = 5e8, 1e-3


class AutoClients:
    """Clients of this process or of several, whichever was found to be faster.

    Args:
        local: them, here.
        driver: of this process.
        ways: what is known of earlier; added to.
        start: starts that many workers, and deals the clients to them.
        most: the most workers to consider.
        found: told of every addition to ``ways``, before anything is done by it.
    """

    def __init__(
        self,
        local: LocalClients,
        driver: Auto,
        ways: Ways,
        *,
        start: Callable[[int], WorkerClients],
        most: int,
        found: Callable[[Ways], None],
    ) -> None:
        self.local, self.driver, self.ways = local, driver, ways
        self.federation = local.federation
        self.start, self.most, self.found = start, most, found
        self._workers: WorkerClients | None = None
        if ways.workers is not None and ways.workers > 1:
            self._workers = start(ways.workers)

    @property
    def _clients(self) -> LocalClients | WorkerClients:
        return self._workers or self.local

    def exchange(self, cohort: Cohort, down: Down, *, score: bool = False) -> tuple[Replies, dict[ClientId, Report]]:
        """Find out what is not known yet, then run the client's side of the round for each message."""
        self._find_out(cohort, down)
        return self._clients.exchange(cohort, down, score=score)

    def private(self, client: ClientId) -> Any:
        """A client's state, made (and not kept) if it has none."""
        return self._clients.private(client)

    def undo(self, clients: Iterable[ClientId]) -> None:
        """Take back the last exchange of some clients: nobody had their replies."""
        self._clients.undo(clients)

    def forget(self) -> None:
        """Take back the whole round: it is void."""
        self._clients.forget()

    def commit(self) -> None:
        """The round is complete: what the clients of it keep becomes their state."""
        self._clients.commit()

    def settle(self) -> None:
        """Put into the store what only workers know."""
        self._clients.settle()

    def evaluate(self, round_: int, down: Down) -> dict[ClientId, Score]:
        """Test each client on its own test data."""
        return self._clients.evaluate(round_, down)

    def _find_out(self, cohort: Cohort, down: Down) -> None:
        kinds: dict[str, list[ClientId]] = {}
        for info in cohort:
            if info.id in down:
                kinds.setdefault(kind_of_client(info), []).append(info.id)
        new = {kind: clients for kind, clients in kinds.items() if kind not in self.ways.seconds}
        if not new:
            return
        with self.driver.costs.aside():
            timed = {kind: self._time(kind, clients, cohort, down) for kind, clients in new.items()}
        if self.ways.workers is None:
            self.ways.workers = self._decide(
                {client: timed[kind] for kind, clients in kinds.items() for client in clients}, down
            )
        self.ways.threads = 1 if self.ways.workers > 1 else cores()
        self.found(self.ways)
        if self._workers is None and self.ways.workers > 1:
            self._workers = self.start(self.ways.workers)

    def _time(self, kind: str, clients: list[ClientId], cohort: Cohort, down: Down) -> Calibration:
        """One dry round of one client of the kind, and one forward pass on its test data."""
        client = clients[0]
        algorithm, local = self.local.federation.algorithm, self.local.federation.local(client, cohort.round)
        private = self.local.private(client)
        trial = Calibration(self.ways, self.driver.place, len(clients))
        trial.client(algorithm.client_round(private, down[client], local))
        self.ways.seconds[kind] = trial.alone / len(local.train)
        data = self.local.federation.data.test(client)

        def predict(place: Any) -> Callable[[], Any]:
            made: Parts = drive(algorithm.parts(private, down[client], local), lambda r: self.driver.perform(r, Work()))
            parts = tree_to(made, place)
            x: Tensor = place.batch(data, self.local.scorer.rows(data))[0]
            return lambda: self.local.scorer.predict(bind(local.models, parts), x, place)

        trial.testing(local.info, local.models, predict)
        return trial

    def _decide(self, timed: dict[ClientId, Calibration], down: Down) -> int:
        """How many processes: several with one thread each, or one with all of them, whichever is faster."""
        alone = [found.alone for found in timed.values()]
        moved = sum(2 * measure(down[client]).total / PIPE + CALL for client in timed)
        apart = max(sum(alone) / self.most, max(alone, default=0.0)) + moved
        pays = self.most > 1 and len(timed) > 1 and apart < MARGIN * sum(found.together for found in timed.values())
        return self.most if pays else 1
