"""What is known of single classes: mappings from a class's number, as text, to a tensor, such as ``{"3": (d,)}``.

Such a mapping is `Params`: it travels, is averaged over those who have the class by `aggregate.by_name_mean`, and holds
nothing for a class that nobody has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from polyfed.base.errors import MessageError, ModelError
from polyfed.base.types import Params, Parts
from polyfed.blocks.losses import mean_squared_error
from polyfed.core.checks import check_tensor
from polyfed.core.clients import LocalClient
from polyfed.core.net import Batch, Net, Nets
from polyfed.core.requests import Steps, reduce


def class_counts(client: LocalClient) -> dict[int, int]:
    """How many training examples the client has of each class that it has, in ascending order of class."""
    return dict(sorted(Counter(client.train.labels.tolist()).items()))


def class_means(client: LocalClient, parts: Parts, output: Callable[[Nets, Tensor], Tensor]) -> Steps[Params]:
    """The mean of ``output(nets, x)`` over the client's training examples of each class that it has.

    A pass of its own over the data through `reduce`: in evaluation mode, not augmented, without gradient. Exact over
    examples, whatever the batches; summed in float64.

    Args:
        client: whose data.
        parts: the networks to look at, usually as trained.
        output: of inputs ``(B, ...)``, a row ``(B, d)`` each.

    Returns:
        (d,) of the default floating type, by class.
    """
    counts = class_counts(client)

    def sums(nets: Nets, batch: Batch) -> Params:
        x, y = batch
        rows = output(nets, x).double()  # (B, d)
        return {str(c): rows[y == c].sum(dim=0) for c in counts}

    total = yield from reduce(client, parts, sums)
    return {str(c): (total[str(c)] / count).to(torch.get_default_dtype()) for c, count in counts.items()}


def representation(nets: Nets, x: Tensor) -> Tensor:
    """f(x), (B, d), of the part ``model``: what `class_means` takes the means of for prototypes."""
    return nets["model"].represent(x)


def check_by_class(where: str, rows: Params, num_classes: int, width: int | None = None) -> None:
    """Each name is the number of a class that there is, and each row is ``(width,)``; for `Algorithm.check_upload`.

    Args:
        where: what came.
        rows: by class, of the type of the run's weights.
        num_classes: L.
        width: of each row; None where the server does not know it: then the rows are of one width.

    Raises:
        MessageError: one is not.
    """
    classes = set(map(str, range(num_classes)))
    for name, row in rows.items():
        if name not in classes:
            raise MessageError(f"{where} came for class {name!r}; expected classes from 0 to {num_classes - 1}")
        width = row.numel() if width is None else width
        check_tensor(f"{where}[{name!r}]", row, width)


def class_table(rows: Params, num_classes: int, width: int) -> dict[str, Tensor]:
    """``rows`` by class as tensors that a loss can index by label.

    Args:
        rows: (width,) by class.
        num_classes: L.
        width: of a row.

    Returns:
        ``rows`` (L, width), zero for a class that has none, and ``held`` (L,), 1 where there is one and 0 elsewhere.

    Raises:
        ModelError: a class that does not exist, or a row of another width.
    """
    table, held = torch.zeros(num_classes, width), torch.zeros(num_classes)
    for name, row in rows.items():
        if not name.isdecimal() or int(name) >= num_classes or tuple(row.shape) != (width,):
            raise ModelError(
                f"class {name!r} came with a row of shape {tuple(row.shape)}; expected a class from 0 to "
                f"{num_classes - 1} and shape {(width,)}: do all clients have the same classes and equal widths?"
            )
        table[int(name)], held[int(name)] = row, 1.0
    return {"rows": table, "held": held}


def stack_rows(uploads: Sequence[Params]) -> tuple[Tensor, Tensor]:
    """The rows of all ``uploads`` below each other, (n, d), and the class of each, (n,) int64.

    In the order of the uploads and, within one, of the classes.

    Raises:
        ModelError: no row at all, or rows of different shapes.
    """
    rows = [(int(name), upload[name]) for upload in uploads for name in sorted(upload, key=int)]
    shapes = {tuple(row.shape) for _, row in rows}
    if len(shapes) != 1:
        raise ModelError(
            f"{len(rows)} rows by class came with the shapes {sorted(shapes)}; expected one shape: do all clients' "
            "representations have one width?"
        )
    return torch.stack([row for _, row in rows]), torch.tensor([c for c, _ in rows])


def distance_to_class(r: Tensor, y: Tensor, table: Net) -> Tensor:
    """Mean over batch and d of (r - row of y)^2, where an example whose class has no row adds 0.

    Args:
        r: (B, d).
        y: (B,) int64.
        table: what `class_table` made.
    """
    # Rows are zero where a class has none.
    return mean_squared_error(table["held"][y][:, None] * r, table["rows"][y])


def nearness(r: Tensor, table: Net) -> Tensor:
    """Logits (B, L) of ``r`` (B, d): minus the distance to a class's row, minus infinity where a class has none."""
    distance = torch.cdist(r, table["rows"], compute_mode="donot_use_mm_for_euclid_dist")  # (B, L)
    return torch.where(table["held"] > 0, -distance, -torch.inf)


def gaps(rows: Tensor, to: Literal["farthest", "nearest"]) -> Tensor:
    """The distance (n,) of each of the ``rows`` (n, d), at least two, to the farthest or the nearest other one."""
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # (n, n)
    return distance.amax(dim=1) if to == "farthest" else distance.fill_diagonal_(torch.inf).amin(dim=1)
