"""Linear probes: what a linear classifier reads out of representations that were trained without labels.

A probe is ridge regression on the classes' one-hot labels, in closed form from sums over examples. So it takes one pass
over a client's data, has no learning rate, and is the same however the examples are batched. The sums of a vector
contain those of each of its prefixes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from polyfed.base.types import Params


def moments(z: Tensor, y: Tensor, classes: int) -> dict[str, Tensor]:
    """Return sums over examples, which add up over batches: in float64, as a variance is their difference.

    Args:
        z: representations (B, d).
        y: labels (B,) int64; an example of -1, without a label, adds nothing.
        classes: L.

    Returns:
        ``zz`` (d + 1, d + 1) and ``zy`` (d + 1, L), of z with a 1 behind it.
    """
    exact = torch.cat([z, torch.ones_like(z[:, :1])], dim=1).double()  # (B, d + 1)
    exact = exact.masked_fill((y < 0)[:, None], 0)  # not by a choice of rows, for which a GPU would wait
    return {"zz": exact.T @ exact, "zy": exact.T @ one_hot(y.clamp(min=0), classes).double()}


def ridge(sums: Params, width: int, penalty: float) -> dict[str, Tensor]:
    """Return the probe of the first ``width`` numbers of a representation: scores are ``W z[:width] + b``.

    W minimises the mean over examples of ||y - W z - b||^2, y one-hot, plus ``penalty`` v ||W||^2, where v is the mean
    variance of the numbers: a penalty means the same whatever their scale. b has no penalty.

    Args:
        sums: of `moments`, over all examples.
        width: of the prefix, m.
        penalty: above 0.

    Returns:
        ``W`` (L, m) and ``b`` (L,), of the default floating type.
    """
    zz, zy = sums["zz"], sums["zy"]
    n, mean, share = zz[-1, -1], zz[-1, :width] / zz[-1, -1], zy[-1] / zz[-1, -1]  # (m,), (L,)
    spread = zz[:width, :width] / n - torch.outer(mean, mean)
    scale = penalty * spread.diagonal().mean().clamp(min=torch.finfo(spread.dtype).eps)  # numbers that never vary
    eye = torch.eye(width, dtype=spread.dtype)
    W = torch.linalg.solve(spread + scale * eye, zy[:width] / n - torch.outer(mean, share)).T  # noqa: N806
    kind = torch.get_default_dtype()
    return {"W": W.to(kind), "b": (share - W @ mean).to(kind)}
