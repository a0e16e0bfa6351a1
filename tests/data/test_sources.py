"""Names and options of data sets."""

from __future__ import annotations

import pytest

from polyfed.base.errors import ConfigError
from polyfed.data.sources import load_dataset


def test_unknown_names_and_options(tmp_path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
        load_dataset("cifar-10")
    with pytest.raises(ConfigError) as caught:
        load_dataset("digits", path=tmp_path, colour=True)
    assert len(caught.value.faults) == 2
    for name in ("npz", "csv"):
        with pytest.raises(ConfigError, match="path"):
            load_dataset(name)
    for size in (3, 2000, 31.5, True):
        with pytest.raises(ConfigError, match="image_size"):
            load_dataset("digits", image_size=size)
