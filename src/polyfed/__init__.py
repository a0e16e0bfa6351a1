"""polyfed: federated learning where every client's model may differ.

    import polyfed
    config = polyfed.Config.parse({"clients": {"models": ["cnn1", "cnn5"]}, "algorithm": {"name": "fedmrl"}})
    summary = polyfed.simulate(config)

Names are imported on first use, so that ``import polyfed`` and ``polyfed --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyfed.algorithm import Algorithm, Task
    from polyfed.compute import exchange, fit, reduce
    from polyfed.config import Config
    from polyfed.data.partition import make_partition
    from polyfed.data.sources import load_dataset
    from polyfed.errors import PolyfedError
    from polyfed.message import Message, Nothing, Record, State
    from polyfed.models.split import SplitModel
    from polyfed.models.zoo import build
    from polyfed.nets import Net
    from polyfed.parties import ClientInfo, Cohort, LocalClient
    from polyfed.rng import Rng
    from polyfed.runtime.simulate import resume, simulate

__version__ = "0.1.0"

_PUBLIC = {
    "Algorithm": "polyfed.algorithm",
    "Task": "polyfed.algorithm",
    "Config": "polyfed.config",
    "ClientInfo": "polyfed.parties",
    "Cohort": "polyfed.parties",
    "LocalClient": "polyfed.parties",
    "Net": "polyfed.nets",
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
    "resume": "polyfed.runtime.simulate",
    "simulate": "polyfed.runtime.simulate",
}

__all__ = [  # noqa: RUF022 - written out for type checkers, a test compares it with _PUBLIC
    "__version__",
    "Algorithm",
    "ClientInfo",
    "Cohort",
    "Config",
    "LocalClient",
    "Message",
    "Net",
    "Nothing",
    "PolyfedError",
    "Record",
    "Rng",
    "SplitModel",
    "State",
    "Task",
    "build",
    "exchange",
    "fit",
    "load_dataset",
    "make_partition",
    "reduce",
    "resume",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'polyfed' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
