"""Projections onto the directions in which alignment moved a weight, without ever forming a d x d matrix.

V = W_aligned - W_base is (out, in). A projection acts from the left, on an update D or on the factor B of D = s B A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 512  # up to this many rows or columns, decomposing the whole matrix costs less than it would save
SPARE = 16  # directions drawn beyond the wanted ones: randomised range finding needs a few


@dataclass(frozen=True)
class Orthogonal:
    """P = U U^T, with the top left singular vectors U (out, k) of V: a true projector, P P = P."""

    basis: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """P x for x (out, n)."""
        return self.basis @ (self.basis.T @ x)

    @property
    def null(self) -> float:
        """Expected ||P x|| / ||x|| for a random x, that is, for an update which knows nothing of V: sqrt(k / out)."""
        return float((self.basis.shape[1] / self.basis.shape[0]) ** 0.5)


@dataclass(frozen=True)
class Official:
    """C = V V^T / ||V||_F (arXiv 2405.16833), as the authors' code has it: neither idempotent nor free of V's scale."""

    direction: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """C x for x (out, n)."""
        v = self.direction
        projected: Tensor = v @ (v.T @ x) / frobenius(v)
        return projected


def frobenius(x: Tensor) -> float:
    """||x||_F, from the norms of its rows: in one go in float32, that of a 4096 x 4096 matrix is off by 6e-4 (torch 2.13, CPU)."""
    import torch

    rows = torch.linalg.vector_norm(x, dim=-1 if x.is_contiguous() else 0)  # along memory
    return float(torch.linalg.vector_norm(rows.double()))


def top_left(v: Tensor, k: int, seed: int = 0, rounds: int = 8, beyond: bool = False) -> Tensor:
    """Orthonormal (out, <= k): the top `k` left singular vectors of `v` (randomised subspace iteration; Halko et al. 2011, arXiv 0909.4061).

    As many as `v` has directions: beyond its rank (singular values that are rounding errors of the largest) any vector would do,
    and with `beyond` such vectors fill up what is missing to `k`.
    Exact where `v` is small. Draws from a generator of its own.
    """
    import torch

    k = min(k, *v.shape)
    if min(v.shape) <= max(EXACT, k + SPARE):
        return _kept(torch.linalg.svd(v, full_matrices=False), k, v, beyond)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(v @ torch.randn(v.shape[1], k + SPARE, generator=generator, dtype=v.dtype)).Q
    for _ in range(rounds):
        q = torch.linalg.qr(v @ torch.linalg.qr(v.T @ q).Q).Q
    found: Tensor = q @ _kept(torch.linalg.svd(q.T @ v, full_matrices=False), k, v, beyond)
    return found


def _kept(svd: Any, k: int, v: Tensor, beyond: bool) -> Tensor:
    import torch

    least = svd.S[0] * max(v.shape) * torch.finfo(v.dtype).eps
    found: Tensor = svd.U[:, : k if beyond else min(k, int((least < svd.S).sum()))]
    return found


def low_rank(v: Tensor, k: int) -> Tensor:
    """The best approximation of `v` of rank `k` (Eckart-Young); `v` itself where it has no more ranks. Of a stack, each matrix's."""
    import torch

    if v.ndim == 3:
        return torch.stack([low_rank(matrix, k) for matrix in v])
    if k >= min(v.shape):
        return v
    u = top_left(v, k)
    return u @ (u.T @ v)


def cosine(x: Tensor, y: Tensor, a: Tensor | None = None) -> float:
    """Cosine of vec(x a) and vec(y a), or of x and y; 1 where y is zero, 0 where only x is.

    Through r x r Gram matrices for factors: <x a, y a> = sum((x^T y) * (a a^T)).
    """
    gram = None if a is None else a @ a.T

    def inner(p: Tensor, q: Tensor) -> float:
        product = p * q if gram is None else (p.T @ q) * gram
        return float(product.sum())

    of_x, of_y = inner(x, x), inner(y, y)
    if of_x <= 0 or of_y <= 0:
        return 1.0 if of_y <= 0 else 0.0
    return float(inner(x, y) / (of_x * of_y) ** 0.5)
