"""A small federation for the tests on a GPU: dense and convolutional networks, BatchNorm, augmented images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyfed.config import Config

TABLES: Mapping[str, Mapping[str, Any]] = {
    "run": {"rounds": 3, "eval_every": 3, "checkpoint_every": 1, "threads": 1, "driver": "sequential"},
    "data": {"dataset": "digits", "image_size": 16},
    "partition": {"kind": "dirichlet", "alpha": 2.0, "samples_per_client": 40},
    "clients": {"count": 6, "models": ["mlp(hidden=(24, 21))", "resnet8(width=5)"]},
    "train": {"epochs": 1, "batch_size": 10, "lr": 0.01, "momentum": 0.5, "weight_decay": 1e-3},
    "algorithm": {"name": "fedmrl", "rep_dim": 9},
}


def config(**sections: Mapping[str, Any]) -> Config:
    """The configuration, with ``sections`` on top; of the algorithm's, instead."""
    tables = {name: {**keys, **sections.get(name, {})} for name, keys in TABLES.items()}
    return Config.parse({**tables, "algorithm": sections.get("algorithm", TABLES["algorithm"])})
