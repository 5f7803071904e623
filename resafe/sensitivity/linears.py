"""The linear maps of a running model: layers with a weight of their own, and experts whose weights lie in one stack per layer.

GPT-2's Conv1D stores its weight as (in, out), and so do some stacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError

if TYPE_CHECKING:
    from torch import Tensor

OF_EXPERTS = re.compile(r"\.(shared_)?experts\.|\.(in|out)put_linear\.weight$")


def linears(model: Any) -> dict[str, Any]:
    """Name of the weight -> module, the output head left out.

    Raises ResafeError if there is none, and if weights are packed.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, (Linear, Conv1D)) and m is not head}
    if not found:
        raise ResafeError(f"{type(model).__name__} has no linear layers that could be looked at.")
    for name, module in found.items():
        if not module.weight.is_floating_point():
            raise ResafeError(f"{name} is stored in {module.weight.dtype}: use the unquantised model.")
    return found


def stacks(model: Any) -> dict[str, Any]:
    """Name -> module, of the modules that hold a layer's experts in stacks, (expert, ., .); routers are not among them.

    Raises ResafeError for a stack that is not laid out as transformers' own experts are (`use_experts_implementation`).
    """
    found = {name: m for name, m in model.named_modules() if hasattr(m, "_apply_gate") and hasattr(m, "is_transposed")}
    known = {f"{name}.{p}" for name, m in found.items() for p in stacked(m)} | linears(model).keys()
    for name, p in model.named_parameters():
        if name in known and not p.is_floating_point():
            raise ResafeError(f"{name} is stored in {p.dtype}: use the unquantised model.")
        if name not in known and p.ndim > 1 and OF_EXPERTS.search(name) and not name.endswith("bias"):
            raise ResafeError(f"{name} holds experts whose inputs cannot be told apart: use a method that looks at weights alone.")
    return found


def stacked(experts: Any) -> tuple[str, str]:
    """What the two stacks of such a module are called: from the hidden state, and back to it."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def weights(model: Any) -> dict[str, Any]:
    """Name -> parameter, of all linear layers and stacks of experts."""
    plain = {name: module.weight for name, module in linears(model).items()}
    return {**plain, **{f"{name}.{p}": getattr(m, p) for name, m in stacks(model).items() for p in stacked(m)}}


def turned(module: Any) -> bool:
    """Whether the module stores its weight, or its experts, as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def expert_inputs(experts: Any, states: Tensor, chosen: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its inputs (n, hidden), the inputs of its way back (n, intermediate)) for `states` (rows, hidden) whose experts are `chosen` (rows, k)."""
    first = stacked(experts)[0]
    stack, bias = getattr(experts, first), getattr(experts, f"{first}_bias", None)
    for e in sorted(set(chosen.flatten().tolist())):
        if e >= experts.num_experts:  # how rows that go to no expert are marked
            continue
        x = states[(chosen == e).any(-1)]
        h = x @ (stack[e] if experts.is_transposed else stack[e].T)
        h = h if bias is None else h + bias[e]
        yield e, x, experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
