"""A study small enough to run in seconds."""

from pathlib import Path

from polyfed.config.toml import to_toml

TINY = {
    "run": {
        "rounds": 2,
        "eval_every": 1,
        "checkpoint_every": 100,
        "threads": 1,
        "targets": [0.001],
        "gradient_clients": 1,
    },
    "data": {"image_size": 16, "test_fraction": 0.5},
    "partition": {"classes_per_client": 10, "samples_per_client": 40},
    "clients": {"count": 3, "models": ["mlp(hidden=(8,))"]},
    "train": {"batch_size": 8, "lr": 0.05},
}
TUNE = {"grid": {"train.epochs": [1, 2]}, "widen": 0, "config": {"data": {"validation_fraction": 0.5}}}


def study(path: Path, **tables: object) -> Path:
    """A small study of your own."""
    base = {"title": "Tiny", "config": TINY, "algorithms": ["fedavg", "standalone"], "seeds": [0, 1]}
    whole = {**base, **tables}
    plain = {key: value for key, value in whole.items() if not isinstance(value, dict)}
    tables_ = {key: value for key, value in whole.items() if isinstance(value, dict)}
    top = to_toml({"x": plain}).split("\n", 1)[1]
    path.write_text(top + to_toml(tables_))
    return path
