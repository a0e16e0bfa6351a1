from __future__ import annotations

import subprocess
import sys
from keyword import iskeyword

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.base.errors import ModelError
from polyfed.models.catalogue import MODELS, OPTIONS, ModelSpec

words = st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)


keys = words.filter(lambda word: word != "name" and not iskeyword(word))


@settings(max_examples=50, deadline=None)
@given(words, st.dictionaries(keys, values, max_size=3))
def test_text_and_table_are_read_back(name: str, options: dict[str, object]) -> None:
    spec = ModelSpec.parse({"name": name, **options})
    assert ModelSpec.parse(str(spec)) == spec
    assert hash(ModelSpec.parse(spec)) == hash(spec)


def test_options_are_added_or_replaced() -> None:
    """Catches an old option that stays, and an option of one's own called ``name`` that becomes the network's name."""
    spec = ModelSpec.parse("cnn5(rep_dim=100)")
    assert spec.having(rep_dim=50) == ModelSpec.parse("cnn5(rep_dim=50)")
    own = ModelSpec.parse("mynet:build(name=b)")
    assert str(own.having(width=3)) == "mynet:build(name=b, width=3)"


def test_how_a_model_is_asked_for() -> None:
    assert ModelSpec.parse("cnn5") == ModelSpec("cnn5")
    spec = ModelSpec.parse({"name": "resnet18", "norm": "group"})
    assert spec == ModelSpec("resnet18", (("norm", "group"),)) == ModelSpec.parse("resnet18(norm=group)")
    assert str(spec) == "resnet18(norm=group)"
    assert ModelSpec.parse({"name": "mlp", "hidden": [8, 4]}).options == (("hidden", (8, 4)),)
    assert str(ModelSpec.parse("my.nets:Net( classifier='head.0' ,  b=True)")) == (
        "my.nets:Net(b=True, classifier='head.0')"
    )


@pytest.mark.parametrize(
    "text", ["", "resnet18(norm", "resnet18(group)", "mlp(hidden=f(3))", "mlp(**x)", "(a=1)", "a(b=1)c"]
)
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(ModelError, match="cannot read the model"):
        ModelSpec.parse(text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"norm": "group"}, "as a model; expected a name, such as"),
        (17, "got 17 as a model; expected a name, or a table with a name"),
        ({"name": "mlp", "hidden": {"a": 1}}, "option 'hidden' is {'a': 1}, expected a string"),
    ],
)
def test_tables_that_are_wrong(value: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet81", r"unknown model 'resnet81'; did you mean 'resnet8'.*Known: cnn1, cnn2.*package\.module"),
        (
            "resnet18(nrom=group)",
            r"no option 'nrom'; did you mean 'norm'\? It takes: norm \(default batch\), width",
        ),
        ("resnet18(norm=layer)", "option 'norm' is layer, expected one of batch, group, static"),
        ("resnet18(width=0)", "option 'width' is 0, expected a positive integer"),
        ("resnet18(width=True)", "expected a positive integer"),
        ("mlp(hidden=3)", r"option 'hidden' is 3, expected the widths .* \(200, 100\)"),
        ("mlp(hidden=(3, -1))", "expected the widths"),
        ("cnn1(rep_dim=1.5)", "option 'rep_dim' is 1.5, expected a positive integer"),
    ],
)
def test_names_and_options_are_checked(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.parse(text).check()


def test_all_of_the_catalogue_passes_its_own_check() -> None:
    for name, summary in MODELS.items():
        ModelSpec(name, tuple(sorted(OPTIONS[name].items()))).check()
        assert len(summary) < 100


def test_the_catalogue_does_not_load_torch() -> None:
    code = "import sys; import polyfed.models.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
