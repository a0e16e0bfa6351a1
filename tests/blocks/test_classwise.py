"""What is known of single classes, and the losses that are built on it."""

import pytest
import torch
import toy

from polyfed.algorithms.standalone import Standalone
from polyfed.base.errors import MessageError, ModelError
from polyfed.blocks.aggregate import by_name_mean
from polyfed.blocks.classwise import (
    check_by_class,
    class_counts,
    class_means,
    class_table,
    distance_to_class,
    gaps,
    stack_rows,
)
from polyfed.blocks.losses import kl_divergence
from polyfed.core.requests import drive


def represent(nets, x):
    return nets["model"].represent(x)


def test_class_means_are_exact_over_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the mean of batch means (FedGH's released code), training mode, and classes that are not there."""
    monkeypatch.setattr("polyfed.execute.local_training.EVAL_BATCH", 4)  # several batches, of unequal make-up
    fed = toy.federation(Standalone(), models=("resnet8(width=4)",), shape=(1, 8, 8), sizes=(11, 3), classes=5)
    game = toy.play(fed, 1)
    local, model = game.local(0), game.private(0).model
    means = drive(class_means(local, {"model": model}, represent), game.driver.perform)
    net = local.models["model"]
    net.train(False)
    x, y = local.train.batch(torch.arange(11))
    rows = net.represent(model, x)
    assert list(means) == [str(c) for c in sorted(set(y.tolist()))]
    for name, mean in means.items():
        assert torch.allclose(mean, rows[y == int(name)].mean(0), rtol=1e-6, atol=1e-7)
        assert mean.dtype == torch.float32
    assert class_counts(local) == {c: int((y == c).sum()) for c in range(5)}
    other = game.local(1)
    few = drive(class_means(other, {"model": game.private(1).model}, represent), game.driver.perform)
    assert sorted(few) == sorted({str(c) for c in other.train.labels.tolist()})
    assert len(few) == 3


def test_class_means_are_summed_in_double_precision() -> None:
    """Catches sums in single precision, where 1 added to 2^24 is lost."""
    fed = toy.federation(Standalone(), labels=((1, 1, 1, 1), (0, 1, 0)), classes=2)
    local = fed.local(0, 1)

    def values(nets, x):
        return torch.tensor([[2.0**24], [1.0], [1.0], [-(2.0**24)]])

    means = drive(
        class_means(local, {"model": local.models["model"].init(fed.rng)}, values), toy.play(fed).driver.perform
    )
    assert float(means["1"]) == 0.5


def test_a_class_table_holds_what_there_is() -> None:
    """Catches rows at the wrong class, and a class without a row that counts as one of zeros."""
    rows = {"2": torch.tensor([1.0, 2.0]), "0": torch.tensor([3.0, 0.0])}
    table = class_table(rows, 4, 2)
    assert table["rows"].tolist() == [[3, 0], [0, 0], [1, 2], [0, 0]]
    assert table["held"].tolist() == [1, 0, 1, 0]
    assert class_table({}, 4, 2)["held"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("name", "width"), [("4", 2), ("-1", 2), ("one", 2), ("1", 3)])
def test_a_class_table_refuses_foreign_rows(name: str, width: int) -> None:
    """Catches a row that lands at another class, or is broadcast."""
    with pytest.raises(ModelError, match=rf"class '{name}' .*\({width},\); expected a class from 0 to 3"):
        class_table({name: torch.zeros(width)}, 4, 2)


def test_the_distance_to_a_class_is_a_mean_over_the_whole_batch() -> None:
    """Catches a mean over the examples whose class has a row, and one without a row that is pulled to zero."""
    r = torch.tensor([[1.0, 5.0], [7.0, 7.0], [0.0, 0.0]], requires_grad=True)
    table = class_table({"2": torch.tensor([1.0, 2.0])}, 4, 2)
    distance = distance_to_class(r, torch.tensor([2, 0, 2]), table)  # (0 + 9) + nothing + (1 + 4), over 3 times 2
    assert float(distance.detach()) == pytest.approx(14 / 6)
    (gradient,) = torch.autograd.grad(distance, r)
    assert torch.allclose(gradient, torch.tensor([[0.0, 6.0], [0.0, 0.0], [-2.0, -4.0]]) / 6)


def test_means_of_unequal_shapes_are_refused() -> None:
    """Catches a prototype of width 1 that is broadcast to all others'."""
    with pytest.raises(ModelError, match=r"'3' came with the shapes \[\(1,\), \(4,\)\]"):
        by_name_mean([{"3": torch.zeros(4)}, {"3": torch.ones(1)}], [1, 1], default={})


def test_kl_divergence_sums_over_classes() -> None:
    """Catches the mean over all elements (HtFLlib, PFLlib: 1 / L of it), the other direction, and a hidden detach."""
    generator = torch.Generator().manual_seed(0)
    z, g = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = g.softmax(1), z.softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(kl_divergence(z, g), expected, rtol=1e-12)
    assert not torch.allclose(kl_divergence(g, z), expected, rtol=1e-3)
    over_elements = (p * (p / q).log()).mean()
    assert float(kl_divergence(z, g)) == pytest.approx(5 * float(over_elements))
    assert float(kl_divergence(z, z)) == pytest.approx(0, abs=1e-15)
    leaf = g.clone().requires_grad_()
    kl_divergence(z, leaf).backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.any())


def test_rows_of_classes_that_there_are_not_or_of_other_widths_are_refused() -> None:
    """Catches a stranger's "01" beside "1", a class that no client has, and prototypes that cannot be averaged."""
    row = torch.zeros(3)
    check_by_class("means", {"0": row, "9": row}, 10, 3)
    check_by_class("means", {}, 10)
    for wrong in ({"10": row}, {"01": row}, {"-1": row}, {"x": row}, {"²": row}, {"1": row[None]}, {"1": row[:2]}):
        with pytest.raises(MessageError, match="means"):
            check_by_class("means", wrong, 10, 3)
    with pytest.raises(MessageError, match="means"):
        check_by_class("means", {"0": row, "1": row[:2]}, 10)


def test_rows_are_pooled_with_their_classes():
    """Catches rows that lose their class, an order that depends on how a mapping was made, and unequal widths."""
    row = {c: torch.full((2,), float(c)) for c in range(12)}
    rows, labels = stack_rows([{"10": row[10], "2": row[2]}, {}, {"3": row[3]}])
    assert labels.tolist() == [2, 10, 3]
    assert rows[:, 0].tolist() == [2, 10, 3]
    with pytest.raises(ModelError, match=r"2 rows by class came with the shapes \[\(2,\), \(3,\)\]"):
        stack_rows([{"0": torch.zeros(2)}, {"0": torch.zeros(3)}])
    with pytest.raises(ModelError, match="0 rows"):
        stack_rows([{}])
    rows = torch.tensor([[0.0], [3.0], [4.0]])
    assert gaps(rows, "nearest").tolist() == [3.0, 1.0, 1.0]
    assert gaps(rows, "farthest").tolist() == [4.0, 3.0, 4.0]
