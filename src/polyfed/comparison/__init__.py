"""Several runs on the same splits: a run with its controls, and tables of algorithms over seeds and grids.

    table = compare(Config.load("experiment.toml"), ["fedmrl", "fedmrl:share=false", "standalone"], [0, 1, 2])

Modules: ``specs`` (the runs of a comparison), ``execution`` (runs each of them once), ``compare`` (`compare`),
``runs`` (one run with its controls), ``statistics`` (means, tests and costs), ``render`` (tables as text).
"""

from polyfed.comparison.compare import compare
from polyfed.comparison.render import ComparedRun, Comparison, tabulate
from polyfed.comparison.runs import meanings, resume_with_controls, run_or_go_on, run_with_controls
from polyfed.comparison.specs import AlgorithmEntry, RunSpec, Setting
from polyfed.comparison.statistics import Costs, Line, Target, paired_p

__all__ = [
    "AlgorithmEntry",
    "ComparedRun",
    "Comparison",
    "Costs",
    "Line",
    "RunSpec",
    "Setting",
    "Target",
    "compare",
    "meanings",
    "paired_p",
    "resume_with_controls",
    "run_or_go_on",
    "run_with_controls",
    "tabulate",
]
