"""The linear layers of a model, by the names of their weights; GPT-2's Conv1D stores its weight as (in, out)."""

from __future__ import annotations

from typing import Any

from resafe.errors import ResafeError


def linears(model: Any) -> dict[str, Any]:
    """Name of the weight -> module, the output head left out.

    Raises ResafeError if there is none, if weights are packed, and for experts in a stack: each sees some of the tokens only.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, (Linear, Conv1D)) and m is not head}
    if not found:
        raise ResafeError(f"{type(model).__name__} has no linear layers that could be looked at.")
    if stacks := [name for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name]:
        raise ResafeError(f"{stacks[0]} is a stack of experts, whose inputs cannot be told apart: use a method that looks at weights alone.")
    for name, module in found.items():
        if not module.weight.is_floating_point():
            raise ResafeError(f"{name} is stored in {module.weight.dtype}: use the unquantised model.")
    return found


def turned(module: Any) -> bool:
    """Whether the module stores its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
