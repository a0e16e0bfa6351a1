"""Where a person reads text: a terminal, a file, a notebook, or a string. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

from rich.console import Console

_WIDE = 10_000  # columns


def console() -> Console:
    """Return standard output; if it is no terminal, it is wide enough for any table. A notebook gets plain text."""
    here = Console(force_jupyter=False)
    return here if here.is_terminal else Console(width=_WIDE, force_jupyter=False)


def text(show: Callable[[Console], None]) -> str:
    """Return what ``show`` prints, as wide as standard output: plain text, without spaces at the ends of lines."""
    file = StringIO()
    show(Console(file=file, width=console().width, color_system=None, force_terminal=False, force_jupyter=False))
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())
