"""Fair whole numbers, and stratified picks of rows.

Used by all kinds of partition; everything is done with sorting instead of loops over clients, so that a
hundred thousand clients cost seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def apportion(group: Ints, want: Floats, totals: Ints, rng: np.random.Generator, *, cap: Ints | None = None) -> Ints:
    """Whole numbers near ``want`` that sum to ``totals`` in each group (largest remainder, ties at random).

    Args:
        group: ``(m,)`` group of each share, from 0.
        want: ``(m,)`` shares as real numbers; in each group they sum to about its total.
        totals: ``(groups,)`` what each group must sum to.
        rng: breaks ties.
        cap: ``(m,)`` the most that each share may be; a group whose caps are reached stays below its total.
    """
    out = np.floor(want + 1e-9).astype(np.int64)
    rest = want - out
    if cap is not None:
        out = np.minimum(out, cap)
        rest = np.where(out < cap, rest, -np.inf)
    lacking = totals - np.bincount(group, weights=out, minlength=len(totals)).astype(np.int64)
    order = np.lexsort((rng.random(len(want)), -rest, group))
    ordered = group[order]
    rank = np.arange(len(want)) - np.searchsorted(ordered, ordered)
    extra = (rank < lacking[ordered]) & (rest[order] > -np.inf)
    out[order] += extra
    return out


@dataclass(frozen=True, eq=False)
class Cells:
    """Rows sorted by owner and class, in random order within each (owner, class) cell.

    Args:
        order: ``(n,)`` positions of the rows, sorted.
        owner: ``(cells,)`` client of each cell.
        klass: ``(cells,)`` class of each cell.
        size: ``(cells,)`` number of rows of each cell, at least 1.
    """

    order: Ints
    owner: Ints
    klass: Ints
    size: Ints

    @classmethod
    def of(cls, owner: Ints, y: Ints, rng: np.random.Generator) -> Cells:
        """The cells of rows with these owners and classes."""
        order = np.lexsort((rng.random(len(y)), y, owner))
        first = np.ones(len(y), dtype=np.bool_)
        first[1:] = (np.diff(owner[order]) != 0) | (np.diff(y[order]) != 0)
        starts = np.flatnonzero(first)
        size = np.diff(np.append(starts, len(y)))
        return cls(order, owner[order][starts], y[order][starts], size)

    def pick(self, quota: Ints) -> Bools:
        """``(n,)`` true for the first ``quota`` rows of each cell, at random because cells are shuffled."""
        rank = np.arange(len(self.order)) - np.repeat(np.cumsum(self.size) - self.size, self.size)
        picked = np.zeros(len(self.order), dtype=np.bool_)
        picked[self.order] = rank < np.repeat(quota, self.size)
        return picked


def cap_rows(owner: Ints, y: Ints, clients: int, cap: int, rng: np.random.Generator) -> Bools:
    """``(n,)`` true for the rows kept: at most ``cap`` per client, in the client's own class proportions."""
    cells = Cells.of(owner, y, rng)
    total = np.bincount(owner, minlength=clients)
    keep = np.minimum(total, cap)
    want = np.asarray(cells.size * (keep / np.maximum(total, 1))[cells.owner], dtype=np.float64)
    return cells.pick(apportion(cells.owner, want, keep, rng, cap=cells.size))


def size_of_test(total: Ints, fraction: float) -> Ints:
    """How many of a client's rows are for testing: the rounded fraction, at least one."""
    return np.maximum(1, np.floor(fraction * total + 0.5)).astype(np.int64)


def pick_test(owner: Ints, y: Ints, clients: int, fraction: float, rng: np.random.Generator) -> Bools:
    """``(n,)`` true for test rows: about ``fraction`` of each client's rows of each class.

    A class of which a client has several rows keeps at least one for training, and a single row is for
    training; only a client all of whose rows are single gives one of them to testing.
    """
    cells = Cells.of(owner, y, rng)
    total = size_of_test(np.bincount(owner, minlength=clients), fraction)
    want = cells.size.astype(np.float64) * fraction
    quota = apportion(cells.owner, want, total, rng, cap=cells.size - 1)
    got = np.bincount(cells.owner, weights=quota, minlength=clients)
    _, first_cell = np.unique(cells.owner, return_index=True)
    quota[first_cell] += got[cells.owner[first_cell]] == 0
    return cells.pick(quota)


def deal(counts: Ints, y: Ints, rng: np.random.Generator) -> Ints:
    """Owner of each row when client k gets ``counts[k, c]`` random rows of class c; -1 for rows left over.

    Args:
        counts: ``(clients, classes)``; no class may be promised more often than it has rows.
        y: ``(n,)`` classes.
        rng: chooses the rows.
    """
    owner = np.full(len(y), -1, dtype=np.int64)
    order = np.lexsort((rng.random(len(y)), y))
    starts = np.searchsorted(y[order], np.arange(counts.shape[1]))
    for c, start in enumerate(starts):
        owners = np.repeat(np.arange(len(counts)), counts[:, c])
        owner[order[start : start + len(owners)]] = owners
    return owner


def draw_counts(total: int, mix: Floats, limits: Ints, rng: np.random.Generator) -> Ints:
    """Whole numbers that sum to ``total``, drawn by ``mix`` and none above its limit."""
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
        # Few would come twice: all at once, and those that do again. Three times faster than class by class.
        c = np.repeat(np.arange(len(counts)), counts)
        at = offsets[c] + (rng.random(len(c)) * sizes[c]).astype(np.int64)
        while (np.diff(np.sort(at)) == 0).any():
            twice = np.setdiff1d(np.arange(len(at)), np.unique(at, return_index=True)[1])
            at[twice] = offsets[c[twice]] + (rng.random(len(twice)) * sizes[c[twice]]).astype(np.int64)
        out = rows[at]
    else:
        out = np.concatenate(
            [rows[offsets[c] + rng.choice(sizes[c], counts[c], replace=False)] for c in np.flatnonzero(counts)]
        )
    out.sort()
    out.setflags(write=False)
    return out
