"""How good is magnitude? Weights of a small network by magnitude, and by Shapley values from random permutations.

    python benchmarks/importance/shapley.py [--permutations 50] [--seeds 0]     # prints Markdown

The players are the 910 masked weights of an MLP, which FIARSE or FedAvg trains on the embedded digits. The value of a
set of weights is the accuracy with all other weights at zero, on one half of the test examples. A weight's Shapley
value is the mean of what it adds to those before it in a random order: 910 evaluations for each order. Submodels are
then compared on the other half of the test examples, which no value has seen.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyfed.blocks.importance import best
from polyfed.config import Config
from polyfed.execute.drivers import make_driver
from polyfed.execute.placement import Placement
from polyfed.rounds.clients import LocalClients
from polyfed.rounds.federation import Federation, prepare
from polyfed.rounds.round import play_round
from polyfed.rounds.selection import draw_cohort
from polyfed.storage.state_store import Store

CAPACITIES = (0.5, 0.25, 0.125, 0.0625, 0.03125)
CLIENTS = 12


def trained(algorithm: dict[str, Any], seed: int) -> tuple[dict[str, Tensor], Federation]:
    """Return the global model after 40 rounds."""
    sizes = [1.0, 0.25, 0.0625] if algorithm["name"] == "fiarse" else [1.0]
    config = Config.parse(
        {
            "run": {"rounds": 40, "seed": seed, "threads": 1, "driver": "sequential"},
            "data": {"dataset": "digits", "augment": False, "test_fraction": 0.5},
            "partition": {"kind": "dirichlet", "alpha": 1.0, "min_samples": 20},
            "clients": {"count": CLIENTS, "models": ["mlp(hidden=(12,))"], "capacities": sizes},
            "train": {"epochs": 2, "batch_size": 16, "lr": 0.1},
            "algorithm": algorithm,
        }
    )
    federation = prepare(config)
    driver = make_driver("sequential", Placement.of("cpu", "fp32"))
    server: Any = federation.algorithm.init_server(federation.task, federation.rng.at("server"))
    with tempfile.TemporaryDirectory() as folder:
        clients = LocalClients(federation, driver, Store(Path(folder), federation.algorithm.states, resident=True))
        for round_ in range(1, config.run.rounds + 1):
            server = play_round(federation, server, draw_cohort(federation, round_, 0.0), clients, driver).server
            clients.commit()
    return dict(server.model), federation


def halves(federation: Federation) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the test examples of all clients, (n, 64) and (n,): even ones, and odd ones."""
    tests = [federation.data.test(k) for k in range(CLIENTS)]
    batches = [test.batch(torch.arange(len(test))) for test in tests]
    x, y = torch.cat([b[0].flatten(1) for b in batches]), torch.cat([b[1] for b in batches])
    return (x[::2], y[::2]), (x[1::2], y[1::2])


