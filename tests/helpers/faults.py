"""The faults of a configuration."""

import textwrap

import pytest

from polyfed.base.errors import ConfigError
from polyfed.config import Config


def refused(text, tmp_path, overrides=()):
    """The faults of a TOML text."""
    path = tmp_path / "a.toml"
    path.write_text(textwrap.dedent(text))
    with pytest.raises(ConfigError) as caught:
        Config.load(path, overrides)
    return list(caught.value.faults)


def only(faults, *parts):
    """The one fault, which has all ``parts``."""
    assert len(faults) == 1, faults
    for part in parts:
        assert part in faults[0], (part, faults[0])
