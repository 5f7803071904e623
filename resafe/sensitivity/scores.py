"""Scores of single weights from those moments. Weights are (out, in) here; turn GPT-2's before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resafe.errors import ResafeError
from resafe.sensitivity.activations import InputMoment
from resafe.sensitivity.gradients import GradientMoment

if TYPE_CHECKING:
    from torch import Tensor


def wanda(weight: Tensor, moment: InputMoment) -> Tensor:
    """|W_ij| ||x_j||_2 (Sun et al. 2023, arXiv 2306.11695, equation 1): how much an output would change without the weight."""
    return weight.abs() * moment.squares.sqrt().to(weight.dtype)


def snip(weight: Tensor, moment: GradientMoment) -> Tensor:
    """|W| times the mean of |dL/dW| (Lee et al. 2018, arXiv 1810.02340; row by row as in arXiv 2402.05162); layout as stored."""
    return weight.abs() * moment.absolute.to(weight.dtype)


def hessian(moment: InputMoment, damp: float = 0.01) -> Tensor:
    """2/n X X^T, (in, in), in float64: the Hessian of a layer's mean squared output error.

    `damp` times its mean diagonal is added, so that it can be inverted also where inputs are never active.
    Raises ResafeError for activations that are not finite, or all zero.
    """
    found = moment.total * (2 / moment.count)
    diagonal = found.diagonal()
    mean = float(diagonal.mean())
    if not 0 < mean < float("inf") or not bool(found.isfinite().all()):
        raise ResafeError("the inputs of a layer are all zero or not finite on these rows: load the model in a wider dtype, or use other rows.")
    diagonal += damp * mean
    return found


def top_share(score: Tensor, share: float) -> Tensor:
    """True for the floor(share * in) largest scores of each row of (out, in); the first of equals."""
    import torch

    k = int(share * score.shape[1] + 1e-9)  # 0.29 * 100 is 28.999...
    chosen = torch.zeros_like(score, dtype=torch.bool)
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :k]
    return chosen.scatter_(1, order, True)
