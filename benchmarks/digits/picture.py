"""The README's picture from results.jsonl: mean accuracy over rounds, a band of one standard deviation over seeds.

python benchmarks/digits/picture.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs" / "images" / "digits.png"
SETTING = "c10-t90-adam-d400"
STYLES = {
    "fedmrl": ("FedMRL: the small network is shared", "#0b6e4f", "-"),
    "local-only": ("local-only: the same modules, nothing shared", "#8f2d56", "--"),
    "standalone": ("Standalone: every client's own network", "#555555", ":"),
}


def main() -> None:
    """Draw it."""
    rows = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for algorithm, (label, colour, style) in STYLES.items():
        found = [r["curve"] for r in rows if r["setting"] == SETTING and r["algorithm"] == algorithm and "curve" in r]
        rounds = [int(key) for key in found[0]]
        values = 100 * np.array([list(curve.values()) for curve in found])
        mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1)
        axes.plot(rounds, mean, style, color=colour, label=label)
        axes.fill_between(rounds, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("round")
    axes.set_ylabel("test accuracy, mean over clients [%]")
    axes.set_xticks(rounds)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    axes.set_title(
        f"Digits, 10 clients, five networks, about 18 training images each ({len(found)} seeds)", fontsize=10
    )
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
