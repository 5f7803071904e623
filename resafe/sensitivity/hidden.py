"""Mean hidden states, and the gradient of their direction, one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from resafe.sensitivity.batches import Batch
from resafe.sensitivity.linears import weights

if TYPE_CHECKING:
    from torch import Tensor


def mean_hidden(model: Any, batches: Sequence[Batch], layer: int) -> Tensor:
    """Mean over all marked positions, (width,), of the hidden state after `layer` blocks (0: embeddings; last: after the final norm)."""
    import torch

    with torch.no_grad():
        return torch.stack([_sum(model, batch, layer) for batch in batches]).sum(0) / _marks(batches)


def direction_gradient(model: Any, batches: Sequence[Batch], layer: int, target: Tensor) -> tuple[float, dict[str, Tensor]]:
    """(cosine, gradients): c = cos(mean hidden state, `target`), and d(-c)/dW of every linear weight and stack of experts by name, laid out as in the model.

    By the chain rule through the mean h: with v = d(-c)/dh, the gradient is that of v . (sum of states) / n, batch by batch.
    """
    import torch

    looked_at = weights(model)
    mean = mean_hidden(model, batches, layer).requires_grad_()
    cosine = torch.nn.functional.cosine_similarity(mean, target.to(mean), dim=0)
    (v,) = torch.autograd.grad(-cosine, mean)
    total = {name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for name, w in looked_at.items()}
    for batch in batches:
        score = v @ _sum(model, batch, layer) / _marks(batches)
        for sum_, g in zip(total.values(), torch.autograd.grad(score, list(looked_at.values()), materialize_grads=True)):
            sum_ += g
    return float(cosine.detach()), total


def _sum(model: Any, batch: Batch, layer: int) -> Tensor:
    batch = batch.to(model.device)
    states = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False, output_hidden_states=True).hidden_states
    found: Tensor = states[layer][batch.counts].float().sum(0)
    return found


def _marks(batches: Sequence[Batch]) -> int:
    return sum(int(batch.counts.sum()) for batch in batches)
