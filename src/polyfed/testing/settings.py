"""What the laws run an algorithm on: few small pictures, small networks, unequal clients.

An algorithm of your own needs no entry here. The laws try the `FAMILIES` in order and take the first that
`Algorithm.check` and `Algorithm.models` accept; what else it needs goes into a file for ``--law-config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Networks to try, the most unlike first: dense beside convolutional with BatchNorm and another representation
#: width; two depths of one family, for methods that average layers by name (with GroupNorm: BatchNorm over 1x1 maps
#: of a few examples amplifies rounding); one for all. With each, all sizes alike where capacities below 1 are refused.
FAMILIES: tuple[tuple[str, ...], ...] = (
    ("mlp(hidden=(24, 20))", "resnet8(width=4)"),
    ("in-resnet10-small(norm=group, width=4)", "in-resnet14-small(norm=group, width=4)"),
    ("resnet8(width=4)",),
)
CAPACITIES: tuple[tuple[float, ...], ...] = ((1.0, 0.3), (1.0,))

#: Keys of the catalogue's algorithms whose defaults are too large for pictures of 16x16 and six clients.
KEYS: Mapping[str, Mapping[str, Any]] = {
    "fedmrl": {"rep_dim": 8},
    "fedin": {"feature_batch": 8},
}

#: The configuration of all laws; the algorithm, its networks and the pictures' file come on top. Six clients with 15
#: to 50 examples, so that weights differ and stacked clients have batches of different sizes; momentum and weight
#: decay, so that an optimizer has a state to leak.
BASE: Mapping[str, Mapping[str, Any]] = {
    "run": {"seed": 1, "rounds": 6, "eval_every": 3, "checkpoint_every": 3, "threads": 1, "driver": "sequential"},
    "data": {"dataset": "npz", "test_fraction": 0.2},
    "partition": {"kind": "dirichlet", "alpha": 2.0, "min_samples": 12},
    "clients": {"count": 6},
    "train": {"epochs": 1, "batch_size": 10, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
}

#: What changes for the law that an algorithm learns: four clients with every digit, and time enough.
LEARNING: Mapping[str, Mapping[str, Any]] = {
    "run": {"rounds": 6, "eval_every": 6},
    "partition": {"kind": "iid", "alpha": None, "min_samples": None},
    "clients": {"count": 4},
    "train": {"epochs": 2},
}
#: Pictures of the small problem, and of the one to learn.
FEW, MORE = 216, 480


def merged(*layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tables of a configuration on top of each other, key by key; None takes a key away."""
    out: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, keys in layer.items():
            out[section] = {**out.get(section, {}), **keys}
    return {section: {k: v for k, v in keys.items() if v is not None} for section, keys in out.items()}
