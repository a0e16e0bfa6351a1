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


def canonical(u: Tensor, sigma: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors with the signs that do not depend on who decomposed: a pair may be (u, v) or (-u, -v).

    Of each left vector the first entry within a tenth of the largest magnitude becomes positive. Not the largest: two
    entries of one magnitude and opposite signs are common in small matrices, and rounding would choose between them.
    A singular value of zero says nothing of its vectors, so they become zero.

    Signs cannot repair equal singular values: any rotation of their vectors is as good, and where the rank cuts through
    them, the truncated matrix is free too. Nearly equal ones turn with rounding, by about the rounding error over
    their distance. And nothing here makes the last bits equal. So compare what is made of the factors, not the factors.

    Args:
        u: (m, r), each column the left vector of ``sigma``'s entry.
        sigma: (r,).
        v: (r, n), rows.
    """
    size = u.abs()
    first = (size >= 0.9 * size.amax(dim=0)).byte().argmax(dim=0, keepdim=True)  # of equals, argmax takes the first
    sign = u.gather(0, first).squeeze(0).sign() * (sigma > 0)  # (r,)
    return u * sign, v * sign[:, None]


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
        factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, value in params.items():
            if value.dim() < 2 or not value.is_floating_point():
                continue
            u, sigma, v = torch.linalg.svd(as_matrix(value), full_matrices=False)
            r, (m, n) = rank(sigma, energy), (len(u), v.shape[1])
            if r * (m + n + 1) < m * n:
                kept = sigma[:r].clone()
                u, v = canonical(u[:, :r], kept, v[:r])
                factors[name] = (u.contiguous(), kept, v.contiguous())
        whole = {name: value for name, value in params.items() if name not in factors}
        u, sigma, v = ({name: f[i] for name, f in factors.items()} for i in range(3))
        return cls(whole, u, sigma, v)

    def stands_for(self) -> dict[str, Tensor]:
        """Every tensor by name, those of two or more dimensions as matrices: the same whichever factors came."""
        made = {name: (u * self.sigma[name]) @ self.v[name] for name, u in self.u.items()}
        return {name: as_matrix(value) if value.dim() > 1 else value for name, value in self.whole.items()} | made

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
                    raise MessageError(
                        f"the factors of {name!r} came with the shapes {[tuple(f.shape) for f in (u, sigma, v)]}; "
                        "expected (m, r), (r,), (r, n)"
                    )
                value = (u * sigma) @ v
                value = value.reshape(want.shape) if value.numel() == want.numel() else value
            if value.shape != want.shape:
                raise MessageError(f"{name!r} came with shape {tuple(value.shape)}; expected {tuple(want.shape)}")
            out[name] = value
        return out
