"""Pictures of made-up results."""

from dataclasses import replace
from pathlib import Path

from polyfed.experiments import views
from polyfed.experiments.figures import draw


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
    assert not (tmp_path / "none.png").exists()
