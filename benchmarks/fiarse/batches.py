"""What batches do to BatchNorm without running statistics: the same networks, tested in batches of three kinds.

    python benchmarks/fiarse/batches.py runs/cells/fiarse-seed-0-... [RUN ...]

For each network of the last kept round: its accuracy on all test data in batches of 500 in the order of the data set,
which is *Global* of the pages; with each client's test images as one batch, as in *Local*; and in batches of 20 in the
order of the clients, as in the authors' code. Runs on other splits than the first one's are refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from polyfed.config import Config
from polyfed.core.algorithm import Algorithm
from polyfed.core.net import Nets
from polyfed.execute.local_training import EVAL_BATCH, set_training
from polyfed.execute.placement import Placement
from polyfed.rounds.federation import prepare
from polyfed.trained.kept import kept_round


@torch.no_grad()
def accuracy(algorithm: Algorithm, nets: Nets, x: Tensor, y: Tensor, batches: Iterable[Tensor]) -> float:
    """The share of right answers; ``batches`` has the rows of each batch."""
    right = total = 0
    for rows in batches:
        logits = next(iter(algorithm.predict(nets, x[rows]).values()))
        right += int((logits.argmax(1) == y[rows]).sum())
        total += len(rows)
    return right / total


def main() -> None:
    """Read the command line, and print a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    runs: list[Path] = parser.parse_args().runs
    splits = [json.loads((run / "summary.json").read_text())["partition_hash"] for run in runs]
    if other := [str(run) for run, split in zip(runs, splits, strict=True) if split != splits[0]]:
        parser.error(f"{other[0]} is on other splits than {runs[0]}; give runs of one data set, partition and seed")
    config = Config.load(runs[0] / "config.toml")
    every, positions, sizes = prepare(config).data.global_test(range(config.clients.count))
    x, y = Placement.of("cpu", "fp32").batch(every, torch.arange(len(every)))
    by_client = torch.from_numpy(positions)
    print(f"{'':38}{'500, data set':>14}{'a client each':>14}{'20, clients':>14}")
    for run in runs:
        kept = kept_round(run, config.run.keep_rounds[-1])
        for name, nets in kept.nets.items():
            set_training({part: net.model for part, net in nets.items() if net.model is not None}, False)
            kinds = (torch.arange(len(every)).split(EVAL_BATCH), by_client.split(sizes.tolist()), by_client.split(20))
            told = [f"{100 * accuracy(kept.algorithm, nets, x, y, batches):.1f} %" for batches in kinds]
            print(f"{kept.algorithm.name + ', ' + name:38}{''.join(f'{one:>14}' for one in told)}", flush=True)


if __name__ == "__main__":
    main()
