"""Several runs on the same splits: a run with its controls, and tables of algorithms over seeds and grids.

    table = compare(Config.load("experiment.toml"), ["fedmrl", "fedmrl:share=false", "standalone"], [0, 1, 2])

Modules: ``runs`` (one run, its controls), ``cells`` (what is to be run, each thing once), ``grid`` (`compare`),
``table`` (the numbers side by side).
"""

from polyfed.compare.compare import compare
from polyfed.compare.render import Comparison, tabulate
from polyfed.compare.runs import meanings, resume_with_controls, run_or_go_on, run_with_controls, summary_of
from polyfed.compare.specs import AlgorithmEntry, RunSpec, Setting
from polyfed.compare.statistics import Costs, Line, Target, paired_p

__all__ = [
    "AlgorithmEntry",
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
    "summary_of",
    "tabulate",
]
