"""Totals of an exchange: in order of client id, by field, and without keeping what they were given."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from polyfed.blocks.aggregate import CoverageMean, Mean, MeanByName
from polyfed.core.clients import ClientInfo
from polyfed.core.gather import Declared, Each, Fold, Gather, each
from polyfed.core.message import Message


class Up(Message):
    n: int
    model: dict[str, Tensor]


def up(k: int) -> Up:
    return Up(k, {"w": torch.full((2, 3), float(k))})


def folded(gather: dict[str, Declared], *clients: int) -> Any:
    fold = Fold(gather)
    for client in clients:
        fold.add(ClientInfo(client), up(client))
    return fold.finish({})


class Trail(Gather):
    """What happened, in order."""

    def init(self) -> list[Any]:
        return ["init"]

    def add(self, total: list[Any], client: ClientInfo, value: Any, upload: Message) -> list[Any]:
        return [*total, (client.id, value, upload.n)]  # type: ignore[attr-defined]

    def finish(self, total: list[Any]) -> list[Any]:
        return [*total, "finish"]


def test_a_sum_sees_each_reply_once_and_in_order() -> None:
    """Catches a reply that is added twice or not at all, and a value of another field or client."""
    got = folded({"n": Trail()}, 1, 2, 5)
    assert got["n"] == ["init", (1, 1, 1), (2, 2, 2), (5, 5, 5), "finish"]
    assert folded({"n": Trail()})["n"] == ["init", "finish"]


def test_each_keeps_a_field_by_client() -> None:
    """Catches values that are taken out of order, and clients that are confused."""
    got = folded({"n": each}, 1, 2, 5)
    assert list(got["n"].items()) == [(1, 1), (2, 2), (5, 5)]
    assert (len(got), got.clients[2].id, got.failed) == (3, 5, {})


def test_who_failed_is_passed_on() -> None:
    """Catches reasons that are lost."""
    fold = Fold({})
    fold.add(ClientInfo(3), None)
    got = fold.finish({7: "too late"})
    assert (got.failed, len(got), [client.id for client in got.clients]) == ({7: "too late"}, 1, [3])


@pytest.mark.parametrize("clients", [(2, 1), (1, 1), (1, 3, 2)])
def test_replies_out_of_order_are_refused(clients: tuple[int, ...]) -> None:
    """Catches totals that depend on who was fast, and a reply that counts twice."""
    with pytest.raises(AssertionError, match="in order of client id"):
        folded({"n": each}, *clients)


@pytest.mark.parametrize("upload", [up(1), None])
def test_a_field_that_the_upload_lacks_is_named(upload: Any) -> None:
    """Catches a misspelt field that adds nothing up, in silence, and an algorithm that sends nothing."""
    with pytest.raises(TypeError, match=rf"'modle', which {type(upload).__name__} does not have; name fields"):
        Fold({"modle": each}).add(ClientInfo(0), upload)


def test_fields_that_are_not_named_are_dropped() -> None:
    """Catches a round that keeps what nobody asked for."""
    assert folded({"n": each}, 1, 2).fields == {"n": {1: 1, 2: 2}}
    fold, upload = Fold({"n": each}), up(1)
    alive = weakref.ref(upload.model["w"])
    fold.add(ClientInfo(1), upload)
    del upload
    gc.collect()
    assert alive() is None


def test_one_field_may_have_several_totals() -> None:
    """Catches totals in another order, or that share one."""
    numbers, mean, names = folded({"model": (each, Mean("n"), Each(sorted))}, 1, 3)["model"]
    assert list(numbers) == [1, 3]
    assert mean["w"].tolist() == [[2.5] * 3] * 2
    assert names == {1: ["w"], 3: ["w"]}


def test_what_each_keeps_keeps_nothing_else_alive() -> None:
    """Catches a row that holds the stack of all clients, and a value that the next round writes into."""
    stack = torch.arange(20.0).reshape(5, 4)
    fold = Fold({"model": (each, Each(lambda model: model["w"][:2]))})
    fold.add(ClientInfo(0), Up(0, {"w": stack[1]}))
    stack.zero_()
    whole, part = fold.finish({})["model"]
    assert whole[0]["w"].tolist() == [4, 5, 6, 7]
    assert part[0].tolist() == [4, 5]
    assert whole[0]["w"].untyped_storage().nbytes() == 16
    assert part[0].untyped_storage().nbytes() == 8


FULL = {"w": torch.zeros(2, 3)}
SUMS: dict[str, Gather] = {
    "mean": Mean("n"),
    "by name": MeanByName("n"),
    "nested": CoverageMean(None, "n", FULL),
    "coverage": CoverageMean(lambda client: {"w": torch.ones(2, 3, dtype=torch.bool)}),
    "part": Each(lambda model: float(model["w"].sum())),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_keeps_no_upload(name: str) -> None:
    """Catches a total that is, or refers to, what it was given: a round would hold the cohort."""
    fold = Fold({"model": SUMS[name]})
    for client in range(3):
        upload = up(client)
        alive = weakref.ref(upload.model["w"])
        fold.add(ClientInfo(client), upload)
        del upload
        gc.collect()
        assert alive() is None, client


@pytest.mark.parametrize("name", SUMS)
def test_a_declaration_serves_again(name: str) -> None:
    """Catches a declaration that remembers the replies of a round that was void."""
    folded({"model": SUMS[name]}, 4, 7)
    again, fresh = (folded({"model": SUMS[name]}, 1, 3)["model"] for _ in range(2))
    assert str(again) == str(fresh)
    assert torch.count_nonzero(FULL["w"]) == 0
