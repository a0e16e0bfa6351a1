"""FedTGP: what it sends, its margin, and the gradient where a distance is zero."""

from typing import Any

import pytest
import torch
import toy
from by_class import federation, needs_equal_widths, predicted
from torch import Tensor

from polyfed.algorithms.fedtgp import FedTGP
from polyfed.base.rng import Rng
from polyfed.core.message import size


@pytest.mark.parametrize(("classes", "own", "up", "down"), [(10, 2, 1_000, 5_000), (100, 10, 5_000, 50_000)])
def test_fedtgp_sends_what_the_card_says(classes: int, own: int, up: int, down: int) -> None:
    """Catches the server's embedding and layers on the wire: d numbers by class, both ways."""
    row = torch.zeros(500)
    assert size(FedTGP.Broadcast({str(c): row for c in range(classes)})).values == 4 * down
    assert size(FedTGP.Upload({str(c): row for c in range(own)})).values == 4 * up
    game = toy.play(federation(FedTGP(server_epochs=1)), 2)
    for k in range(3):
        first, second = (played.reports[k] for played in game.played)
        assert second.up.values == 4 * 6 * len(set(game.local(k).train.labels.tolist()))
        assert (first.down.values, second.down.values) == (0, 4 * 6 * 8)


def finite_contrast(algorithm: FedTGP) -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    P = rows.clone().requires_grad_()  # noqa: N806
    value = algorithm.contrast(rows, torch.tensor([0, 1]), P, 0.5)
    value.backward()
    assert bool(torch.isfinite(value))
    assert P.grad is not None
    assert bool(torch.isfinite(P.grad).all())


class Unclamped(FedTGP):
    """The authors' code: the root of a^2 - 2 a b + b^2 as it comes."""

    def contrast(self, rows: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        P, delta = rest  # noqa: N806
        squared = rows.square().sum(1, keepdim=True) - 2 * rows @ P.T + P.square().sum(1)
        distance = squared.sqrt() + delta * torch.eye(len(P))[labels]
        return torch.nn.functional.cross_entropy(-distance, labels)


def test_fedtgp_has_a_gradient_where_a_representation_is_its_prototype() -> None:
    """Catches the root of zero, whose gradient is NaN and goes to every prototype from there."""
    finite_contrast(FedTGP())
    with pytest.raises(AssertionError):
        finite_contrast(Unclamped())


def test_fedtgp_keeps_classes_apart_by_the_largest_distance_of_all_or_of_the_nearest() -> None:
    """Catches the mean of clients left out, tau ignored, and a margin of infinity where there is one class."""
    uploads = [{"0": torch.tensor([0.0, 0.0]), "3": torch.tensor([3.0, 0.0])},
               {"0": torch.tensor([0.0, 2.0]), "5": torch.tensor([9.0, 1.0])}]  # fmt: skip
    # means: class 0 at (0, 1), 3 at (3, 0), 5 at (9, 1); the nearest of 5 is 3, the farthest pair is 0 and 5
    assert FedTGP(margin_to="nearest").margin(uploads) == pytest.approx(37**0.5)
    assert FedTGP().margin(uploads) == pytest.approx(9.0)
    assert FedTGP(max_margin=2.0).margin(uploads) == 2.0
    assert FedTGP().margin([{"4": torch.ones(2)}, {"4": torch.zeros(2)}]) == 0.0


def test_fedtgp_remembers_classes_that_are_away_and_invents_none() -> None:
    """Catches prototypes of classes that nobody has had, and those of a former cohort forgotten or not renewed."""
    game = toy.play(federation(FedTGP(server_epochs=2), clients={"participation": 0.34}))
    known: set[str] = set()
    x = torch.randn(9, 7, generator=Rng((0,)).torch())
    assert bool((predicted(game, 0, x)["prototype"].argmax(1) == 0).all())
    for _ in range(4):
        before = game.server.prototypes
        game.round()
        (upload,) = game.got[-1].values()
        known |= set(upload.prototypes)
        assert set(game.server.prototypes) == known
        assert all(not torch.equal(game.server.prototypes[c], before[c]) for c in before)
    away = known - set(upload.prototypes)
    assert away
    got = predicted(game, 0, x)
    local = game.local(0)
    with torch.no_grad():
        r = local.models["model"].represent(game.private(0).model, x)
    for i in range(9):
        distance = {int(c): float((r[i] - row).norm()) for c, row in game.server.prototypes.items()}
        assert int(got["prototype"][i].argmax()) == min(distance, key=distance.__getitem__)


def test_equal_widths_are_needed() -> None:
    """Catches prototypes of another width."""
    needs_equal_widths(FedTGP())
