"""Which networks may take part together."""

import pytest
from torch import nn

from polyfed.base.errors import ModelError
from polyfed.models.compatibility import check_layers_fit
from polyfed.models.split import SplitModel


def test_fedin_refuses_networks_with_nothing_between_the_cuts() -> None:
    """Catches a run that dies in its second round, when the first IN step has nothing to train."""
    make = lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))  # noqa: E731
    model = SplitModel("thin", make, input_shape=(4,), classifier="2", extractor="1")
    with pytest.raises(ModelError, match="'thin' has nothing to train between its cuts"):
        check_layers_fit({"thin": model})
