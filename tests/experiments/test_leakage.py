"""The view of what features give away, on the smallest study that has it."""

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyfed.base.errors import ConfigError
from polyfed.core.message import Nothing
from polyfed.experiments import leakage as views
from polyfed.experiments.catalogue import find
from polyfed.experiments.inside import Inside
from polyfed.experiments.leakage import leak, shower, shown_share
from polyfed.experiments.reproduce import Job, reproduce
from polyfed.experiments.views import Results


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """The study at smoke scale, without and with a pinned batch."""
    out = tmp_path_factory.mktemp("privacy")
    reproduce(find("fedin/privacy"), "smoke", out, only=["fedin,pin"])
    return Job.load(find("fedin/privacy"), "smoke", out), out


def inside(done: tuple[Job, Path], label: str, round_: int) -> Inside:
    job, out = done
    (cell,) = [cell for cell in job.study.cells() if cell.label == label]
    return Inside(cell.run_dir(out), round_)


def test_the_page_has_leakage_beside_accuracy_and_pictures(done: tuple[Job, Path]) -> None:
    """Catches a kept round that is left out, and numbers without a control."""
    page = done[1] / "fedin" / "privacy.smoke"
    rows = list(csv.DictReader((page / "leakage.csv").read_text().splitlines()))
    assert [(row["algorithm"], row["round"]) for row in rows] == [
        (label, round_) for label in ("fedin", "pin") for round_ in "12"
    ]
    for row in rows:
        assert 0 <= float(row["accuracy"]) <= 1 >= float(row["dcor"]) > 0
        assert 5 < float(row["blind_psnr"]) < 30
        assert all(float(row[f"{kind}_ssim"]) < 1 for kind in ("decoder", "search"))
    assert (page / "leakage.png").read_bytes().startswith(b"\x89PNG")
    # Eight examples of the client's 24 in each of two rounds; a pinned batch is the same.
    assert [float(row["shown"]) for row in rows][::2] == pytest.approx([8 / 24, 8 / 24])
    assert float(rows[3]["shown"]) == pytest.approx(8 / 24)
    assert 8 / 24 < float(rows[1]["shown"]) <= 16 / 24


def test_a_picture_names_its_round_and_client(done: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches images of an earlier round under the numbers of the last."""
    job, out = done

    def found(look: Inside, _: object) -> tuple[dict[str, float], int]:
        return defaultdict(float, dcor=0.5), look.kept.round

    monkeypatch.setattr(views, "leak", found)
    view = views.leakage(Results(job.study, job.study.cells(), out))
    assert view.pictures == {f"digits, IID, {label}\nround 2, client 0": 2 for label in ("fedin", "pin")}


def test_the_images_are_those_whose_features_were_sent(done: tuple[Job, Path]) -> None:
    """Catches rows of another round or client, weights before training, and pixels that are not those of the data."""
    look = inside(done, "fedin", 1)
    ((client, upload),) = look.uploads(look.some(1)[:1]).items()
    local, algorithm = look.federation.local(client, 2), look.kept.algorithm
    pair, data = upload.pairs[0], local.train
    rows = algorithm.rows(Nothing(), local)  # type: ignore[attr-defined]
    images = data.dataset.x[data.rows[rows]].float() / 255  # type: ignore[attr-defined]
    local.models["model"].train(False)
    show = shower(algorithm, local, upload.layers, look.federation.rng)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(show(images), pair.s_in, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(show(images.flip(0)), pair.s_in, rtol=0.1)
        noisy: Any = replace(algorithm, noise=0.5, half=True)  # type: ignore[type-var]
        draws = shower(noisy, local, upload.layers, look.federation.rng)
        one, other = draws(images), draws(images)
        assert one.dtype == torch.float16
        assert not torch.equal(one, other)
        plain = shower(noisy.seen_plainly(), local, upload.layers, look.federation.rng)
        assert torch.equal(plain(images), show(images))
    numbers, pictures = leak(look, done[0].study.attack)
    assert pictures.shape == (3, 6, 1, 16, 16)
    assert torch.allclose(torch.from_numpy(pictures[0]), images[:6], atol=1e-6)
    with torch.no_grad():
        logits = local.models["model"].classify(upload.layers, pair.s_out)
    assert numbers["label_accuracy"] == float((logits.argmax(1) == data.labels[rows]).double().mean())


def test_what_was_shown_is_counted_from_the_draws_of_the_run(done: tuple[Job, Path]) -> None:
    look = inside(done, "fedin", 2)
    rows = [
        {int(row) for round_ in (1, 2) for row in look.kept.algorithm.rows(Nothing(), look.federation.local(k, round_))}  # type: ignore[attr-defined]
        for k in range(4)
    ]
    assert shown_share(look) == pytest.approx(sum(map(len, rows)) / 4 / 24)


def test_features_of_other_data_than_images_are_refused(done: tuple[Job, Path]) -> None:
    """Catches pixels without a range, for which decibels mean nothing."""
    look = inside(done, "fedin", 1)
    data = replace(look.federation.dataset, x=look.federation.dataset.x.float(), declared="image")
    look.__dict__["federation"] = replace(look.federation, dataset=data)
    with pytest.raises(ConfigError, match="images of 8 bits"):
        leak(look, done[0].study.attack)
