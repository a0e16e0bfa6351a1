"""Fair whole numbers, and stratified picks of rows.

Used by all kinds of partition; everything is done with sorting instead of loops over clients, so that a
hundred thousand clients cost seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyfed.base.rng import Rng

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def apportion(group: Ints, want: Floats, totals: Ints, rng: np.random.Generator) -> Ints:
    """Whole numbers near ``want`` that sum to ``totals`` in each group (largest remainder, ties at random).

    Args:
        group: ``(m,)`` group of each share, from 0.
        want: ``(m,)`` shares as real numbers; in each group they sum to about its total.
        totals: ``(groups,)`` the sum that each group must have.
        rng: breaks ties.
    """
    out = np.floor(want + 1e-9).astype(np.int64)
    lacking = totals - np.bincount(group, weights=out, minlength=len(totals)).astype(np.int64)
    order = np.lexsort((rng.random(len(want)), out - want, group))
    ordered = group[order]
    out[order] += _place(ordered) < lacking[ordered]
    return out


def _place(group: Ints) -> Ints:
    """Return the index of each element in its group, from 0; ``group`` ascends."""
    return np.arange(len(group)) - np.searchsorted(group, group)


@dataclass(frozen=True, eq=False)
class Cells:
    """Rows sorted by owner and class, in random order within each (owner, class) cell.

    Args:
        order: ``(n,)`` positions of the rows, sorted.
        owner: ``(cells,)`` client of each cell.
        klass: ``(cells,)`` class of each cell; one more where there are rows without a label.
        size: ``(cells,)`` number of rows of each cell, at least 1.
    """

    order: Ints
    owner: Ints
    klass: Ints
    size: Ints

    @classmethod
    def of(cls, owner: Ints, y: Ints, rng: Rng, first: int = 0) -> Cells:
        """The cells of rows with these owners and classes.

        The order within the cells of a client depends on the client's number and on its own rows alone.

        Args:
            owner: ``(n,)`` owner of each row, from 0.
            y: ``(n,)`` classes; -1, of rows without a label, is one more.
            rng: source of the order.
            first: number of the client that owner 0 stands for.
        """
        y = y - y.min(initial=0)
        by_owner = np.argsort(owner, kind="stable")
        tie = np.empty(len(y))
        tie[by_owner] = rng.at("rows").uniform(_keys(owner[by_owner], first))
        cell = owner * (y.max(initial=0) + 1) + y
        order = np.lexsort((tie, cell))  # two keys sort faster than three
        places = np.flatnonzero(np.diff(cell[order], prepend=-1))
        return cls(order, owner[order][places], y[order][places], np.diff(np.append(places, len(y))))

    def quota(self, share: Floats, rng: Rng, first: int = 0) -> Ints:
        """Return ``(cells,)`` numbers of rows of each cell that together are ``share`` of its owner's rows.

        The number of a cell, and of a client, is rounded up or down at random, so that its mean is exactly its
        share: systematic sampling (Madow 1949), with the client's classes in random order. The draws of a client
        depend on its number and on its own rows alone.

        Args:
            share: ``(clients,)`` from 0 to 1.
            rng: source of the draws.
            first: number of the client that owner 0 stands for.
        """
        order = np.lexsort((rng.at("classes").uniform(_keys(self.owner, first)), self.owner))
        owner, size = self.owner[order], self.size[order]
        ends = np.cumsum(size)
        ends = ends - (ends - size)[np.searchsorted(owner, owner)]  # within the owner
        # Away from 0 and 1, so that a rounding error in a product that is a whole number does not change its floor.
        start = np.clip(rng.at("start").uniform(first + owner), 1e-9, 1 - 1e-9)
        upper, lower = (np.floor(rows * share[owner] + start) for rows in (ends, ends - size))
        out = np.empty(len(order), dtype=np.int64)
        out[order] = (upper - lower).astype(np.int64)
        return out

    def pick(self, quota: Ints) -> Bools:
        """``(n,)`` true for the first ``quota`` rows of each cell, at random because cells are shuffled."""
        picked = np.zeros(len(self.order), dtype=np.bool_)
        picked[self.order] = np.arange(len(self.order)) < np.repeat(np.cumsum(self.size) - self.size + quota, self.size)
        return picked


def _keys(owner: Ints, first: int) -> Ints:
    """Return a number per element, made of its owner's number and its index among the owner's; ``owner`` ascends."""
    return (first + owner) * 2**32 + _place(owner)


def cap_rows(owner: Ints, y: Ints, clients: int, cap: int | Ints, rng: Rng, *, first: int = 0) -> Bools:
    """``(n,)`` true for the rows kept: at most ``cap`` per client, in the mean in the client's own proportions.

    Args:
        owner: ``(n,)`` owner of each row, from 0.
        y: ``(n,)`` classes.
        clients: number of clients.
        cap: the most rows of a client; ``(clients,)`` where it differs.
        rng: source of the draws.
        first: number of the client that owner 0 stands for; its draws depend on it and on the client's rows alone.
    """
    cells = Cells.of(owner, y, rng, first)
    total = np.bincount(owner, minlength=clients)
    return cells.pick(cells.quota(np.minimum(total, cap) / np.maximum(total, 1), rng, first))


def size_of_test(total: Ints, fraction: float) -> Ints:
    """Return about how many of a client's rows are for testing: the rounded fraction, at least 1."""
    return np.maximum(1, np.floor(fraction * total + 0.5)).astype(np.int64)


