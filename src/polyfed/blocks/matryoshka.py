"""What FedMRL and its kin share: a small and a large representation, fused into a vector whose prefixes classify."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyfed.base.errors import ModelError
from polyfed.blocks.losses import task_loss, total_weight
from polyfed.core.algorithm import Task
from polyfed.core.net import Batch, Nets
from polyfed.models.split import SplitModel
from polyfed.models.zoo import projector


def networks(
    task: Task, own: SplitModel, *, auxiliary: str, rep_dim: int, kind: str = "linear"
) -> dict[str, SplitModel]:
    """G, the client's F, and P: (d1 + d2) -> d2.

    Raises:
        ModelError: d1 > d2.
    """
    d1, d2 = rep_dim, own.rep_dim
    if d1 > d2:
        raise ModelError(f"{own.name} has a representation of d2 = {d2}; set algorithm.rep_dim (d1 = {d1}) <= {d2}")
    return {"G": task.auxiliary(auxiliary, rep_dim=d1), "F": own, "P": projector(d1 + d2, d2, kind)}


def fuse(nets: Nets, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both representations and their fusion; equation numbers are FedMRL's."""
    small, large = nets["G"].represent(x), nets["F"].represent(x)  # (B, d1), (B, d2)
    return small, large, project(nets, small, large)


def project(nets: Nets, small: Tensor, large: Tensor) -> Tensor:
    """The fusion of two representations, (B, d2)."""
    joined = torch.cat([small, large], dim=1)  # R, (B, d1 + d2)                                 Eq. 3
    return nets["P"](joined)  # R~, (B, d2)                                                      Eq. 4


def at_width(nets: Nets, small: Tensor, large: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(y_G, y_F) where G ends at coordinate m: R~ = P([R_G[:m]; R_F]), y_G = G_hd(R~[:m]), y_F = F_hd(R~).

    Args:
        nets: ``G``, ``F`` and ``P``.
        small: R_G, (B, D).
        large: R_F, (B, d2).
        mask: (D,), ones up to m, zeros behind it.
    """
    fused = project(nets, small * mask, large)  # (B, d2)
    return nets["G"].classify(fused[:, : len(mask)] * mask), nets["F"].classify(fused)


def losses_at_widths(nets: Nets, batch: Batch) -> Tensor:
    """Task loss of y_G plus that of y_F where G ends at each width m, (j,); ``widths`` has the ``masks``, (j, D)."""
    small, large = nets["G"].represent(batch[0]), nets["F"].represent(batch[0])  # (B, D), (B, d2)
    logits = [at_width(nets, small, large, mask) for mask in nets["widths"]["masks"].unbind()]
    return torch.stack([task_loss(y_G, batch) + task_loss(y_F, batch) for y_G, y_F in logits])


def sums_at_widths(nets: Nets, batch: Batch) -> Tensor:
    """The same as sums over examples, (j,), which add up over batches; an example counts by the weight of its class."""
    return losses_at_widths(nets, batch) * total_weight(batch)


def prefix(vector: Tensor, width: int) -> Tensor:
    """(B, d) with zeros behind its first ``width`` numbers.

    A linear layer makes of it W[:, :width] v[:width] + b: the header of that granularity, tied to the whole one.
    """
    return vector * (torch.arange(vector.shape[1], device=vector.device) < width)


def widths_up_to(widest: int, narrower: Sequence[int] = ()) -> tuple[int, ...]:
    """A ladder of widths, ascending, each once; between, if none are given, a quarter, a half and three quarters.

    Raises:
        ModelError: one is wider than the widest.
    """
    steps = sorted({*(narrower or (max(1, widest * i // 4) for i in (1, 2, 3))), widest})
    if steps[-1] > widest:
        raise ModelError(f"algorithm.granularities go up to {steps[-1]}; set them <= algorithm.rep_dim = {widest}")
    return tuple(steps)


def ones_up_to(widths: Sequence[int], dim: int) -> Tensor:
    """A mask for each width, (j, dim): ones up to it, zeros behind it."""
    return (torch.arange(dim) < torch.tensor(widths)[:, None]).to(torch.get_default_dtype())
