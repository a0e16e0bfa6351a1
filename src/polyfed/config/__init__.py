"""A run as it was asked for: typed sections, read from TOML, all faults found at once.

Free of torch and numpy; only `load_algorithm`, `algorithm_fields` and what checks or hashes an algorithm's
keys load them, when called.

    config = Config.load("experiment.toml", ["run.rounds=5"])

Modules: ``sections`` (what can be said), ``reading`` (TOML in and out, overrides), ``loading`` (`Config`),
``methods`` (algorithms by name), ``profiles`` (tables of devices), ``faults`` (how a fault is told).
"""

from polyfed.config.algorithms import AlgorithmField, algorithm_class, algorithm_fields, canonical_name, load_algorithm
from polyfed.config.config import Config
from polyfed.config.sections import (
    AlgorithmSection,
    ClientsSection,
    DataSection,
    DevicesSection,
    PartitionSection,
    RunSection,
    TrainSection,
)

__all__ = [
    "AlgorithmField",
    "AlgorithmSection",
    "ClientsSection",
    "Config",
    "DataSection",
    "DevicesSection",
    "PartitionSection",
    "RunSection",
    "TrainSection",
    "algorithm_class",
    "algorithm_fields",
    "canonical_name",
    "load_algorithm",
]
