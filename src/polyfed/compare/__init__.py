"""Several runs on the same splits: a run with its controls, and a table of algorithms over seeds.

    table = compare(Config.load("experiment.toml"), ["fedmrl", "fedmrl:share=false", "standalone"], [0, 1, 2])

Modules: ``runs`` (one run, its controls), ``grid`` (`compare`), ``table`` (the numbers side by side).
"""

from polyfed.compare.grid import compare
from polyfed.compare.runs import meanings, resume_with_controls, run_or_go_on, run_with_controls, summary_of
from polyfed.compare.table import Comparison, Line, paired_p, tabulate

__all__ = [
    "Comparison",
    "Line",
    "compare",
    "meanings",
    "paired_p",
    "resume_with_controls",
    "run_or_go_on",
    "run_with_controls",
    "summary_of",
    "tabulate",
]
