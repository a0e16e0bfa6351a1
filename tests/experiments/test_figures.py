"""Pictures of made-up results."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from polyfed.experiments import views
from polyfed.experiments.figures import draw
from polyfed.report.curves import COLOURS


def test_pictures_are_drawn_from_made_up_results(tmp_path: Path) -> None:
    """Catches a picture that stumbles over what was not reached, one seed, or more algorithms than colours."""
    labels = [f"algorithm {i}" for i in range(12)]
    rows = {
        "accuracy": [("s", label, 0.5, None, 1, 0.5) for label in labels],
        "curves": [("s", label, n, 0.1 * n, None) for label in labels for n in range(3)],
        "targets": [("s", label, 0.9, 1, 0, *[None] * 6) for label in labels],
        "histogram": [("s", label, size, 0.9, 0.95, 2) for label in labels for size in (1.0, 0.25)],
        "spent": [("s", label, n, None, None, 10 * n, 0.1 * n, None) for label in labels for n in range(3)],
        "exploration": [("", "a", size, 0, 1.0, None) for size in (1.0, 0.01)],
        "convergence": [("", label, n, 0.5, 0.5, 9.0, 1.0, 0.0, 0.0) for label in labels for n in (0, 1)],
        "grid": [("", label, "kind", value, 0.5, None) for label in labels for value in ("iid", [{"name": "mlp"}])],
    }
    for name, content in rows.items():
        view = views.View(name, "", (), content)
        assert draw(view, tmp_path / f"{name}.png", "Title")
        assert draw(replace(view, metric="rmse"), tmp_path / f"{name}-of-errors.png", "Title")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert not draw(replace(view, rows=[]), tmp_path / "none.png", "Title")
    silent = views.View("spent", "", (), [("", "standalone", n, None, None, 0, 0.1 * n, None) for n in range(3)])
    assert draw(silent, tmp_path / "silent.png", "Title")
    assert not (tmp_path / "none.png").exists()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be written."""
    kept: list[Figure] = []

    def keep(figure: Figure, *_: object, **__: object) -> None:
        kept.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def along(line: Line2D, axis: int = 0) -> list[float]:
    """The places of a line's points."""
    return np.asarray(line.get_data()[axis], dtype=float).tolist()


