"""Views of made-up lines, and of configurations."""

from pathlib import Path

from studies import TINY, study

from polyfed.comparison.statistics import Line
from polyfed.experiments.reproduce import below, undecided
from polyfed.experiments.study import Study
from polyfed.experiments.views import Results, protocol


def line(label: str, *means: float) -> Line:
    return Line("", label, dict(enumerate(means)), {}, 0, None)


def test_what_is_below_two_standard_errors() -> None:
    main = line("a", 0.50, 0.60, 0.70)
    near, far = line("near", 0.40, 0.65, 0.72), line("far", 0.30, 0.41, 0.49)
    (told,) = undecided([main, near, far])
    assert told.startswith("a minus near (+1.0 ± 4.6)")  # differences .10, -.05, -.02: deviation 0.0794 / sqrt(3)
    assert "far" not in told
    between = line("between", 0.40, 0.60, 0.68)  # differences .10, 0, .02: 1.3 standard errors
    assert undecided([main, between])[0].startswith("a minus between (+4.0 ± 3.1)")
    assert undecided([line("a", 0.5), line("b", 0.4)]) == ["one seed, so no standard error: a minus b (+10.0)"]
    assert undecided([main, far]) == ["none"]
    assert undecided([main, line("twin", *main.means.values())]) == [
        "a minus twin (+0.0 ± 0.0); points ± standard error of the paired mean"
    ]
    assert undecided([main, line("open")]) == undecided([main]) == ["nothing to compare yet"]


def test_hyper_parameters_are_those_of_each_entry(tmp_path: Path) -> None:
    """Catches a key that is False or 0 and left out, a selection or a schedule left out, and `inco`."""
    entries = {
        "cut": {"name": "heterofl", "scaler": False, "inco": "paper", "clients": {"selection": "largest"}},
        "soft": {"name": "scalefl", "kd_weight": 0.0, "train": {"schedule": "cosine"}},
    }
    path = study(tmp_path / "mine.toml", algorithms=[], show=["protocol"], entries=entries, config=TINY)
    view = protocol(Results(Study.load(path), (), tmp_path))
    cut, soft = (dict(zip(view.headings, row, strict=True)) for row in view.rows)
    assert (cut["selection"], cut["schedule"]) == ("largest", "constant")
    assert (soft["selection"], soft["schedule"]) == ("uniform", "kind = cosine, rounds = 2")
    assert {"scaler = False", "inco = paper"} <= {*cut["own keys"].split(", ")}
    assert "kd_weight = 0.0" in soft["own keys"]
    assert "unseen_capacities" not in cut["own keys"]
    assert "constant" not in view.caption


def test_a_page_has_the_section_of_undecided_differences_where_accuracies_are_compared() -> None:
    """Catches an empty section, and accuracies as the result of a page about gradients."""
    two = [line("a", 0.5), line("b", 0.4)]
    assert below(["sizes"], two) == [
        "## Below two standard errors\n\n* one seed, so no standard error: a minus b (+10.0)"
    ]
    assert below(["sizes"], two[:1]) == below(["sizes"], []) == below(["convergence"], two) == []