def pick_test(
    owner: Ints, y: Ints, clients: int, fraction: float, rng: Rng, *, least: int = 1, first: int = 0
) -> Bools:
    """``(n,)`` true for test rows: ``fraction`` of each client's rows of each class, in the mean over ``rng``.

    A client's rows, and its rows of a class, are rounded up or down at random. Each client gives at least one row to
    testing, and rounding up leaves it ``least`` rows for training where rounding down does. A class of which a
    client has several rows keeps one for training, which lowers the mean of classes with ``n (1 - fraction) < 1``.
    Rows without a label do not count: the draws are those of the labelled rows alone.

    Args:
        owner: ``(n,)`` owner of each row, from 0.
        y: ``(n,)`` classes; -1 for a row without a label.
        clients: number of clients.
        fraction: fraction of the rows that are for testing, above 0 and below 1.
        rng: source of the draws.
        least: training rows of a client.
        first: number of the client that owner 0 stands for; its draws depend on it and on the client's rows alone.
    """
    known = y >= 0
    if not known.all():
        picked = np.zeros(len(y), dtype=np.bool_)
        picked[known] = pick_test(owner[known], y[known], clients, fraction, rng, least=least, first=first)
        return picked
    cells = Cells.of(owner, y, rng, first)
    total = np.maximum(np.bincount(owner, minlength=clients), 1)
    most = np.maximum(np.floor(fraction * total + 1e-9), total - least)
    share = np.maximum(1, np.minimum(fraction * total, most)) / total
    quota = cells.quota(share, rng, first)
    return cells.pick(np.where(cells.size > 1, np.minimum(quota, cells.size - 1), quota))


