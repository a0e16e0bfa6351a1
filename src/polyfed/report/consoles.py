"""Where a person reads text: a terminal, a file, a notebook, or a string. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import IO

from rich.console import Console


def console(file: IO[str] | None = None) -> Console:
    """Return standard output; if it is no terminal, it is wide enough for any table. A notebook gets plain text.

    Args:
        file: takes the place of standard output; its width is that of standard output.
    """
    here = Console(force_jupyter=False)
    if here.is_terminal and file is None:
        return here
    return Console(file=file, width=here.width if here.is_terminal else 10_000, force_jupyter=False)


def text(show: Callable[[Console], None]) -> str:
    """Return what ``show`` prints, as plain text without spaces at the ends of lines."""
    file = StringIO()
    show(console(file))
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())
