"""Estimates of how long the cells of a study take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polyfed.comparison.specs import RunSpec
from polyfed.config import Config
from polyfed.data.catalogue import SIZES

#: Training examples per second while no cell of the same algorithm is done: about FedMRL's on CIFAR-10 with two cores.
RATE = 2600.0
#: Time of testing an example, as a share of the time of training it.
TEST = 0.3


def work(config: Config) -> float | None:
    """Return how many examples a run trains on; a tested example counts `TEST`. None if the data's size is unknown."""
    run, data, clients, train = config.run, config.data, config.clients, config.train
    if data.dataset not in SIZES:
        return None
    total, official = SIZES[data.dataset]
    each = (total - official if data.split == "official" else total) / clients.count
    if config.partition.samples_per_client is not None:
        each = min(each, config.partition.samples_per_client)
    share = data.test_fraction if data.split == "pooled" else official / (total - official)
    tested, trained = each * share, each * (1 - share if data.split == "pooled" else 1)
    if data.validation_fraction:
        tested, trained = trained * data.validation_fraction, trained * (1 - data.validation_fraction)
    cohort = max(1, round(clients.participation * clients.count))
    a_round = cohort * (train.steps * train.batch_size if train.steps else (train.epochs or 1) * trained)
    evaluations = 1 + -(-run.rounds // run.eval_every)
    an_evaluation = TEST * tested * ((run.eval_clients or clients.count) + cohort)
    an_evaluation += 0.8 * trained * (run.gradient_clients or 0)
    return run.rounds * a_round + evaluations * an_evaluation


def rates(cells: Sequence[RunSpec], root: Path) -> dict[str, float]:
    """Return the examples per second of each algorithm, from the cells that are done."""
    done: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        amount, summary = work(cell.config), cell.summary(root)
        if amount is not None and summary is not None:
            seconds = summary["seconds"] + summary["seconds_evaluation"]
            done.setdefault(cell.config.algorithm.name, []).append((amount, seconds))
    return {
        name: sum(amount for amount, _ in pairs) / max(1e-9, sum(seconds for _, seconds in pairs))
        for name, pairs in done.items()
    }


def seconds(cell: RunSpec, known: dict[str, float]) -> float | None:
    """Return about how many seconds a cell takes from its beginning; None if the data's size is unknown."""
    amount = work(cell.config)
    return None if amount is None else amount / known.get(cell.config.algorithm.name, RATE)
