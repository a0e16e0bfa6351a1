from __future__ import annotations

import sys
from pathlib import Path

import pytest

from polyfed.base.errors import ModelError
from polyfed.models.catalogue import ModelSpec
from polyfed.models.zoo import build


def own(spec: str, num_classes: int = 3) -> object:
    return build(spec, input_shape=(6,), num_classes=num_classes)


def test_your_own_model_with_cuts_and_options() -> None:
    spec = ModelSpec.parse({"name": "peculiar_nets:Picky", "width": 8, "classifier": "fc", "extractor": "a"})
    model = build(spec, input_shape=(6,), num_classes=5)
    assert (model.num_classes, model.rep_dim, model.s_in_shape) == (5, 8, (8,))
    assert model.name == "peculiar_nets:Picky(classifier=fc, extractor=a, width=8)"
    assert model is build(str(spec), input_shape=(6,), num_classes=5)


def test_your_own_model_that_takes_nothing() -> None:
    model = build("peculiar_nets:Plain", input_shape=(6,), num_classes=3)
    with pytest.raises(ModelError, match="no classifier cut"):
        _ = model.rep_dim


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_package.nets:Net", "no module 'no_such_package' in the working directory.*PYTHONPATH"),
        ("peculiar_nets.nets:Net", r"no module 'peculiar_nets\.nets'"),
        ("peculiar_nets:Piky", "peculiar_nets has no 'Piky'; did you mean 'Picky'. it has 'Picky'"),
        ("peculiar_nets:Broken", "constructor raised ValueError: no luck today"),
        ("peculiar_nets:Stubborn", "returns 7 columns, expected 3, one per class; give its constructor"),
        ("peculiar_nets:not_callable", "is a int, expected a class or function"),
        ("peculiar_nets:Picky(widht=3)", "no option 'widht'; did you mean 'width'. It takes: .*width"),
        ("peculiar_nets:Picky(classifier=fd)", "no submodule 'fd' to be its classifier; nearest: 'fc'"),
        ("peculiar_nets:Pi cky", "expected package.module:attribute"),
    ],
)
def test_what_goes_wrong_is_told_apart(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        own(spec)


def test_a_module_that_fails_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "polyfed_test_needy.py").write_text("import surely_not_installed\n")
    (tmp_path / "polyfed_test_rude.py").write_text("raise RuntimeError('go away')\n")
    with pytest.raises(ModelError, match="imports 'surely_not_installed', which is not installed"):
        own("polyfed_test_needy:Net")
    with pytest.raises(ModelError, match="importing 'polyfed_test_rude' raised RuntimeError: go away"):
        own("polyfed_test_rude:Net")
    assert "polyfed_test_rude" not in sys.modules
