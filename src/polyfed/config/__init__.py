"""The configuration of a run: typed sections, read from TOML, with all faults reported at once.

Importing this package loads neither torch nor numpy; only calls of `load_algorithm` and `algorithm_fields`, and the
check or hash of an algorithm's keys, load them.

    config = Config.load("experiment.toml", ["run.rounds=5"])

Modules: ``sections`` (keys, defaults and ranges), ``toml`` (TOML in and out, overrides), ``config`` (`Config`),
``algorithms`` (algorithms by name), ``profiles`` (tables of devices), ``faults`` (the text of a fault).
"""

from polyfed.config.algorithms import (
    AlgorithmField,
    algorithm_class,
    algorithm_fields,
    algorithm_table,
    canonical_name,
    load_algorithm,
)
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
    "algorithm_table",
    "canonical_name",
    "load_algorithm",
]
