"""How the server combines what clients send. Sums run in client order and in float64, so that order is not luck."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyfed.base import tree
from polyfed.base.errors import ModelError
from polyfed.base.types import Params
from polyfed.blocks.submodel import Mask, padded


def weighted_mean(models: Sequence[Params], weights: Sequence[float]) -> dict[str, Tensor]:
    """``sum_k w_k * model_k / sum_k w_k`` for models with the same names.

    Args:
        models: at least one; all with the same names and shapes.
        weights: one positive number per model, usually its number of training examples.

    Raises:
        ValueError: no model, or models with different names.
    """
    if not models or any(model.keys() != models[0].keys() for model in models):
        raise ValueError(f"weighted_mean got {len(models)} models; expected at least one, all with the same names")
    return by_name_mean(models, weights, default={})


def by_name_mean(models: Sequence[Params], weights: Sequence[float], *, default: Params) -> dict[str, Tensor]:
    """For each name the weighted mean over the models that own it; ``default`` where no model does.

    Integer tensors (BatchNorm's counter) are averaged and rounded to their type, halves to the even number.

    Raises:
        ModelError: one name has different shapes.
    """
    out: dict[str, Tensor] = dict(default)
    for name in dict.fromkeys(name for model in models for name in model):
        owners = [(model[name], weight) for model, weight in zip(models, weights, strict=True) if name in model]
        shapes = {tuple(value.shape) for value, _ in owners}
        if len(shapes) > 1:
            raise ModelError(
                f"{name!r} came with the shapes {sorted(shapes)} from different clients; expected one shape: "
                "choose models, or cuts, where they are equal"
            )
        like, total = owners[0][0], float(sum(weight for _, weight in owners))
        # Counters are summed with the weights as they are: with whole weights that is exact, so a mean halfway between
        # two numbers is rounded to the same one in every order of the clients and on every processor.
        divisor = total if like.is_floating_point() else 1.0
        mean = torch.zeros_like(like, dtype=torch.float64)
        for value, weight in owners:
            mean.add_(value, alpha=weight / divisor)
        out[name] = mean.to(like.dtype) if like.is_floating_point() else (mean / total).round().to(like.dtype)
    return out


def nested_mean(models: Sequence[Params], weights: Sequence[float], *, default: Params) -> dict[str, Tensor]:
    """For each coordinate the weighted mean over the models that hold it; ``default`` where none does.

    Args:
        models: each with leading blocks of the tensors of ``default``: the first rows, columns and so on.
        weights: one positive number per model, usually its number of training examples.
        default: what is averaged, at full shape.

    Raises:
        MessageError: a model has a name that ``default`` lacks, or a block that does not fit.
    """
    held = [padded(tree.map_leaves(torch.ones_like, model), tree.shapes(default)) for model in models]
    whole = [padded(model, tree.shapes(default)) for model in models]
    out: dict[str, Tensor] = dict(default)
    for name, like in default.items():
        total = torch.zeros_like(like, dtype=torch.float64)
        weight = torch.zeros_like(like, dtype=torch.float64)
        for model, mask, share in zip(whole, held, weights, strict=True):
            if name in model:
                total.add_(model[name], alpha=share)
                weight.add_(mask[name], alpha=share)
        mean = torch.where(weight > 0, total / weight.clamp_min(torch.finfo(torch.float64).tiny), like.double())
        out[name] = mean.to(like.dtype) if like.is_floating_point() else mean.round().to(like.dtype)
    return out


def coverage_mean(deltas: Sequence[Params], masks: Sequence[Mask]) -> dict[str, Tensor]:
    """Per coordinate, the unweighted mean over the clients whose mask covers it; 0 where none does.

    The count is of masks, never of non-zero deltas: a covered weight that did not move still counts.

    Args:
        deltas: at full shape, zero outside the mask.
        masks: one per delta; a tensor that a mask does not name is covered whole.
    """
    out: dict[str, Tensor] = {}
    for name, like in deltas[0].items():
        total = torch.zeros_like(like, dtype=torch.float64)
        count = torch.zeros(like.shape, dtype=torch.int64, device=like.device)
        for delta, mask in zip(deltas, masks, strict=True):
            total.add_(delta[name])
            count += mask[name].to(like.device) if name in mask else 1
        out[name] = (total / count.clamp(min=1)).to(like.dtype if like.is_floating_point() else torch.float64)
    return out
