"""Replies from their arrival to their totals: the same bits in every order, and nothing in memory that can wait."""

import gc
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyfed.base.rng import Rng
from polyfed.blocks.aggregate import CoverageMean, Mean, MeanByName
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Declared, Gathered, each
from polyfed.core.message import Message
from polyfed.rounds.gathering import Gathering
from polyfed.testing.compare import digest, leaves


class Up(Message):
    n: int
    model: dict[str, Tensor]
    delta: dict[str, Tensor]


def mask(client: ClientInfo) -> dict[str, Tensor]:
    return {"w": torch.rand(5, 4, generator=Rng(("mask", client.id)).torch()) < 0.6}


def up(client: int) -> Up:
    """Numbers of very different sizes, whose sum shows in which order it was taken, in double precision, too."""
    draw = Rng(("upload", client)).torch()
    whole = torch.randn(5, 4, generator=draw, dtype=torch.float64) * 10.0 ** torch.randint(
        -9, 9, (5, 4), generator=draw
    )
    return Up(client + 1, {"w": whole}, {"w": whole[mask(ClientInfo(client))["w"]]})


GATHER: dict[str, Declared] = {
    "model": (
        Mean("n"),
        MeanByName("n"),
        CoverageMean(None, "n", {"w": torch.zeros(7, 4, dtype=torch.float64)}),
        each,
    ),
    "delta": CoverageMean(mask),
    "n": each,
}


def put(gathering: Gathering, client: int) -> None:
    gathering.put(ClientInfo(client), up(client))


def come(order: Iterable[int], *, known: bool, folder: Path | None = None, gather: Any = None) -> Gathered:
    """Replies in this order, and what they add up to."""
    order = list(order)
    counted = order if known else None
    with Gathering(GATHER if gather is None else gather, (Up,), folder, counted) as gathering:
        for client in order:
            put(gathering, client)
        return gathering.settle(order, {})


def same(a: Gathered, b: Gathered) -> bool:
    """Bitwise."""
    assert a.fields.keys() == b.fields.keys()
    left, right = ([*leaves(tuple(got.fields.values()))] for got in (a, b))
    assert len(left) == len(right) >= 8
    for (path, one), (other_path, two) in zip(left, right, strict=True):
        assert path == other_path
        if not (torch.equal(one, two) if isinstance(one, Tensor) else one == two):
            return False
    return a.clients == b.clients


ORDERS = st.lists(st.integers(0, 40), min_size=2, max_size=8, unique=True)


@settings(max_examples=25, deadline=None)
@given(ORDERS, st.booleans())
def test_the_order_of_arrival_changes_no_bit(order: list[int], known: bool) -> None:
    """Catches totals in order of arrival, and an upload that waiting changes."""
    assert same(come(order, known=known), come(sorted(order), known=True))


def test_a_sum_in_another_order_would_show() -> None:
    """Catches a comparison that would pass whatever the order."""
    values = [up(client).model["w"] for client in range(6)]
    assert not torch.equal(sum(values[1:], values[0]), sum(values[-2::-1], values[-1]))
    assert not same(come(range(6), known=True), come(range(1, 7), known=True))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 3, 1, 4)])
def test_who_does_not_count_changes_nothing(order: tuple[int, ...]) -> None:
    """Catches a reply that is folded although its client was too late, or failed later."""
    with Gathering(GATHER, (Up,)) as gathering:
        for client in order:
            put(gathering, client)
        got = gathering.settle([3, 0, 4], {1: "too late", 2: "it failed"})
    assert same(got, come([0, 3, 4], known=True))
    assert got.failed == {1: "too late", 2: "it failed"}
    assert [client.id for client in got.clients] == [0, 3, 4]


