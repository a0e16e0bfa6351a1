"""Names of objects that a program gives."""

from __future__ import annotations

import json
import sys

import pytest

from polyfed.base import given
from polyfed.base.errors import ModelError
from polyfed.base.imports import importable, load_attribute


def made() -> type:
    class Net:
        pass

    return Net


def test_an_object_keeps_its_name_and_two_of_one_name_are_two() -> None:
    """Catches a cell of a notebook that is run again, whose new class is taken for the old one by a cache."""
    first, second = made(), made()
    one, other = given.give(first, "Net"), given.give(second, "Net")
    assert one != other
    assert given.give(first, "Net") == one
    for name, value in ((one, first), (other, second)):
        assert load_attribute(name, "model", ModelError, callable) is value
    tokens = {found.token for name in (one, other) if (found := given.find(name)) is not None}
    assert len(tokens) == 2


@pytest.mark.parametrize(("wish", "plain"), [("<lambda>", "lambda"), ("3d", "d"), ("<>", "Given")])
def test_a_name_is_an_identifier(wish: str, plain: str) -> None:
    name = given.give(object(), wish)
    assert name.startswith(f"python:{plain}")
    assert name.partition(":")[2].isidentifier()


def test_an_object_of_another_process_is_not_found() -> None:
    with pytest.raises(ModelError, match="model 'x': a program gave this object, whose name only the Python process"):
        load_attribute("python:NeverGiven", "model 'x'", ModelError, callable)


def test_what_a_module_file_holds_has_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a path that leads to another object, or to the module of another script."""
    assert importable(json.JSONEncoder) == "json.encoder:JSONEncoder"
    assert importable(json.dumps) == "json:dumps"
    assert importable(made()) == ""
    assert importable(lambda: None) == ""
    assert importable(3) == ""
    replaced = type("JSONEncoder", (), {"__module__": "json.encoder"})  # as after a reload
    assert importable(replaced) == ""
    scripted = type("Net", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Net", scripted, raising=False)
    assert importable(scripted) == ""
