"""Moments of the gradient of the answers' loss, row by row: what SNIP and the empirical Fisher are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.sensitivity.batches import Batch
from resafe.sensitivity.linears import weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class GradientMoment:
    """Of one weight, laid out as it is stored: mean over rows of |g|, and of g^2 (the diagonal of the empirical Fisher)."""

    absolute: Tensor
    fisher: Tensor


def gradient_moments(model: Any, batches: Iterable[Batch]) -> dict[str, GradientMoment]:
    """By name of the weight, for all linear layers and stacks of experts, in one pass; g is the gradient of one row's mean loss over its answer.

    One backward pass per row: gradients of a batch would cancel before their size is taken. Leaves `model` and its
    `.grad` as they were. Float32 sums.
    """
    import torch

    looked_at = weights(model)
    if frozen := [name for name, w in looked_at.items() if not w.requires_grad]:
        raise ResafeError(f"{frozen[0]} is frozen, so its gradient is not known.")
    found = {name: GradientMoment(torch.zeros_like(w, dtype=torch.float32), torch.zeros_like(w, dtype=torch.float32)) for name, w in looked_at.items()}
    n = 0
    for row in (row for batch in batches for row in batch.rows()):
        grads = torch.autograd.grad(answer_loss(model, row.to(model.device)), list(looked_at.values()))
        for moment, g in zip(found.values(), grads):
            moment.absolute += g.float().abs()
            moment.fisher += g.float().square()
        n += 1
    if not n:
        raise ResafeError("there are no rows to look at.")
    for moment in found.values():
        moment.absolute /= n
        moment.fisher /= n
    return found


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of the tokens that the positions that count predict."""
    import torch

    logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
    counts = batch.counts[:, :-1]
    return torch.nn.functional.cross_entropy(logits[:, :-1][counts].float(), batch.ids[:, 1:][counts])
