"""The kinds of partition: each says which client owns each row, before rows are split into train and test.

All functions return ``owner`` ``(n,)`` int64, -1 for a row that no client gets.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from polyfed.base.errors import DataError
from polyfed.data.partition.apportion import Bools, Floats, Ints, apportion, deal

_REDRAWS = 100  # a setting that fails this often should be changed


def deal_iid(rows: int, clients: int, rng: np.random.Generator) -> Ints:
    """Rows dealt at random; sizes differ by at most one."""
    return rng.permuted(np.arange(rows, dtype=np.int64) % clients)


def deal_classes(y: Ints, num_classes: int, clients: int, per_client: int, rng: np.random.Generator) -> Ints:
    """Each client holds exactly ``per_client`` different classes (the pathological partition of FedMRL).

    Each class is cut into floor(k N / L) shards, of which some classes get one more so that there are k N in
    all; the shards of a class are uneven, in proportions drawn from U(0.4, 0.6). Each client in turn takes
    the k classes with the most shards left, ties at random. Taking the largest always succeeds (Gale and
    Ryser), so no client is ever given the same class twice; the authors' code can do that when L is no
    multiple of k.

    Raises:
        DataError: fewer classes with rows than ``per_client``, or a class with fewer rows than shards.
    """
    in_class = np.bincount(y, minlength=num_classes)
    present = np.flatnonzero(in_class)
    if per_client > len(present):
        raise DataError(
            f"partition 'classes': classes_per_client is {per_client}, but only {len(present)} classes have "
            "rows; lower it"
        )
    shards, more = divmod(per_client * clients, len(present))
    left = np.full(len(present), shards)
    left[rng.permutation(len(present))[:more]] += 1
    short = np.flatnonzero(in_class[present] < left)
    if len(short):
        c = int(present[short[0]])
        raise DataError(
            f"partition 'classes': class {c} has {in_class[c]} rows for {left[short[0]]} clients; use fewer "
            "clients or fewer classes_per_client"
        )
    held = np.zeros((clients, len(present)), dtype=np.bool_)
    for client in range(clients):
        most = np.lexsort((rng.random(len(present)), -left))[:per_client]
        held[client, most] = True
        left[most] -= 1
    counts = np.zeros((clients, num_classes), dtype=np.int64)
    for column, c in enumerate(present):
        holders = np.flatnonzero(held[:, column])  # none if there are fewer shards than classes
        share = rng.uniform(0.4, 0.6, len(holders))
        # Each holder gets one row first, so that a client has all of its classes however few rows there are.
        spare = in_class[c : c + 1] - len(holders)
        want = share / share.sum() * spare
        counts[holders, c] = 1 + apportion(np.zeros(len(holders), dtype=np.int64), want, spare, rng)
    return deal(counts, y, rng)


def deal_dirichlet(
    y: Ints,
    num_classes: int,
    clients: int,
    alpha: float,
    enough: Callable[[Ints], Bools],
    rng: np.random.Generator,
) -> Ints:
    """Each class spread over the clients by a draw from Dirichlet(alpha), until all clients have enough.

    Args:
        y: ``(n,)`` classes.
        num_classes: number of classes.
        clients: number of clients.
        alpha: concentration; small means that a class goes to few clients.
        enough: from the clients' sizes, which of them are large enough.
        rng: source of the draws.

    Raises:
        DataError: each of a hundred draws left a client with too few rows.
    """
    in_class = np.bincount(y, minlength=num_classes)
    group = np.repeat(np.arange(num_classes), clients)
    fewest = 0
    for _ in range(_REDRAWS):
        share = rng.dirichlet(np.full(clients, alpha), size=num_classes)  # (classes, clients)
        counts = apportion(group, (share * in_class[:, None]).ravel(), in_class, rng).reshape(num_classes, clients).T
        large = enough(counts.sum(axis=1))
        if large.all():
            return deal(counts, y, rng)
        fewest = max(fewest, int(large.sum()))
    raise DataError(
        f"partition 'dirichlet': in {_REDRAWS} draws with alpha {alpha} at best {fewest} of {clients} "
        f"clients got enough of the {len(y)} rows; raise alpha, lower min_samples or clients.count, or use "
        "'balanced-dirichlet'"
    )


def deal_balanced(y: Ints, num_classes: int, clients: int, alpha: float, rng: np.random.Generator) -> Ints:
    """Clients of equal size (within one row), each with a class mix drawn from Dirichlet(alpha).

    All clients draw the classes of their rows at once; where a class is asked for more often than it has
    rows, random requests win, and the others are drawn again among the classes that have rows left. Each
    repetition either finishes or exhausts a class, so there are at most as many as classes.
    """
    left = np.bincount(y, minlength=num_classes)
    prior: Floats = rng.dirichlet(np.full(num_classes, alpha), size=clients)  # (clients, classes)
    lacking = np.full(clients, len(y) // clients)
    lacking[rng.permutation(clients)[: len(y) % clients]] += 1
    counts = np.zeros((clients, num_classes), dtype=np.int64)
    while lacking.any():
        open_prior = prior * (left > 0)
        # A client whose likely classes are all used up takes any class that is left.
        open_prior = np.where(open_prior.sum(axis=1, keepdims=True) > 1e-12, open_prior, left.astype(np.float64))
        open_prior /= open_prior.sum(axis=1, keepdims=True)
        asked = rng.multinomial(lacking, open_prior)
        asked[:, left == 0] = 0  # a guard against rounding in the last class of the multinomial
        for c in np.flatnonzero(asked.sum(axis=0) > left):
            asked[:, c] = rng.multivariate_hypergeometric(asked[:, c], left[c], method="marginals")
        counts += asked
        left = left - asked.sum(axis=0)
        lacking = lacking - asked.sum(axis=1)
    return deal(counts, y, rng)


def deal_like(train_counts: Ints, y: Ints, rng: np.random.Generator) -> Ints:
    """Owner of official test rows: each class is dealt in proportion to the clients' training rows of it.

    A client that rounding leaves without a test row takes a row of its most frequent class from the client with the
    most test rows of that class.
    """
    clients, num_classes = train_counts.shape
    in_train = train_counts.sum(axis=0)
    totals = np.where(in_train > 0, np.bincount(y, minlength=num_classes), 0)
    want = (train_counts / np.maximum(in_train, 1) * totals).T.ravel()
    group = np.repeat(np.arange(num_classes), clients)
    counts = apportion(group, want, totals, rng).reshape(num_classes, clients).T.copy()
    for client in np.flatnonzero(counts.sum(axis=1) == 0):
        for c in np.argsort(-train_counts[client], kind="stable"):
            donor = int(np.argmax(counts[:, c]))
            if train_counts[client, c] and counts[donor, c] and counts[donor].sum() > 1:
                counts[donor, c] -= 1
                counts[client, c] += 1
                break
    return deal(counts, y, rng)