def told(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_each_kept_round_has_a_panel(figures: list[Figure], tmp_path: Path) -> None:
    """Catches rounds that cannot be told apart, and pairs of the server among those of clients."""
    rows = [
        ("s", "a", round_, of, stage, 1, value)
        for round_, by in ((1, 0.5), (25, 0.25))
        for of, less in (("clients", 1.0), ("server", 0.5))
        for stage, value in (("one", by * less), ("last", by * less / 2))
    ]
    headings = ("setting", "algorithm", "round", "pairs", "stage", "number", "cka")
    assert draw(views.View("cka", "", headings, rows), tmp_path / "a.png", "Title")
    found = [(one.get_title(), *(along(line, 1) for line in one.lines)) for one in figures[0].axes]
    assert found == [("s, round 1", [0.5, 0.25]), ("s, round 25", [0.25, 0.125])]
    assert told(figures[0]) == ["a"]


def test_networks_are_ticks_beside_their_mean(figures: list[Figure], tmp_path: Path) -> None:
    """Catches a line for each network, which 18 algorithms with five networks make too many of."""
    values = (("mean", 0.25), ("one", 0.0), ("other", 0.5))
    rows = [("s", label, name, value, None, 1, 1.0, 1.0) for label in ("a", "b") for name, value in values]
    headings = ("setting", "algorithm", "network", "mean", "sd", "seeds", "bytes", "macs")
    assert draw(views.View("whole", "", headings, rows), tmp_path / "a.png", "Title")
    (one,) = figures[0].axes
    assert [text.get_text() for text in one.get_yticklabels()] == ["a", "b"]
    assert [place for line in one.lines if line.get_alpha() for place in along(line)] == [0, 50, 0, 50]


def test_attacks_stand_beside_a_guess_without_features(figures: list[Figure], tmp_path: Path) -> None:
    """Catches a picture that does not say what no attack would reach, and numbers of an earlier round."""
    headings = (
        *("setting", "algorithm", "round", "blind_psnr", "decoder_psnr", "search_psnr"),
        *("label_accuracy", "label_majority"),
    )
    rows: list[tuple[Any, ...]] = [("", "a", 1, 9, 9, 9, 0.9, 0.9), ("", "a", 50, 10, 20, 5, 0.75, 0.25)]
    pictures = {"a\nround 50, client 3": np.zeros((3, 2, 1, 4, 4), np.float32)}
    assert draw(views.View("leakage", "", headings, rows, pictures=pictures), tmp_path / "a.png", "Title")
    *images, decibels, labels = figures[0].axes
    assert images[0].get_ylabel() == "a\nround 50, client 3"
    assert [along(line)[0] for line in decibels.lines] == [10, 20, 5]
    assert [along(line)[0] for line in labels.lines] == [0.25, 0.75]
    assert told(figures[0]) == ["no better than guessing", "decoder", "search", "labels"]


def sizes_view(name: str = "sizes") -> views.View:
    """Two algorithms, a variant and one network for all, at sizes of which clients have 1 and 1/4."""
    rows: list[tuple[Any, ...]] = [
        ("s", label, where, size, 0.02, 0.1, 2)
        for label in ("a", "b", "b, dearer")
        for where, places in (("Local", (0.25, 1.0)), ("Global", (0.125, 0.25, 1.0)))
        for size in places
    ]
    return views.View(name, "", (), [*rows, ("s", "all", "Global", None, 0.3, 0.05, 2)])


def test_sizes_of_no_client_are_hollow_and_bars_lie_side_by_side(figures: list[Figure], tmp_path: Path) -> None:
    """Catches bars below 0 or on top of one another, a level line without its deviation, and sizes that look held."""
    draw(sizes_view(), tmp_path / "x.png", "Title")
    _, whole = figures[0].axes
    hollow = [line for line in whole.lines if line.get_markerfacecolor() == "white"]
    assert [round(along(line)[0], 2) for line in hollow] == pytest.approx([0.12, 0.12, 0.13], abs=0.006)
    places = [along(line)[-1] for line in whole.lines if len(along(line)) == 3 and line.get_marker() in ("o", "s", "^")]
    assert len(set(places)) == 3
    paths = [path for bars in whole.collections for path in bars.get_paths()]
    ends = np.concatenate([np.asarray(path.vertices)[:, 1] for path in paths])
    assert min(ends) == 0.0
    band: Any = whole.patches[0]
    assert (band.get_y(), band.get_height()) == pytest.approx((25.0, 10.0))
    assert "one deviation" in whole.get_ylabel()
    assert "a size of no client" in told(figures[0])
    draw(sizes_view("unseen_sizes"), tmp_path / "x.png", "Title")
    assert [one.get_title() for one in figures[1].axes] == ["s, Global"]


def test_a_variant_has_its_algorithms_colour(figures: list[Figure], tmp_path: Path) -> None:
    draw(sizes_view(), tmp_path / "x.png", "Title")
    drawn: list[Any] = [*figures[0].axes[0].containers]
    looks = {c.get_label(): (c.lines[0].get_color(), c.lines[0].get_linestyle()) for c in drawn}
    assert looks["b, dearer"][0] == looks["b"][0] != looks["a"][0]
    assert looks["b, dearer"][1] != looks["b"][1] == looks["a"][1]


def test_an_algorithm_has_its_colour_where_others_are_left_out(figures: list[Figure], tmp_path: Path) -> None:
    """Catches two pages on which one colour is of two algorithms."""
    draw(replace(sizes_view(), algorithms=("a", "none", "b")), tmp_path / "x.png", "Title")
    colours = {c.get_label(): c.lines[0].get_color() for c in figures[0].axes[0].containers}  # type: ignore[attr-defined]
    assert colours == {"a": COLOURS[0], "b": COLOURS[2], "b, dearer": COLOURS[2]}


def test_panels_of_one_seed_speak_of_no_deviation(figures: list[Figure], tmp_path: Path) -> None:
    view = sizes_view()
    more = [("one seed", "a", "Local", 0.25, 0.2, None, 1), ("one seed", "a", "Local", 1.0, 0.3, None, 1)]
    draw(replace(view, rows=[*view.rows, *more]), tmp_path / "x.png", "Title")
    said = {one.get_title(): "one deviation" in one.get_ylabel() for one in figures[0].axes if one.get_title()}
    assert said == {"s, Local": True, "s, Global": True, "one seed, Local": False}


def test_histograms_have_one_height(figures: list[Figure], tmp_path: Path) -> None:
    """Catches panels whose bars cannot be compared, and a bar that touches the frame."""
    rows = [("s", label, 1.0, 0.9, 0.95, count) for label, count in (("a", 2), ("b", 10))]
    draw(views.View("histogram", "", (), rows), tmp_path / "x.png", "Title")
    assert [one.get_ylim() for one in figures[0].axes] == [(0, pytest.approx(10.8))] * 2


def test_bytes_are_drawn_in_logarithms(figures: list[Figure], tmp_path: Path) -> None:
    """Catches settings of few bytes on top of one another at the left, and a place for what was never sent."""
    rows = [(f"{k} steps", "a", n, k * n, 0.1, k * n * 10**6, 0.1 * n, None) for k in (10, 250) for n in (0, 2, 9)]
    draw(views.View("spent", "", (), rows), tmp_path / "x.png", "Title")
    assert [one.get_xscale() for one in figures[0].axes] == ["linear", "log"]
    assert [[along(line) for line in one.lines] for one in figures[0].axes] == [
        [[0, 20, 90], [0, 500, 2250]],
        [[20e6, 90e6], [500e6, 2250e6]],
    ]


def test_each_kept_round_has_a_tick(figures: list[Figure], tmp_path: Path) -> None:
    rows = [("", "a", n, 2.0 / (n or 1), 2.0 / (n or 1), 9.0, 0.5, 1.0, 0.1) for n in (0, 1, 3, 40)]
    draw(views.View("convergence", "", (), rows), tmp_path / "x.png", "Title")
    for one in figures[0].axes:
        assert [tick.get_text() for tick in one.get_xticklabels()] == ["1", "3", "40"]
