"""Summaries as runs write them, made up."""

import json

from polyfed.comparison import RunSpec, Setting, tabulate
from polyfed.config import Config

ROUNDS = {"run": {"name": "t", "rounds": 2, "eval_every": 2, "threads": 1}}


def summary(mean, worst=0.5, **changes):
    return {
        "accuracy": {"mean": mean, "worst_decile": worst},
        "bytes": {"up": 400, "down": 800, "up_header": 40, "down_header": 20},
        "flops": 1000,
        "flops_per_example": 7.0,
        "seconds": 2.0,
        "memory": {"process_peak": 1, "step_peak": {"a": 100, "b": 300}},
        "clients": {"count": 2, "trained": 2, "participations": 4},
        "targets": [],
        "partition_hash": "h",
        **changes,
    }


CONFIG = Config.parse({**ROUNDS, "algorithm": {"name": "fedavg"}})


def put(root, label, seed, config=CONFIG, **of):
    """A cell whose run is done with these results."""
    cell = RunSpec(
        Setting(),
        label,
        seed,
        config.replace("run", seed=seed, name=label).replace("train", lr=1.0 + sum(map(ord, label))),
    )
    cell.run_dir(root).mkdir(parents=True)
    (cell.run_dir(root) / "summary.json").write_text(json.dumps(summary(**of)))
    return cell


def table(root, **means):
    cells = [put(root, label, seed, mean=mean) for label, of in means.items() for seed, mean in enumerate(of)]
    return tabulate(cells, root, root)
