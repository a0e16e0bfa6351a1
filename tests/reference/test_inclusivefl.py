"""Rounds of InclusiveFL against plain torch: a whole server copy of each size, and the three steps as loops."""

from functools import partial
from typing import Any

import plain
import pytest
import torch
import toy
from layers_by_hand import TOWERS, Tower
from rounds_by_hand import TOLERANCE, TRAINING, batches, pairs

from polyfed.algorithms.inclusivefl import InclusiveFL

#: Clients 0 and 3 have the smallest network, of one block; clients 1 and 2 have two and three blocks.
SIZES, DEPTH = (11, 8, 7, 9), (1, 2, 3, 1)


def shared(depth: int, name: str) -> bool:
    """Whether a network of so many blocks shares a tensor with the others that have it."""
    return not name.startswith("fc.") and not (depth < 3 and name.startswith(f"tower.{depth - 1}."))


def server(copies: dict[int, plain.Weights], sent: dict[int, plain.Weights]) -> dict[int, plain.Weights]:
    """By depth the changes of steps 1 and 2, of those tensors that some client trained."""
    groups = {d: [k for k in sent if DEPTH[k] == d] for d in copies}
    seen = {d: sum(SIZES[k] for k in own) for d, own in groups.items()}
    means = {d: plain.mean([sent[k] for k in own], [SIZES[k] for k in own]) for d, own in groups.items() if own}
    out: dict[int, plain.Weights] = {}
    for d, copy in copies.items():
        out[d] = {}
        for name, value in copy.items():
            sizes = [e for e in means if name in copies[e] and (e == d or (shared(d, name) and shared(e, name)))]
            if sizes:
                total = sum(seen[e] * means[e][name].double() for e in sizes) / sum(seen[e] for e in sizes)
                rounded = total if value.is_floating_point() else total.round()
                out[d][name] = rounded.to(value.dtype) - value
    return out


def distilled(
    depth: int, change: plain.Weights, before: dict[int, plain.Weights], weights: list[str], beta: float
) -> plain.Weights:
    """Step 3 for a size that trained: the last block learns from the last changes of the next size's."""
    out = dict(change)
    for name in weights:
        if depth == 3 or not name.startswith(f"tower.{depth - 1}."):
            continue
        tail = name.split(".", 2)[2]
        next_size = before.get(depth + 1, {})
        donors = [next_size.get(f"tower.{b}.{tail}") for b in (depth - 1, depth)]
        known = [d for d in donors if d is not None and d.shape == change[name].shape]
        if known:
            out[name] = (1 - beta) * change[name] + beta * sum(known) / len(known)
    return out


@pytest.mark.parametrize(
    ("training", "driver", "clients"),
    [("sgd", "batched", 4), ("momentum, decay, clip", "sequential", 4), ("sgd", "sequential", 2)],
)
def test_inclusivefl(training: str, driver: str, clients: int) -> None:
    """Catches means of other sizes, wrong weights, shared last blocks, donors of another block, size or round."""
    table, settings = TRAINING[training]
    fed = toy.federation(
        InclusiveFL(beta=0.3), models=[TOWERS[d - 1] for d in DEPTH], sizes=SIZES, train=table,
        clients={"participation": clients / 4},
    )  # fmt: skip
    game = toy.play(fed, precision="fp64", driver=driver)
    make = {d: partial(Tower, d) for d in (1, 2, 3)}
    copies = {d: toy.copy(fed.algorithm.message_for(game.server, fed.info(d - 1)).model) for d in make}
    before: dict[int, plain.Weights] = {}
    absent = 0
    for t in range(1, 6 if clients < 4 else 4):
        game.round()
        cohort = [client.id for client in game.played[-1].cohort]
        absent += len({DEPTH[k] for k in cohort}) < 3
        sent = {}
        for k in cohort:
            with game.driver.placement.defaults():
                found = pairs(batches(game, k, t))
            sent[k] = plain.local_sgd(make[DEPTH[k]], copies[DEPTH[k]], found, settings)
        changes = server(copies, sent)
        for d, own in changes.items():
            weights = [name for name, _ in make[d]().named_parameters()]
            here = d in {DEPTH[k] for k in cohort}
            moved = distilled(d, own, before, weights, 0.3) if here else own
            copies[d] = {name: value + moved.get(name, torch.zeros_like(value)) for name, value in copies[d].items()}
        before = changes
        for d, copy in copies.items():
            got = fed.algorithm.message_for(game.server, fed.info(d - 1)).model
            toy.close(got, copy, TOLERANCE["fp64"] * 100)
    assert bool(absent) is (clients < 4)


def test_the_reference_tells_a_distillation_from_none() -> None:
    """Catches a comparison that would hold whatever beta: the same federation ends elsewhere without it."""

    def play(beta: float) -> Any:
        return toy.play(toy.federation(InclusiveFL(beta=beta), models=TOWERS, sizes=(9, 8, 7)), 2).server.model

    one, other = play(0.3), play(0.0)
    # BatchNorm takes off what the bias before it adds: the bias's gradient is rounding, and may be none at all.
    last = [f"{TOWERS[0]}: tower.0.{end}" for end in ("0.weight", "1.weight", "1.bias")]
    assert not any(torch.equal(one[n], other[n]) for n in last)
    assert torch.equal(one["tower.2.0.weight"], other["tower.2.0.weight"])
