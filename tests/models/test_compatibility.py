"""Which networks may take part together."""

import pytest
from torch import Tensor, nn

from polyfed.base.errors import ModelError
from polyfed.models.compatibility import check_layers_fit, check_names_fit
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build


def test_fedin_refuses_networks_with_nothing_between_the_cuts() -> None:
    """Catches a run that dies in its second round, when the first IN step has nothing to train."""
    make = lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))  # noqa: E731
    model = SplitModel("thin", make, input_shape=(4,), classifier="2", extractor="1")
    with pytest.raises(ModelError, match="'thin' has nothing to train between its cuts"):
        check_layers_fit({"thin": model})


class Some(nn.Module):
    """Layers of these names, and others that no other network has."""

    def __init__(self, names: str, width: int = 4) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4) if name != names[-1] else nn.Linear(4, width))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def some(names: str, width: int = 4) -> SplitModel:
    return SplitModel(names, lambda: Some(names, width), input_shape=(4,), classifier=names[-1])


def test_models_of_a_chain_share_names() -> None:
    """Catches a rule that asks each model to share a layer with every other, and one that lets a lonely model pass."""
    chain = {names: some(names) for names in ("ab", "bc", "cd")}
    check_names_fit(chain)
    check_names_fit({"ab": chain["ab"]})
    with pytest.raises(ModelError, match=r"'xy' shares no layer by name with 'ab', 'bc'.*one family"):
        check_names_fit({"ab": chain["ab"], "bc": chain["bc"], "xy": some("xy")})
    with pytest.raises(ModelError, match=r"layer 'b\.weight' is \(4, 4\) in 'ab' but \(5, 4\) in 'ab, wide'"):
        check_names_fit({"ab": chain["ab"], "ab, wide": some("ab", 5)})


def test_first_layers_of_unlike_columns_are_not_averaged() -> None:
    """Catches weights of one column that are averaged with those of another, as both layers have one name and shape."""
    nets = [build(f"mlp(hidden=(4,), columns={c})", input_shape=(5,), num_classes=2) for c in ((0, 1), (0, 1), (0, 3))]
    check_names_fit({"a": nets[0], "b": nets[1]})
    with pytest.raises(ModelError, match=r"what the first layer reads is \(0, 1\) in 'a' but \(0, 3\) in 'c'"):
        check_names_fit({"a": nets[0], "b": nets[1], "c": nets[2]})
