"""Matrices cut to their largest singular values, and the form in which they travel."""

from collections.abc import Mapping

import torch
from torch import Tensor

from polyfed.base.errors import MessageError
from polyfed.base.types import Params
from polyfed.core.message import Record


def rank(singular: Tensor, energy: float) -> int:
    """The smallest r with ``sum of the r largest sigma^2 >= energy * sum of all``: at least 1, at most all of them.

    Args:
        singular: the singular values, descending.
        energy: the share of their squares that is kept, in (0, 1].
    """
    kept = singular.double().square().cumsum(0)
    return min(len(kept), 1 + int(torch.searchsorted(kept, energy * kept[-1])))


def as_matrix(value: Tensor) -> Tensor:
    """A weight as (m, n): dense layers as they are, a convolution (out, in, k, k) as (out, in * k * k)."""
    return value.reshape(len(value), -1)


class LowRank(Record):
    """Tensors as they travel: U_r, sigma_r and V_r of a matrix where these are fewer numbers than it has, else itself.

    r (m + n + 1) numbers stand for m * n. Vectors, counters and matrices that would not shrink are ``whole``.
    """

    whole: Mapping[str, Tensor]
    u: Mapping[str, Tensor]  # (m, r)
    sigma: Mapping[str, Tensor]  # (r,)
    v: Mapping[str, Tensor]  # (r, n)

    @classmethod
    def of(cls, params: Params, energy: float) -> "LowRank":
        """``params``, each matrix at the rank that keeps this share of its energy."""
        whole: dict[str, Tensor] = {}
        factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, value in params.items():
            if value.dim() < 2 or not value.is_floating_point():
                whole[name] = value
                continue
            u, sigma, v = torch.linalg.svd(as_matrix(value), full_matrices=False)
            r, (m, n) = rank(sigma, energy), (len(u), v.shape[1])
            if r * (m + n + 1) >= m * n:
                whole[name] = value
            else:
                factors[name] = (u[:, :r].contiguous(), sigma[:r].clone(), v[:r].contiguous())
        u, sigma, v = ({name: f[i] for name, f in factors.items()} for i in range(3))
        return cls(whole, u, sigma, v)

    def full(self, like: Params) -> dict[str, Tensor]:
        """The tensors, in the order and the shapes of ``like``.

        Raises:
            MessageError: names or shapes are not those of ``like``.
        """
        got = {*self.whole, *self.u}
        if got != set(like) or not (self.u.keys() == self.sigma.keys() == self.v.keys()):
            raise MessageError(
                f"tensors came for {sorted(got)}; expected {sorted(like)}, each whole or in three factors"
            )
        out: dict[str, Tensor] = {}
        for name, want in like.items():
            if name in self.whole:
                value = self.whole[name]
            else:
                u, sigma, v = self.u[name], self.sigma[name], self.v[name]
                if not (u.dtype == sigma.dtype == v.dtype == want.dtype):
                    raise MessageError(
                        f"the factors of {name!r} came as {u.dtype}, {sigma.dtype}, {v.dtype}; expected {want.dtype}"
                    )
                if u.dim() != 2 or v.dim() != 2 or u.shape[1:] != sigma.shape or v.shape[:1] != sigma.shape:
                    shapes = [tuple(f.shape) for f in (u, sigma, v)]
                    raise MessageError(
                        f"the factors of {name!r} came with the shapes {shapes}; expected (m, r), (r,), (r, n)"
                    )
                value = (u * sigma) @ v
                value = value.reshape(want.shape) if value.numel() == want.numel() else value
            if value.shape != want.shape:
                raise MessageError(f"{name!r} came with shape {tuple(value.shape)}; expected {tuple(want.shape)}")
            out[name] = value
        return out
