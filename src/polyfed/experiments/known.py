"""The results of a paper's item, each with its source; results that could not be read are listed as missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from polyfed.base.errors import ConfigError
from polyfed.config.faults import by_key, dotted, sentence
from polyfed.config.sections import Section
from polyfed.config.toml import read_toml

#: Tag of a source -> its meaning. Values from memory have no tag and are not listed.
TAGS = {
    "P": "the paper's text",
    "ABS": "the paper's abstract",
    "SUM": "summaries of the paper that quote it",
    "CODE": "the authors' code",
    "REPO": "a page or picture in the authors' repository",
    "PIC": "read off the paper's picture, right to about a point",
    "SIB": "the sibling paper, InCo Aggregation (ICLR 2024): not this paper's",
    "CALC": "computed from the layers that the authors' code gives",
    "OWN": "computed from the paper's own numbers",
}


class Claim(Section):
    """A statement of the paper, in our words.

    Args:
        text: the statement.
        tag: its source, a key of `TAGS`.
    """

    text: str
    tag: str


class Value(Section):
    """A number of the paper.

    Args:
        setting: title of the setting in the study.
        algorithm: label of the algorithm in the study.
        of: what it is the accuracy of; "" for the mean over clients, else a name of the view "sizes", such as
            "Global" or "Local at 1/64".
        accuracy: accuracy, as a fraction.
        tag: its source, a key of `TAGS`.
    """

    setting: str = ""
    algorithm: str
    of: str = ""
    accuracy: Annotated[float, Field(ge=0, le=1)]
    tag: str


class Known(Section):
    """All known results of an item.

    Args:
        missing: results of the paper that could not be read; "" if there are none.
        claims: the statements.
        values: the accuracies.
    """

    missing: str = ""
    claims: tuple[Claim, ...] = ()
    values: tuple[Value, ...] = ()

    @classmethod
    def load(cls, path: Path, item: str) -> Known:
        """Read an item from ``known.toml``; without such a file the result is empty.

        Raises:
            ConfigError: the file is not valid, or a tag is not in `TAGS`.
        """
        if not path.exists():
            return cls()
        try:
            known = cls.model_validate(read_toml(path).get(item, {}))
        except ValidationError as error:
            raise ConfigError(
                *(f"{path}: {dotted(item, *where)}: {sentence(details)}" for where, details in by_key(error).items())
            ) from error
        if odd := [one.tag for one in (*known.claims, *known.values) if one.tag not in TAGS]:
            raise ConfigError(f"{path}: {item}: got tag {odd[0]!r}; expected one of {', '.join(TAGS)}")
        return known
