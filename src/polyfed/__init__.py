"""polyfed: federated learning where every client's model may differ.

    import polyfed
    config = polyfed.Config.parse({"clients": {"models": ["cnn1", "cnn5"]}, "algorithm": {"name": "fedmrl"}})
    result = polyfed.simulate(config)

Every algorithm of the catalogue is here under the name of its class, such as ``polyfed.FedMRL``. Names are imported on
first use, so that ``import polyfed`` and ``polyfed --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyfed.base.errors import PolyfedError
    from polyfed.base.rng import Rng
    from polyfed.comparison import Comparison, compare
    from polyfed.config import Config
    from polyfed.core.algorithm import Algorithm, Task
    from polyfed.core.clients import ClientInfo, Cohort, LocalClient
    from polyfed.core.message import Message, Nothing, Record, State
    from polyfed.core.net import Net
    from polyfed.core.requests import exchange, fit, reduce
    from polyfed.data.from_python import federated_data
    from polyfed.data.partition.make import make_partition
    from polyfed.data.sources import load_dataset
    from polyfed.models.split import SplitModel
    from polyfed.models.zoo import build
    from polyfed.report.results import RunResult, load_run
    from polyfed.rounds.callbacks import Callback
    from polyfed.simulation.simulate import resume, simulate
    from polyfed.trained.kept import kept_round
    from polyfed.trained.load import trained_model

__version__ = "0.1.0"

_PUBLIC = {
    "Algorithm": "polyfed.core.algorithm",
    "Task": "polyfed.core.algorithm",
    "Callback": "polyfed.rounds.callbacks",
    "Comparison": "polyfed.comparison",
    "Config": "polyfed.config",
    "ClientInfo": "polyfed.core.clients",
    "Cohort": "polyfed.core.clients",
    "LocalClient": "polyfed.core.clients",
    "Net": "polyfed.core.net",
    "exchange": "polyfed.core.requests",
    "fit": "polyfed.core.requests",
    "reduce": "polyfed.core.requests",
    "Message": "polyfed.core.message",
    "Nothing": "polyfed.core.message",
    "Record": "polyfed.core.message",
    "State": "polyfed.core.message",
    "PolyfedError": "polyfed.base.errors",
    "Rng": "polyfed.base.rng",
    "RunResult": "polyfed.report.results",
    "SplitModel": "polyfed.models.split",
    "build": "polyfed.models.zoo",
    "compare": "polyfed.comparison",
    "federated_data": "polyfed.data.from_python",
    "kept_round": "polyfed.trained.kept",
    "load_dataset": "polyfed.data.sources",
    "load_run": "polyfed.report.results",
    "make_partition": "polyfed.data.partition.make",
    "resume": "polyfed.simulation.simulate",
    "simulate": "polyfed.simulation.simulate",
    "trained_model": "polyfed.trained.load",
}

__all__ = [  # noqa: RUF022 - written out for type checkers, a test compares it with _PUBLIC
    "__version__",
    "Algorithm",
    "Callback",
    "ClientInfo",
    "Cohort",
    "Comparison",
    "Config",
    "LocalClient",
    "Message",
    "Net",
    "Nothing",
    "PolyfedError",
    "Record",
    "Rng",
    "RunResult",
    "SplitModel",
    "State",
    "Task",
    "build",
    "compare",
    "exchange",
    "federated_data",
    "fit",
    "kept_round",
    "load_dataset",
    "load_run",
    "make_partition",
    "reduce",
    "resume",
    "simulate",
    "trained_model",
]


def _algorithms() -> dict[str, str]:
    """Return the name of each algorithm's class and its module."""
    from polyfed.algorithms.catalogue import ALGORITHMS

    paths = (path.partition(":") for path, _ in ALGORITHMS.values())
    return {name: module for module, _, name in paths}


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name) or (None if name.startswith("_") else _algorithms().get(name))
    if module is None:
        raise AttributeError(f"module 'polyfed' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_algorithms()})
