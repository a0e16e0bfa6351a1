"""Where text goes."""

import builtins
import sys

import pytest

from polyfed.report.consoles import console, text


class ZMQInteractiveShell:
    """What rich takes for a notebook."""


def test_a_notebook_gets_plain_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a line of progress that becomes a block of HTML of its own, or needs IPython."""
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    console().print("round 1", soft_wrap=True)
    assert capsys.readouterr().out == "round 1\n"
    assert text(lambda where: where.print("a " * 3000, soft_wrap=True)) == ("a " * 3000).rstrip()


def test_text_has_no_colours_and_no_spaces_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert text(lambda where: where.print("12 %   \nb  ")) == "12 %\nb"
