"""Terminals and pipes to write to."""

import io

from rich.console import Console


def pipe(width=200):
    return Console(file=io.StringIO(), width=width)


def terminal(width=80):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)


def written(console):
    return console.file.getvalue()


def summary(mean, worst=0.5, **changes):
    return {
        "accuracy": {"mean": mean, "worst_decile": worst},
        "bytes": {"up": 1_000_000, "down": 2_000_000, "up_values": 1_000_000, "down_values": 2_000_000},
        "flops": 3.5e12,
        "seconds": 65.0,
        "memory": {"process_peak": 512_000_000},
        "run_dir": "/runs/here",
        **changes,
    }
