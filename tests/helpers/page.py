"""A page of the documentation as a person follows it: its blocks of code in order, under their headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^## (?P<heading>[^\n]*)$|^```(?P<language>\w+)(?P<words>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        heading: the heading of the second level above it; empty before the first.
        language: "console", "python", "text" or "toml".
        words: what stands behind the language.
        text: the content.
    """

    heading: str
    language: str
    words: tuple[str, ...]
    text: str

    def commands(self) -> list[list[str]]:
        """Its lines as the words of commands."""
        return [shlex.split(line) for line in self.text.splitlines()]


def blocks(name: str) -> Iterator[Block]:
    """The blocks of a page, which is named from the root of the repository."""
    heading = ""
    for found in _BLOCK.finditer((ROOT / name).read_text()):
        if found["language"] is None:
            heading = found["heading"]
        else:
            yield Block(heading, found["language"], tuple(found["words"].split()), found["text"])
