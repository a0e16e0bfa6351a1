"""The algorithms by name, without importing them (nor torch), so that `polyfed list` answers at once."""

from __future__ import annotations

#: name -> (module:class, one line)
ALGORITHMS: dict[str, tuple[str, str]] = {
    "fedavg": (
        "polyfed.algorithms.fedavg:FedAvg",
        "one model for all, averaged over clients (McMahan et al. 2017)",
    ),
    "fedin": (
        "polyfed.algorithms.fedin:FedIN",
        "models of different depth learn from each other's features (a reconstruction of Chan et al. 2023)",
    ),
    "fedmrl": (
        "polyfed.algorithms.fedmrl:FedMRL",
        "a small shared model beside each private one, fused at two nested granularities (Yi et al. 2024)",
    ),
    "fiarse": (
        "polyfed.algorithms.fiarse:FIARSE",
        "each client trains the largest weights that its capacity allows (Wu et al. 2024)",
    ),
    "standalone": (
        "polyfed.algorithms.standalone:Standalone",
        "every client trains alone: what federating has to beat",
    ),
}

#: Spellings of papers and other libraries.
ALIASES = {"local": "standalone", "fed-mrl": "fedmrl", "fed-in": "fedin", "fed-avg": "fedavg"}
