"""What a paper says, and how far a study's numbers are from it."""

from pathlib import Path

import pytest
from studies import study

from polyfed.base.errors import ConfigError
from polyfed.experiments.known import Known
from polyfed.experiments.reproduce import reproduce


def test_what_the_paper_says_needs_a_source(tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text('[s]\n[[s.values]]\nalgorithm = "fedavg"\naccuracy = 0.5\ntag = "P"\n')
    path = study(tmp_path / "s.toml", source="A paper", seeds=[0])
    reproduce(path, out=tmp_path)
    beside = (tmp_path / "s" / "page.md").read_text().split("## Beside the paper")[1]
    assert "| 50.00 % | the paper's text |" in beside
    elsewhere = '[[s.values]]\nsetting = "elsewhere"\nalgorithm = "fedavg"\naccuracy = 0.25\ntag = "P"\n'
    (tmp_path / "known.toml").write_text(f"[s]\n{elsewhere}{elsewhere}")
    reproduce(path, out=tmp_path)
    beside = (tmp_path / "s" / "page.md").read_text().split("## Beside the paper")[1]
    assert "Known, too, are 2 accuracies of settings or rows that this page does not have." in beside
    assert "25.00 %" not in beside
    (tmp_path / "known.toml").write_text(f"[t]\n{elsewhere.replace('s.', 't.')}")
    reproduce(
        study(tmp_path / "t.toml", source="A paper", settings={"elsewhere, one seed": {"seeds": [0]}}), out=tmp_path
    )
    assert (
        "| elsewhere, one seed | fedavg |" in (tmp_path / "t" / "page.md").read_text().split("## Beside the paper")[1]
    )
    (tmp_path / "known.toml").write_text('[s]\n[[s.claims]]\ntext = "better"\ntag = "REC"\n')
    with pytest.raises(ConfigError, match="tag 'REC'; expected one of P, ABS"):
        Known.load(tmp_path / "known.toml", "s")
    assert Known.load(tmp_path / "known.toml", "other") == Known()
