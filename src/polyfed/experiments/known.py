"""What a paper says of an item, each thing with where it was read; what nobody could read is said to be missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from polyfed.base.errors import ConfigError
from polyfed.config.faults import by_key, dotted, sentence
from polyfed.config.sections import Section
from polyfed.config.toml import read_toml

#: Where a thing was read -> what the tag stands for. Recollections, and values read off pictures, have no tag.
TAGS = {
    "P": "the paper's text",
    "ABS": "the paper's abstract",
    "SUM": "summaries of the paper that quote it",
    "CODE": "the authors' code",
    "CALC": "computed from the layers that the authors' code gives",
}


class Claim(Section):
    """A sentence of the paper's, in our words.

    Args:
        text: what it says.
        tag: where it was read; a key of `TAGS`.
    """

    text: str
    tag: str


class Value(Section):
    """A number of the paper's.

    Args:
        setting: title of the setting here.
        algorithm: label here.
        accuracy: fraction.
        tag: where it was read.
    """

    setting: str = ""
    algorithm: str
    accuracy: Annotated[float, Field(ge=0, le=1)]
    tag: str


class Known(Section):
    """All that is known of an item.

    Args:
        missing: what the paper has and nobody could read; "" if nothing.
        claims: sentences.
        values: accuracies.
    """

    missing: str = ""
    claims: tuple[Claim, ...] = ()
    values: tuple[Value, ...] = ()

    @classmethod
    def load(cls, path: Path, item: str) -> Known:
        """What ``known.toml`` has of an item; nothing where there is no such file.

        Raises:
            ConfigError: it is not as it should be, or a tag is not one of `TAGS`.
        """
        if not path.exists():
            return cls()
        try:
            known = cls.model_validate(read_toml(path).get(item, {}))
        except ValidationError as error:
            raise ConfigError(
                *(f"{path}: {dotted(item, *where)}: {sentence(details)}" for where, details in by_key(error).items())
            ) from error
        odd = [one.tag for one in (*known.claims, *known.values) if one.tag not in TAGS]
        if odd:
            raise ConfigError(f"{path}: {item}: tag {odd[0]!r}; expected one of {', '.join(TAGS)}")
        return known
