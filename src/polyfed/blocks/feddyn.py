"""FedDyn: dynamic regularisation, which remembers at each client, and at the server, where clients pull.

    D. A. E. Acar, Y. Zhao, R. Matas, M. Mattina, P. N. Whatmough, V. Saligrama: Federated Learning Based on Dynamic
    Regularization. ICLR 2021. https://arxiv.org/abs/2111.04263

Client:  minimise L_k(w) - <g_k, w> + alpha / 2 |w - w_t|^2;  then  g_k <- g_k - alpha (w_k - w_t).
Server:  h <- h - alpha / N sum_k (w_k - w_t);  w <- mean_k w_k - h / alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from polyfed.base.ranges import Rate
from polyfed.base.types import Params


@dataclass(frozen=True, kw_only=True)
class FedDyn:
    """FedDyn as an option of an algorithm.

    Args:
        feddyn: whether clients and server remember.
        alpha: the strength of the regulariser.
    """

    feddyn: bool = True
    alpha: Rate = 0.1


def pulled(gradient: Params, w: Params, start: Params, memory: Params, alpha: float) -> dict[str, Tensor]:
    """The gradient of the regularised loss, that of L_k + alpha (w - w_t) - g_k, for the tensors of ``memory``.

    Args:
        gradient: that of L_k.
        w: the weights now.
        start: w_t, the weights that the client received.
        memory: g_k.
        alpha: the strength of the regulariser.
    """
    return {n: v + alpha * (w[n] - start[n]) - memory[n] if n in memory else v for n, v in gradient.items()}


def remembered(memory: Params, trained: Params, start: Params, alpha: float) -> dict[str, Tensor]:
    """g_k after a round: g_k - alpha (w_k - w_t)."""
    return {n: g - alpha * (trained[n] - start[n]) for n, g in memory.items()}


def corrected(
    h: Params, model: Params, mean: Params, counts: Mapping[str, int], clients: int, alpha: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """H and w after a round. Tensors that no client of the round holds stay as they are, and so does their h.

    Args:
        h: by name; a tensor without one, such as a running mean, is averaged alone.
        model: w_t.
        mean: of each tensor over the clients of the round that hold it.
        counts: how many clients of the round hold each tensor.
        clients: N, of the federation.
        alpha: as of `pulled`.
    """
    new = {n: v - alpha * counts[n] / clients * (mean[n] - model[n]) if counts[n] else v for n, v in h.items()}
    return new, {n: v - new[n] / alpha if n in new and counts[n] else v for n, v in mean.items()}
