"""polyfed: federated learning where every party's model may differ.

    import polyfed
    summary = polyfed.run(algorithm={"name": "fedmrl"}, clients={"count": 10, "models": ["cnn1", "cnn5"]})

Names are imported on first use, so that ``import polyfed`` and ``polyfed --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Algorithm": "polyfed.algorithm",
    "Task": "polyfed.algorithm",
    "Config": "polyfed.config",
    "ClientInfo": "polyfed.compute",
    "Cohort": "polyfed.compute",
    "LocalClient": "polyfed.compute",
    "Net": "polyfed.compute",
    "exchange": "polyfed.compute",
    "fit": "polyfed.compute",
    "reduce": "polyfed.compute",
    "Message": "polyfed.message",
    "Nothing": "polyfed.message",
    "Record": "polyfed.message",
    "State": "polyfed.message",
    "PolyfedError": "polyfed.errors",
    "Rng": "polyfed.rng",
    "SplitModel": "polyfed.models.split",
    "build": "polyfed.models.zoo",
    "load_dataset": "polyfed.data.sources",
    "make_partition": "polyfed.data.partition",
    "compare": "polyfed.compare",
    "resume": "polyfed.runtime.simulate",
    "simulate": "polyfed.runtime.simulate",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'polyfed' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