def test_a_reply_is_folded_as_soon_as_it_is_its_turn(tmp_path: Path) -> None:
    """Catches replies that are all kept until the end, although it is known who counts."""
    folded: list[int] = []

    class Seen(Mean):
        def add(self, total: Any, client: ClientInfo, value: Any, upload: Message) -> Any:
            folded.append(client.id)
            return super().add(total, client, value, upload)

    with Gathering({"model": Seen()}, (Up,), tmp_path, [1, 3, 5]) as gathering:
        for client, expected in ((3, []), (1, [1, 3]), (5, [1, 3, 5])):
            put(gathering, client)
            assert folded == expected
        gathering.settle([1, 3, 5], {})
    assert folded == [1, 3, 5]


def test_while_it_is_open_who_counts_nothing_is_folded() -> None:
    """Catches a total that has a reply in it which does not count in the end."""
    with Gathering({"n": each}, (Up,)) as gathering:
        put(gathering, 0)
        assert gathering.settle([], {0: "it failed"}).fields == {"n": {}}


def test_a_reply_that_counts_has_come() -> None:
    """Catches a mean over fewer clients than are said to count."""
    with Gathering(GATHER, (Up,)) as gathering:
        put(gathering, 0)
        with pytest.raises(AssertionError, match="client 1 counts, but its reply did not come"):
            gathering.settle([0, 1], {})


def test_clients_that_send_nothing_count() -> None:
    """Catches a reply without an upload that is encoded, or lost; in any order."""
    with Gathering({}, (Up,)) as gathering:
        for client in (2, 0):
            gathering.put(ClientInfo(client), None)
        got = gathering.settle([0, 2], {})
    assert [client.id for client in got.clients] == [0, 2]


# ------------------------------------------------------------------------------------------------------------ on disk


def opened(folder: Path) -> list[str]:
    """What this process has open below a folder, with or without a name."""
    links = (link for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    targets = []
    for link in links:
        try:
            targets.append(str(link.readlink()))
        except FileNotFoundError:  # of the listing itself
            continue
    return [target for target in targets if target.startswith(str(folder))]


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@LINUX
@pytest.mark.parametrize("fails", [False, True])
def test_what_waits_is_in_a_file_without_a_name_that_is_gone_afterwards(tmp_path: Path, fails: bool) -> None:
    """Catches files that a kill, an error or a void round leaves behind."""
    folder = tmp_path / "scratch"
    try:
        with Gathering(GATHER, (Up,), folder) as gathering:
            put(gathering, 1)
            put(gathering, 0)
            assert [*folder.iterdir()] == []
            assert len(opened(folder)) == 1
            if fails:
                raise KeyboardInterrupt
            gathering.settle([0, 1], {})
    except KeyboardInterrupt:
        assert fails
    assert [*folder.iterdir()] == []
    assert opened(folder) == []


def test_a_reply_that_waits_is_not_in_memory(tmp_path: Path) -> None:
    """Catches uploads that wait as tensors."""
    with Gathering(GATHER, (Up,), tmp_path) as gathering:
        upload = up(3)
        alive = weakref.ref(upload.model["w"])
        gathering.put(ClientInfo(3), upload)
        del upload
        gc.collect()
        assert alive() is None


@pytest.mark.parametrize(
    ("order", "gather", "spools"),
    [
        ((0, 1, 2), None, False),  # each at its turn
        ((1, 0, 2), None, True),
        ((2, 1, 0), {}, False),  # nothing is declared, so nothing is needed
    ],
)
def test_only_what_has_to_wait_is_written(tmp_path: Path, order: Any, gather: Any, spools: bool) -> None:
    """Catches a disk that is written to for uploads which nobody adds up, or whose turn it is."""
    folder = tmp_path / "scratch"
    come(order, known=True, folder=folder, gather=gather)
    assert folder.exists() == spools
    come(order, known=False, folder=folder, gather=gather)
    assert folder.exists() == (gather is None)


def test_uploads_are_not_written_to() -> None:
    """Catches a sum that works in what the client still has: in order, and out of it."""
    for order in ((0, 1, 2), (2, 0, 1)):
        uploads = {client: up(client) for client in order}
        with Gathering(GATHER, (Up,), None, order) as gathering:
            for client in order:
                gathering.put(ClientInfo(client), uploads[client])
            gathering.settle(order, {})
        assert all(digest(uploads[client]) == digest(up(client)) for client in order)
