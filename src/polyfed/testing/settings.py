"""What the laws run an algorithm on: few small pictures, small networks, unequal clients.

An algorithm of your own needs no entry here. The laws try the families in order and take the first that
`Algorithm.check` and `Algorithm.models` accept; what else it needs goes into a file for ``--law-config``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias

#: Tables of a configuration.
Tables: TypeAlias = Mapping[str, Mapping[str, Any]]

_DEEP: Tables = {
    "clients": {"models": ["in-resnet10-small(width=5)", "in-resnet14-small(width=5)"], "count": 4},
    # The last maps are 1x1. Normalised over a batch of two or three, or over groups of two channels, they are signs
    # of differences, and rounding errors grow by orders of magnitude; so all examples make one batch.
    "train": {"epochs": 2, "batch_size": 64, "lr": 0.001},
}

#: Networks to try, the most unlike first: dense beside convolutional with BatchNorm and another width of the
#: representation; the same with equal widths, for methods that share heads or prototypes; two depths of one family, for
#: methods that average layers by name; one for all. Odd widths, so that messages need their padding.
FAMILIES: tuple[Tables, ...] = (
    {"clients": {"models": ["mlp(hidden=(24, 21))", "resnet8(width=5)"]}},
    {"clients": {"models": ["mlp(hidden=(24, 20))", "resnet8(width=5)"]}},
    _DEEP,
    {"clients": {"models": ["resnet8(width=5)"]}},
)
#: Where rounding in single precision is compared: few ReLUs, or steps so small that one which flips matters little.
#: By averaging, a flip at one client reaches all.
CALM: tuple[Tables, ...] = (
    {"clients": {"models": ["mlp(hidden=(24,))", "mlp(hidden=(24, 21))"]}},
    {"clients": {"models": ["mlp(hidden=(21,))", "mlp(hidden=(24, 21))"]}},
    {**_DEEP, "train": {**_DEEP["train"], "lr": 2e-5}},
    {"clients": {"models": ["mlp(hidden=(24, 21))"]}},
)
#: Where they have to learn, dense ones suffice and are quick.
LEARNERS: tuple[Tables, ...] = (
    {"clients": {"models": ["mlp(hidden=(64,))", "mlp(hidden=(64, 32))"]}},
    {"clients": {"models": ["mlp(hidden=(32,))", "mlp(hidden=(64, 32))"]}},
    {
        "clients": {"models": ["in-resnet10-small(width=8)", "in-resnet14-small(width=8)"]},
        "train": {"epochs": 3, "batch_size": 32},
    },
    {"clients": {"models": ["mlp(hidden=(64,))"]}},
)
#: With each, unequal sizes, or all alike where capacities below 1 are refused.
CAPACITIES: tuple[tuple[float, ...], ...] = ((1.0, 0.3), (1.0,))

#: Keys of the catalogue's algorithms whose defaults are too large for pictures of 16x16 and six clients.
KEYS: Mapping[str, Mapping[str, Any]] = {
    "fedapen": {"auxiliary": "mlp(hidden=(32,))"},
    "fedkd": {"auxiliary": "mlp(hidden=(32,))"},
    "fedmrl": {"rep_dim": 9},
    "fedmrl-adaptive": {"rep_dim": 9, "auxiliary": "mlp(hidden=(24, 21))"},
    "fedmrl-e": {"rep_dim": 9, "granularities": [5, 9], "auxiliary": "mlp(hidden=(24, 21))"},
    "fedmrl-ssl": {"rep_dim": 9, "head_dim": 7, "auxiliary": "mlp(hidden=(24, 21))"},
    "fedl2g": {"warmup": 1},
    # The server's batch is all that a round brings, or the order of answers and equal answers would make other batches.
    "fedgh": {"server_batch": 1000},
    "fedtgp": {"server_batch": 1000, "server_epochs": 20, "server_lr": 0.2},
    "fedgen": {"noise_dim": 7, "hidden": 13, "server_steps": 20, "server_batch": 9},
    "fedin": {"feature_batch": 8},
    # A trace for each width takes seconds.
    "fjord": {"widths": [0.5, 1.0]},
    "fml": {"auxiliary": "mlp(hidden=(11,))"},
    # One mean serves all of them, and FedAvg has it for one architecture.
    "fednova": {"average": "layer"},
    "fedprox": {"average": "architecture"},
    "moon": {"average": "architecture"},
    "scaffold": {"average": "layer"},
}

#: The configuration of all laws; the algorithm, its networks and the pictures' file come on top. Six clients with 20
#: to 45 examples, so that weights differ and stacked clients have batches of different sizes; momentum and weight
#: decay, so that an optimizer has a state to leak; small steps, as rounding errors grow with the training's.
BASE: Tables = {
    "run": {"seed": 1, "rounds": 6, "eval_every": 3, "checkpoint_every": 3, "threads": 1, "driver": "sequential"},
    "data": {"dataset": "npz", "test_fraction": 0.2},
    "partition": {"kind": "dirichlet", "alpha": 2.0, "min_samples": 12},
    "clients": {"count": 6},
    "train": {"epochs": 1, "batch_size": 10, "lr": 0.005, "momentum": 0.5, "weight_decay": 1e-3},
}

#: What changes for the law that an algorithm learns: four clients with every digit, upright, and time enough.
LEARNING: Tables = {
    "run": {"rounds": 3},
    "data": {"augment": False},
    "partition": {"kind": "iid", "alpha": None, "min_samples": None},
    "clients": {"count": 4},
    "train": {"epochs": 4, "lr": 0.02, "momentum": 0.9},
}
#: Pictures of the small problem, and of the one to learn.
FEW, MORE = 216, 400


def merged(*layers: Tables) -> dict[str, dict[str, Any]]:
    """Tables on top of each other, key by key."""
    sections = dict.fromkeys(itertools.chain(*layers))
    return {section: {k: v for layer in layers for k, v in layer.get(section, {}).items()} for section in sections}
