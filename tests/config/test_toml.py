"""TOML: keys on the command line are read, tables are written and read back."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyfed.base.errors import ConfigError
from polyfed.comparison.specs import AlgorithmEntry
from polyfed.config.toml import apply, parse_override, to_toml


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.rounds=5", (("run", "rounds"), 5)),
        ("run.device=cuda:1", (("run", "device"), "cuda:1")),
        ("algorithm.share=false", (("algorithm", "share"), False)),
        ("train.lr = 1e-3", (("train", "lr"), 0.001)),
        ('clients.models=["cnn1", "mlp"]', (("clients", "models"), ["cnn1", "mlp"])),
        ("clients.models=[cnn1,mlp]", (("clients", "models"), ["cnn1", "mlp"])),
        (
            "clients.models=[resnet18(norm=group, width=8),mlp]",
            (("clients", "models"), ["resnet18(norm=group, width=8)", "mlp"]),
        ),
        ('partition={kind="iid"}', (("partition",), {"kind": "iid"})),
        ("run.threads=none", (("run", "threads"), None)),
        ('algorithms."a.b:C".x=1', (("algorithms", "a.b:C", "x"), 1)),
        ("data.path=/a=b", (("data", "path"), "/a=b")),
        ("data.path=", (("data", "path"), "")),
    ],
)
def test_overrides(override, expected):
    assert parse_override(override) == expected


@pytest.mark.parametrize("override", ["run.rounds", "=3", "run rounds=3", "run..rounds=3", "a=1\nb=2"])
def test_overrides_that_are_none(override):
    if override == "a=1\nb=2":  # a line break makes no second key
        assert parse_override(override) == (("a",), "1\nb=2")
    else:
        with pytest.raises(ConfigError, match=r"expected section\.key=value"):
            parse_override(override)


def test_none_is_a_value_of_an_algorithms_key_that_has_it() -> None:
    """Catches a run under a label such as ``fedin:align=none`` that plays the default."""
    tables = {"algorithm": {"name": "fedin", "align": "always", "weighting": "uniform"}, "run": {"name": "fedin"}}
    for override in ("algorithm.align=none", "algorithm.weighting=none", "run.threads=none", "run.name=none"):
        apply(tables, *parse_override(override))
    assert tables == {"algorithm": {"name": "fedin", "align": "none"}, "run": {}}
    assert AlgorithmEntry.parse("fedin:align=none:weighting=none").keys == {"align": "none"}


keys = st.text(min_size=1, max_size=5).filter(lambda key: "\n" not in key and key.isprintable())
values = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(keys, st.dictionaries(keys, values, min_size=1, max_size=4), max_size=3))
def test_the_toml_writer_is_read_back_by_tomllib(tables):
    def without_empty_tables(value):
        if not isinstance(value, dict):
            return value
        kept = {key: without_empty_tables(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item != {}}

    assert without_empty_tables(tomllib.loads(to_toml(tables))) == without_empty_tables(tables)
