"""The hooks `loss` and `step` on a Trainer, put on the instance: its class and its training loop stay untouched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import Named

Gradients = dict[str, Any]


def add_loss_terms(trainer: Any, run: Run, named: Sequence[Named]) -> None:
    """Add the terms of every `loss` hook to what `trainer.compute_loss` returns while the model trains.

    A term is a mean over its batch. Where the trainer does not divide the loss by the number of accumulated batches (its
    own loss is already a mean over all of them), each term is divided here, so that accumulation changes nothing.
    """
    original = trainer.compute_loss
    seen: list[Any] = []  # outputs of the forward pass that the loss was computed from

    @functools.wraps(original)
    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        bare = trainer.accelerator.unwrap_model(model)
        batch = dict(inputs)
        with _listening(bare, seen):
            result = original(model, inputs, *args, **kwargs)
        if not bare.training:
            return result
        outputs = seen[0] if seen else None
        terms = [t for m in named for t in m.mitigation.loss(run, bare, batch, outputs).values()]
        count = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        extra = sum(terms) / (1 if _divides(trainer, count) else trainer.current_gradient_accumulation_steps) if terms else 0
        return (result[0] + extra, *result[1:]) if isinstance(result, tuple) else result + extra

    trainer.compute_loss = compute_loss


@contextmanager
def _listening(model: Any, seen: list[Any]) -> Iterator[None]:
    """Collect the outputs of `model`'s forward passes."""
    seen.clear()
    handle = model.register_forward_hook(lambda _, __, outputs: seen.append(outputs))
    try:
        yield
    finally:
        handle.remove()


def _divides(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether `Trainer.training_step` will divide the loss by the number of accumulated batches."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # transformers from 5.15 on
    if scaled is None:
        scaled = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None or trainer.compute_loss_func is not None
    return not scaled


def own_step(trainer: Any, run: Run, owner: Named, safety_batches: Callable[[], Any]) -> None:
    """Let `owner.step` decide the gradients of every optimiser step.

    `safety_batches()` gives the next batch of safety rows, collated. Raises ResafeError where gradients are not whole on
    every process (FSDP, DeepSpeed, nn.DataParallel) or are scaled (fp16).
    """
    _refuse_sharded(trainer, owner.name)
    original = trainer.training_step
    waiting: list[tuple[dict[str, Any], Any]] = []

    @functools.wraps(original)
    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        import torch

        waiting.append((dict(inputs), num_items_in_batch))
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=trainer.args.device)
        batches = list(waiting)
        waiting.clear()
        bare = trainer.accelerator.unwrap_model(model)
        losses: list[Any] = []

        def backward(
            stream: str = "task", perturb: Mapping[str, Any] | None = None, hooks: Mapping[str, Callable[..., Any]] | None = None
        ) -> Gradients:
            chosen = batches if stream == "task" else [(safety_batches(), None) for _ in batches] if stream == "safety" else None
            if chosen is None:
                raise ResafeError(f"{owner.name}: unknown stream '{stream}'; known: task, safety.")
            with perturbed(bare, perturb or {}), _hooked(bare, hooks or {}):
                bare.zero_grad(set_to_none=True)
                loss = sum(original(model, dict(batch), count) for batch, count in chosen)
            if stream == "task":
                losses.append(loss)
            found = {n: p.grad.detach().clone() for n, p in bare.named_parameters() if p.grad is not None}
            bare.zero_grad(set_to_none=True)
            return found

        gradients = owner.mitigation.step(run, backward)
        if not isinstance(gradients, Mapping) or not gradients:
            raise ResafeError(f"{owner.name}: its step returned no gradients.")
        for name, parameter in bare.named_parameters():
            parameter.grad = gradients.get(name)
        return losses[0] if losses else torch.zeros((), device=trainer.args.device)

    trainer.training_step = training_step


@contextmanager
def perturbed(model: Any, change: Mapping[str, Any]) -> Iterator[None]:
    """Add `change` to the named parameters; on leaving, they hold their former bits again."""
    import torch

    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in change}
    with torch.no_grad():
        for name, delta in change.items():
            parameters[name].add_(delta.to(parameters[name].dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


@contextmanager
def _hooked(model: Any, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def _refuse_sharded(trainer: Any, name: str) -> None:
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ResafeError(f"{name} needs whole gradients on every process; it does not work with FSDP or DeepSpeed. Use DDP or one GPU.")
    if trainer.args.n_gpu > 1:
        raise ResafeError(f"{name} does not work with nn.DataParallel: start one process per GPU (torchrun, accelerate launch).")
    if trainer.args.fp16:
        raise ResafeError(f"{name} does not work with fp16, whose gradients are scaled: use bf16.")
