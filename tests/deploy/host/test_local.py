"""The engine's log, and its own count of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyfed.deploy.host.local import Following, engine_bytes


def test_flowers_own_count_is_found_by_the_number_of_the_run() -> None:
    traffic = '{"inbound-bytes": 3, "outbound-bytes": 4, "total-bytes": 7}'
    listing = f'{{"runs": [{{"run-id": "12", "network-traffic": {traffic}}}]}}'
    assert engine_bytes(listing, "12") == {"inbound": 3, "outbound": 4, "total": 7}
    assert engine_bytes(listing, "13") == {}


@pytest.mark.parametrize("again", [[], ["yy"], ["yyyyyyyyyyyyyyyyyyyy", "zzzzzzzzzzzzzzzzzzzzzzz"]])
def test_a_log_that_a_resumed_server_cut_is_read_from_the_start_of_a_line(tmp_path: Path, again: list[str]) -> None:
    """Catches half a line that is read as a whole one, after which `polyfed deploy resume` dies of its own log."""
    log = tmp_path / "rounds.jsonl"
    log.write_text("".join(f'{{"round": {k}}}\n' for k in range(4)))
    seen: list[Any] = []
    following = Following(tmp_path, lambda kind, row: seen.append((kind, row)))
    log.write_text('{"round": 0}\n' + "".join(f'{{"{name}": 1}}\n' for name in again))
    assert not following.look()
    with open(log, "a") as file:
        file.write('{"round": 2')
    assert not following.look()
    with open(log, "a") as file:
        file.write("}\n")
    assert not following.look()
    assert seen[-1] == ("row", {"round": 2})
    assert all(kind == "row" and len(row) == 1 for kind, row in seen)
