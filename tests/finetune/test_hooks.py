"""`params`, `loss` and `step` on a real Trainer: what they do equals the same done by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe.errors import ResafeError
from resafe.finetune import _hooks
from resafe.finetune.session import attach
from resafe.lab.attacks import attack_rows
from resafe.mitigation import Mitigation, Needs, Run
from resafe.models import load
from tests.finetune.trainers import plain, trl_sft

OWN = [{"messages": r["messages"]} for r in attack_rows("new_skill")[:24]]
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "max_grad_norm": 0.0, "seed": 1}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Mitigation]], str]:
    """Put a mitigation of the test's into the catalogue; returns its name."""
    import resafe.mitigations as catalogue

    known = dict(catalogue._registry())

    def add(kind: type[Mitigation]) -> str:
        class Point:
            @staticmethod
            def load() -> type[Mitigation]:
                return kind

        name = kind.__name__.lower()
        known[name] = Point  # type: ignore[assignment]
        monkeypatch.setattr(catalogue, "_registry", lambda: known)
        return name

    return add


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 1e-6) -> bool:
    return all(torch.allclose(a[n], b[n], atol=atol, rtol=0) for n in a)


class Decay(Mitigation):
    """An L2 pull towards zero on one matrix, as a loss term."""

    weight: float = 0.05

    def loss(self, run: Run, model: Any, batch: Any, outputs: Any) -> dict[str, Any]:
        assert outputs.logits is not None and "labels" in batch
        return {"decay": self.weight * model.model.layers[0].mlp.up_proj.weight.pow(2).sum()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_term_changes_the_weights_as_its_gradient_says(
    accumulate: int, registered: Callable[[type[Mitigation]], str], aligned: Path, tmp_path: Path
) -> None:
    args = {**SGD, "max_steps": 1, "gradient_accumulation_steps": accumulate}
    bare = trained(plain(aligned, OWN, tmp_path / "a", **args))
    with_term = trained(attach(plain(aligned, OWN, tmp_path / "b", **args), registered(Decay)))
    start = dict(load(aligned, dtype="float32").model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    # one SGD step: w - lr (g + 2 lambda w), whatever the number of accumulated batches
    assert torch.allclose(with_term[name], bare[name] - 0.1 * 2 * 0.05 * start[name], atol=1e-6)
    assert same({n: p for n, p in bare.items() if n != name}, {n: p for n, p in with_term.items() if n != name})


def test_a_loss_term_reaches_trls_own_loss(registered: Callable[[type[Mitigation]], str], aligned: Path, tmp_path: Path) -> None:
    class Pull(Mitigation):
        def loss(self, run: Run, model: Any, batch: Any, outputs: Any) -> dict[str, Any]:
            return {"pull": 0.05 * model.model.layers[0].mlp.up_proj.weight.pow(2).sum()}

    args = {**SGD, "max_steps": 1}
    bare = trained(trl_sft(aligned, OWN, tmp_path / "a", **args))
    pulled = trained(attach(trl_sft(aligned, OWN, tmp_path / "b", **args), registered(Pull)))
    start = dict(load(aligned, dtype="float32").model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(pulled[name], bare[name] - 0.1 * 2 * 0.05 * start[name], atol=1e-6)


class Freeze(Mitigation):
    def params(self, run: Run, model: Any) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_("mlp" in name)


def test_params_acts_before_the_optimiser(registered: Callable[[type[Mitigation]], str], aligned: Path, tmp_path: Path) -> None:
    after = trained(attach(plain(aligned, OWN, tmp_path / "a", **SGD), registered(Freeze)))
    start = dict(load(aligned, dtype="float32").model.named_parameters())
    moved = {n for n in after if not torch.equal(after[n], start[n])}
    assert moved and all("mlp" in n for n in moved)


class Same(Mitigation):
    def step(self, run: Run, backward: Callable[..., Any]) -> Any:
        return backward("task")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [plain, trl_sft])
def test_a_step_that_returns_the_tasks_gradients_changes_nothing(
    make: Any, accumulate: int, registered: Callable[[type[Mitigation]], str], aligned: Path, tmp_path: Path
) -> None:
    args = {**SGD, "gradient_accumulation_steps": accumulate}
    bare = trained(make(aligned, OWN, tmp_path / "a", **args))
    assert same(bare, trained(attach(make(aligned, OWN, tmp_path / "b", **args), registered(Same))))


class Sum(Mitigation):
    """Task gradient plus half the safety gradient, at weights moved a little: everything that `backward` offers."""

    needs = Needs(safety=True)

    def step(self, run: Run, backward: Callable[..., Any]) -> Any:
        seen: list[int] = []
        task = backward("task")
        moved = backward("task", perturb={n: 0.01 * g for n, g in task.items()}, hooks={"model.layers.1": lambda *_: seen.append(1)})
        safety = backward("safety")
        assert seen and any(not torch.equal(moved[n], task[n]) for n in task)
        return {n: task[n] + 0.5 * safety[n] for n in task}


def test_a_step_composes_task_and_safety_gradients(registered: Callable[[type[Mitigation]], str], aligned: Path, tmp_path: Path) -> None:
    args = {**SGD, "max_steps": 1}
    bare = trained(plain(aligned, OWN, tmp_path / "a", **args))
    trainer = attach(plain(aligned, OWN, tmp_path / "b", **args), registered(Sum), safety_data="lab")
    batches: list[Any] = []
    original = trainer.data_collator
    trainer.data_collator = lambda rows: batches.append(original(rows)) or batches[-1]
    after = trained(trainer)
    model: Any = load(aligned, dtype="float32").model
    tasks = [r["messages"][0]["content"] for r in OWN]
    texts = [trainer.processing_class.batch_decode(b["input_ids"]) for b in batches]
    (safety,) = [b for b, read in zip(batches, texts) if not any(task in text for task in tasks for text in read)]
    model.train()
    model(**safety).loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(after[name], bare[name] - 0.1 * 0.5 * p.grad, atol=1e-5), name


def test_a_perturbation_is_taken_off_to_the_last_bit(aligned: Path) -> None:
    model = load(aligned).model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(KeyError), _hooks.perturbed(model, {n: torch.full_like(p, 1e9) for n, p in before.items()}):
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_step_is_refused_where_gradients_are_not_whole(registered: Callable[[type[Mitigation]], str], aligned: Path, tmp_path: Path) -> None:
    name = registered(Same)
    for flag, said in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
        trainer = plain(aligned, OWN, tmp_path / flag)
        setattr(trainer, flag, True)
        with pytest.raises(ResafeError, match=said):
            attach(trainer, name)
    trainer = plain(aligned, OWN, tmp_path / "fp16")
    trainer.args.fp16 = True
    with pytest.raises(ResafeError, match="fp16"):
        attach(trainer, name)


def test_hooks_in_the_process_work_in_resafe_train(
    registered: Callable[[type[Mitigation]], str], aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path
) -> None:
    from resafe.finetune.train import train
    from resafe.sft import SFTSettings

    class Still(Mitigation):
        def step(self, run: Run, backward: Callable[..., Any]) -> Any:
            return {n: torch.zeros_like(g) for n, g in backward("task").items()}

    how = SFTSettings(lora=False, epochs=1, lr=1e-2)
    out = train(aligned, attack_file("explicit_10"), tmp_path / "out", [registered(Still)], how)
    a, b = (dict(load(f, dtype="float32").model.named_parameters()) for f in (aligned, out))
    assert same(a, b), "zero gradients move nothing"
