"""How the clients of a run are executed."""

from __future__ import annotations

import pytest
import running

from polyfed.parallel.setup import execution_choice
from polyfed.rounds.federation import prepare


@pytest.mark.parametrize(
    ("models", "capacities", "wanted", "stacked"),
    [
        ((8, 9), [1.0, 0.5], 4, True),  # two kinds, two clients of each: every (8) has capacity 1, every (9) 0.5
        ((8, 9), [1.0, 0.5, 0.25], 4, False),  # six kinds
        ((8, 9), [1.0, 0.5, 0.25], 12, True),
        ((8, 8), [1.0, 0.5], 4, True),
        ((8,), [1.0], 2, True),
        ((8,), [1.0], 1, False),
        ((8, 9, 8), [1.0], 3, False),  # (8) twice and (9) once
    ],
)
def test_clients_of_a_kind_are_counted_as_they_are_dealt(
    models: tuple[int, ...], capacities: list[float], wanted: int, stacked: bool
) -> None:
    """Catches networks and capacities that are taken to be dealt apart from each other."""
    names = [f"mlp(hidden=({width},))" for width in models]
    clients = {"count": 24, "participation": wanted / 24, "models": names, "capacities": capacities}
    federation = prepare(running.config(clients=clients, algorithm={"name": "standalone"}))
    choice = execution_choice(federation)
    found = {choice.of(federation.info(client)).execution == "stacked" for client in range(24)}
    assert found == ({True, False} if len(models) == 3 else {stacked})