def pick_units(
    owner: Ints,
    y: Ints,
    clients: int,
    fraction: float,
    rng: Rng,
    *,
    units: Ints,
    first: int = 0,
) -> Bools:
    """``(n,)`` true for rows of test units, ``fraction`` of each client's units, in the mean over ``rng``.

    A unit counts for the class that most of its rows have, so the classes of the test units are in proportion too. If
    rows of a unit belong to several clients, the units are drawn for all clients together, so that a unit that one
    client tests on is in no client's training rows. A unit without a labelled row does not count; rows without a label
    of a test unit are picked, too, and are for the caller to leave out.

    Args:
        owner: as for `pick_test`.
        y: as for `pick_test`.
        clients: as for `pick_test`.
        fraction: as for `pick_test`.
        rng: as for `pick_test`.
        units: ``(n,)`` number of the unit that each row belongs to.
        first: as for `pick_test`.
    """
    _, unit = np.unique(units, return_inverse=True)
    count = int(unit.max(initial=-1)) + 1
    holder = np.zeros(count, dtype=np.int64)
    holder[unit] = owner
    if (holder[unit] != owner).any():  # rows of a unit are with several clients
        holder, clients, first = np.zeros_like(holder), 1, 0
    classes = int(y.max(initial=0)) + 1
    cells, sizes = np.unique((unit * classes + y)[y >= 0], return_counts=True)
    order = np.lexsort((sizes, cells // classes))
    most = np.full(count, -1, dtype=np.int64)
    most[cells[order] // classes] = cells[order] % classes  # the last, and so the largest, of each unit
    return pick_test(holder, most, clients, fraction, rng, first=first)[unit]


def pick_later(
    owner: Ints,
    y: Ints,
    clients: int,
    fraction: float,
    rng: Rng,
    *,
    times: Ints,
    least: int = 1,
    first: int = 0,
) -> Bools:
    """``(n,)`` true for rows of test time: the later ``fraction`` of each client's rows, rounded at random.

    Rows of one moment stay together: the boundary moves to the nearest one between two moments. A client whose rows are
    all of one moment gets no test row. Labelled rows alone count; rows without a label from the first test row's moment
    on are picked, too, and are for the caller to leave out.

    Args:
        owner: as for `pick_test`.
        y: as for `pick_test`; classes do not matter.
        clients: as for `pick_test`.
        fraction: as for `pick_test`.
        rng: as for `pick_test`.
        times: ``(n,)`` place of each row in time.
        least: as for `pick_test`.
        first: as for `pick_test`.
    """
    wanted = np.bincount(
        owner,
        weights=pick_test(owner, np.minimum(y, 0), clients, fraction, rng, least=least, first=first),
        minlength=clients,
    )
    order = np.lexsort((times, owner))
    ends = np.cumsum(np.bincount(owner, minlength=clients))
    picked = np.zeros(len(owner), dtype=np.bool_)
    for client in np.unique(owner):
        start = ends[client - 1] if client else 0
        mine = order[start : ends[client]]
        changes = np.flatnonzero(np.diff(times[mine])) + 1
        before = np.append(0, np.cumsum(y[mine] >= 0))  # labelled rows before each row, and all of them
        here = before[np.append(changes[1:], len(mine))] > before[changes]  # a test begins with a labelled moment
        changes = changes[here & (before[changes] > 0)]
        if len(changes):
            picked[mine[changes[np.argmin(np.abs(before[changes] - (before[-1] - wanted[client])))] :]] = True
    return picked


def deal(counts: Ints, y: Ints, rng: np.random.Generator) -> Ints:
    """Owner of each row when client k gets ``counts[k, c]`` random rows of class c; -1 for rows left over.

    Args:
        counts: ``(clients, classes)``; no class may be promised more often than it has rows.
        y: ``(n,)`` classes.
        rng: chooses the rows.
    """
    owner = np.full(len(y), -1, dtype=np.int64)
    order = np.lexsort((rng.random(len(y)), y))
    for c, start in enumerate(np.searchsorted(y[order], np.arange(counts.shape[1]))):
        owners = np.repeat(np.arange(len(counts)), counts[:, c])
        owner[order[start : start + len(owners)]] = owners
    return owner


def draw_test(counts: Ints, test: int, limits: Ints, rng: np.random.Generator) -> Ints:
    """How many of a client's ``counts`` rows of each class are for testing; in the mean the same share of each class.

    Args:
        counts: ``(classes,)`` the client's rows, at least one.
        test: number of rows for testing; the result has fewer where a class keeps its last row or reaches its limit.
        limits: ``(classes,)`` number of test rows that exist.
        rng: source of the draws.
    """
    start, order = rng.integers(counts.sum()), rng.permutation(len(counts))
    ends = np.concatenate([[0], np.cumsum(counts[order])])
    out = np.empty_like(counts)
    out[order] = np.diff((ends * test + start) // ends[-1])  # as `Cells.quota`
    return np.minimum(out, np.minimum(np.where(counts > 1, counts - 1, counts), limits))


def draw_counts(total: int, mix: Floats, limits: Ints, rng: np.random.Generator) -> Ints:
    """Return whole numbers that sum to ``total``, drawn by ``mix``, each at most its limit."""
    counts = np.zeros(len(limits), dtype=np.int64)
    while (lacking := total - counts.sum()) > 0:
        left = limits - counts
        chance = mix * (left > 0)
        if chance.sum() < 1e-12:  # none of the likely classes has rows left
            chance = left.astype(np.float64)
        counts += np.minimum(rng.multinomial(lacking, chance / chance.sum()), left)
    return counts


def draw_rows(rows: Ints, offsets: Ints, counts: Ints, rng: np.random.Generator) -> Ints:
    """``counts[c]`` different rows of each class c, ascending; read-only."""
    sizes = np.diff(offsets)
    if (4 * counts <= sizes).all():
        # Few rows are drawn twice: draw all at once, then redraw those. This is three times faster than by class.
        c = np.repeat(np.arange(len(counts)), counts)
        at = offsets[c] + (rng.random(len(c)) * sizes[c]).astype(np.int64)
        while (np.diff(np.sort(at)) == 0).any():
            twice = np.setdiff1d(np.arange(len(at)), np.unique(at, return_index=True)[1])
            at[twice] = offsets[c[twice]] + (rng.random(len(twice)) * sizes[c[twice]]).astype(np.int64)
    else:
        at = np.concatenate(
            [offsets[c] + rng.choice(sizes[c], counts[c], replace=False) for c in np.flatnonzero(counts)]
        )
    out = np.sort(rows[at])
    out.setflags(write=False)
    return out