def accuracies(params: dict[str, Tensor], masks: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
    """Return the accuracy under each mask, (m,), of masks (m, d) in the order of the tensors."""
    x, y = data
    pieces = zip(params.items(), masks.split([v.numel() for v in params.values()], 1), strict=True)
    w = {name: value * mask.reshape(-1, *value.shape) for (name, value), mask in pieces}
    h = torch.relu(torch.einsum("nd,mhd->mnh", x, w["fc1.weight"]) + w["fc1.bias"][:, None])
    z = torch.einsum("mnh,mch->mnc", h, w["fc2.weight"]) + w["fc2.bias"][:, None]
    return (z.argmax(2) == y).float().mean(1)


def shapley(params: dict[str, Tensor], data: tuple[Tensor, Tensor], orders: int, seed: int) -> Tensor:
    """Return what each weight added in each half of the orders, (2, d).

    One more weight changes one hidden unit or one output, so a step costs a row and not a forward pass.
    """
    x, y = data[0].double().numpy().T, data[1].numpy()  # (64, n), (n,)
    first, b, second, c = (
        params[name].double().numpy() for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    )
    hidden, inputs, outputs = len(b), len(x), len(c)
    d, total = flat(params).numel(), np.zeros((2, flat(params).numel()))
    rng = np.random.default_rng(seed)
    for number in range(orders):
        before, h, present = np.zeros((hidden, len(y))), np.zeros((hidden, len(y))), np.zeros_like(second)
        z = np.zeros((outputs, len(y)))
        last = float((z.argmax(0) == y).mean())
        for j in rng.permutation(d).tolist():
            at = j - hidden * inputs
            if at < hidden:
                unit = at if at >= 0 else j // inputs
                before[unit] += b[unit] if at >= 0 else first[unit, j % inputs] * x[j % inputs]
                change = np.maximum(before[unit], 0) - h[unit]
                h[unit] += change
                z += present[:, unit, None] * change
            elif at < hidden + outputs * hidden:
                out, unit = divmod(at - hidden, hidden)
                present[out, unit] = second[out, unit]
                z[out] += second[out, unit] * h[unit]
            else:
                out = at - hidden - outputs * hidden
                z[out] += c[out]
            value = float((z.argmax(0) == y).mean())
            total[number % 2, j] += value - last
            last = value
    return torch.from_numpy(total / (orders / 2))


def ranks(values: Tensor) -> np.ndarray:
    """Return the rank of each value; equal values have their mean rank."""
    _, inverse, counts = np.unique(values.numpy(), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def at_capacities(params: dict[str, Tensor], score: Tensor, data: tuple[Tensor, Tensor]) -> list[float]:
    """Return the accuracy of the submodel of the largest scores at each capacity."""
    pieces = score.split([value.numel() for value in params.values()])
    scores = {n: piece.reshape(v.shape) for (n, v), piece in zip(params.items(), pieces, strict=True)}
    scores = {n: s - min(float(v.min()) for v in scores.values()) for n, s in scores.items()}
    masks = [best(scores, params, [0] * len(params), c, {}) for c in CAPACITIES]
    return accuracies(params, torch.stack([flat(mask) for mask in masks]), data).tolist()


def flat(values: dict[str, Tensor]) -> Tensor:
    """Return all values in a row."""
    return torch.cat([value.flatten() for value in values.values()])


def mean(values: list[float]) -> str:
    """Return the mean, with the standard deviation over seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--permutations", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    started = time.perf_counter()
    rows: dict[tuple[str, str], list[list[float]]] = {}
    facts: dict[str, list[tuple[float, float, float]]] = {}
    for seed in args.seeds:
        for name in ("fiarse", "fedavg"):
            params, federation = trained({"name": name}, seed)
            game, held_out = halves(federation)
            found = shapley(params, game, args.permutations, seed)
            size, value = flat(params).abs(), found.mean(0)
            whole = float(accuracies(params, torch.ones(1, len(size)), held_out))
            facts.setdefault(name, []).append((correlation(value, size), correlation(found[0], found[1]), whole))
            drawn = torch.rand(len(size), generator=torch.Generator().manual_seed(seed))
            for by, score in (("magnitude", size), ("Shapley value", value), ("chance", drawn)):
                rows.setdefault((name, by), []).append(at_capacities(params, score, held_out))
    print("| trained by | chosen by | " + " | ".join(f"{c:g}" for c in CAPACITIES) + " |")
    print("| --- | --- |" + " --- |" * len(CAPACITIES))
    for (name, by), found in rows.items():
        print(f"| {name} | {by} | " + " | ".join(mean(list(one)) for one in zip(*found, strict=True)) + " |")
    print("\n| trained by | rank correlation with magnitude | of two halves of the orders | accuracy of all weights |")
    print("| --- | --- | --- | --- |")
    for name, found in facts.items():
        print(f"| {name} | " + " | ".join(mean(list(one)) for one in zip(*found, strict=True)) + " |")
    seconds = time.perf_counter() - started
    print(f"\n{args.permutations} orders, seeds {args.seeds}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
