"""The algorithm's own table: typed values, every fault, and classes of one's own."""

import sys

import pytest

from polyfed.base.errors import ConfigError
from polyfed.config import Config, algorithm_fields, canonical_name, load_algorithm


def test_another_algorithm_takes_its_own_keys_and_keeps_common_ones_of_its_own_kind():
    config = Config.parse(
        {
            "algorithm": {"name": "fedmrl", "rep_dim": 50},
            "algorithms": {"fiarse": {"gate": "frozen"}, "half": {"name": "fedmrl", "mrl": False}},
            "controls": {"alone": {"name": "standalone"}},
            "run": {"controls": True},
        }
    )
    assert config.with_algorithm("fiarse").algorithm.keys == {"gate": "frozen"}
    assert config.with_algorithm("fed-mrl", {"share": False}).algorithm.keys == {"rep_dim": 50, "share": False}
    half = config.with_algorithm("half")
    assert (half.algorithm.name, half.algorithm.keys) == ("fedmrl", {"rep_dim": 50, "mrl": False})
    assert not half.run.controls
    assert half.controls == {}


def test_load_algorithm_gives_typed_values_and_lists_every_fault():
    algorithm = load_algorithm("fedmrl", {"weights": [1, 2], "rep_dim": 20})
    assert (algorithm.weights, algorithm.rep_dim) == ((1.0, 2.0), 20)
    with pytest.raises(ConfigError) as caught:
        load_algorithm("fedmrl", {"weigths": [1, 2], "rep_dim": "20"})
    assert len(caught.value.faults) == 2
    assert "did you mean 'weights'?" in str(caught.value)
    assert algorithm_fields(type(algorithm))["rep_dim"].default == 100
    assert canonical_name("local") == "standalone"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "algorithm.exits: got 0; expected more than 0 or a list"),
        (2.5, "algorithm.exits: got 2.5; expected a whole number or a list"),
        ("layer1", "algorithm.exits: got 'layer1'; expected a whole number or a list"),
    ],
)
def test_a_number_or_names_is_one_key(value, text):
    """Catches an error for each alternative of a key, with names that no configuration has."""
    with pytest.raises(ConfigError) as caught:
        load_algorithm("scalefl", {"exits": value})
    assert caught.value.faults == (text,)


def test_a_network_as_a_table_is_written_as_a_text_where_a_key_takes_one():
    net = {"name": "nets:Net", "classifier": "head", "width": 16}
    with pytest.raises(ConfigError, match=r'expected a string, such as "nets:Net\(classifier=head, width=16\)"'):
        load_algorithm("fedmrl", {"auxiliary": net})
    with pytest.raises(ConfigError, match=r"expected a string$"):
        load_algorithm("fedmrl", {"auxiliary": {"width": 16}})


def test_what_a_class_refuses_is_told_key_by_key():
    """Catches faults of combined keys that come one at a time, or without their key."""
    with pytest.raises(ConfigError) as caught:
        load_algorithm("fedin", {"every": "never", "noise": 0.5, "align": "none", "granularity": "whole"})
    assert sorted(text.split(":")[0] for text in caught.value.faults) == [
        *("algorithm.align", "algorithm.granularity", "algorithm.noise"),
    ]


def test_a_key_that_its_switch_turns_off_is_refused():
    """Catches a number that is set and that nothing reads; a resolved configuration has all keys at their defaults."""
    with pytest.raises(ConfigError) as caught:
        load_algorithm("depthfl", {"feddyn": False, "alpha": 0.2, "distill": False, "ramp": 30})
    assert caught.value.faults == (
        "algorithm.alpha: got 0.2, which has no effect: feddyn is off; leave it at 0.1",
        "algorithm.ramp: got 30, which has no effect: distill is off; leave it at 300",
    )
    assert load_algorithm("depthfl", {"feddyn": False, "alpha": 0.1, "distill": False, "ramp": 300})
    assert load_algorithm("depthfl", {"alpha": 0.2, "ramp": 30})


OWN = """
from dataclasses import dataclass
from polyfed.algorithms.standalone import Standalone

@dataclass(frozen=True, kw_only=True)
class Mine(Standalone):
    strength: float
    def __post_init__(self):
        if self.strength < 0:
            raise ValueError("strength must not be negative")

class Loose(Standalone.__bases__[0]):
    init_server = server_round = client_round = message_for = predictor_parts = None
"""


@pytest.mark.parametrize(
    ("name", "keys", "what"),
    [
        ("my_own:Mine", {}, "algorithm.strength: missing"),
        ("my_own:Mine", {"strenght": 1}, "did you mean 'strength'? it takes: strength\nalgorithm.strength: missing"),
        ("my_own:Mine", {"strength": -1}, "strength must not be negative"),
        ("my_own:Mien", {}, "did you mean 'Mine'?"),
        ("my_own:Loose", {}, "no frozen dataclass"),
        ("my_broken:A", {}, "importing 'my_broken' raised ZeroDivisionError"),
        ("my_needy:A", {}, "module 'my_needy' imports 'no_such_thing', which is not installed"),
        ("my_own:", {}, "expected package.module:attribute"),
    ],
)
def test_an_algorithm_of_ones_own(name, keys, what, tmp_path, monkeypatch):
    (tmp_path / "my_own.py").write_text(OWN)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    (tmp_path / "my_needy.py").write_text("import no_such_thing")
    monkeypatch.chdir(tmp_path)  # the working directory is searched
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    for module in ("my_own", "my_broken", "my_needy"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    try:
        if name.endswith("Mine"):
            assert load_algorithm(name, {"strength": 2}).strength == 2.0
        with pytest.raises(ConfigError) as caught:
            load_algorithm(name, keys)
        assert what in str(caught.value)
    finally:
        sys.modules.pop("my_own", None)
