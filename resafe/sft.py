"""Supervised fine-tuning through TRL, on rows that `resafe.chat` has rendered: the one training path of the project."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from resafe import chat
from resafe.errors import ResafeError
from resafe.progress import progress_callback
from resafe.quiet import quieten
from resafe.rows import Row
from resafe.usage import count_tokens

ALL_LINEAR = "all-linear"


class SFTSettings(BaseModel):
    """How to fine-tune. `lr` None means 2e-4 for LoRA and 2e-5 for a full fine-tune."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    lora: bool = True
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    lr: float | None = Field(None, gt=0)
    epochs: float = Field(3, gt=0)
    batch: int = Field(8, ge=1)
    accumulate: int = Field(1, ge=1)
    scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    max_length: int = Field(1024, ge=8)
    weight_decay: float = Field(0.0, ge=0)
    save_steps: int = Field(200, ge=1)


def tokenised(tokenizer: Any, rows: Sequence[Row], max_length: int) -> list[dict[str, list[int]]]:
    """Rows -> `input_ids` and `assistant_masks` (1 = trained on), cut at `max_length` tokens.

    Raises ResafeError when no row keeps an assistant token.
    """
    out = []
    for row in rows:
        e = chat.encode(tokenizer, row["messages"])
        if any(e.assistant[:max_length]):
            out.append({"input_ids": e.ids[:max_length], "assistant_masks": e.assistant[:max_length]})
    if not out:
        raise ResafeError(f"none of the {len(rows)} rows has an assistant token within max_length={max_length}: raise it.")
    return out


def lora_config(rank: int, alpha: int) -> Any:
    """A LoRA over all linear layers."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=ALL_LINEAR, bias="none"
    )


def common_arguments(workdir: Path, seed: int) -> dict[str, Any]:
    """Arguments that every TRL trainer here shares: no hub, no reporting, CPU where there is no accelerator."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(workdir), "seed": seed, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no",
        "use_cpu": not cuda, "bf16": cuda, "dataloader_pin_memory": cuda, "gradient_checkpointing": cuda,
        "remove_unused_columns": False,
    }  # fmt: skip


def sft(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    settings: SFTSettings,
    workdir: Path,
    seed: int = 0,
    keep_checkpoints: bool = False,
    callbacks: Sequence[Any] = (),
    log: Callable[[str], None] = lambda _: None,
    ready: Callable[[Any], None] = lambda _: None,
) -> Any:
    """Fine-tune `model` (changed in place) and return it: a PeftModel if `settings.lora`, else the model itself.

    `ready` gets the trainer before it starts. With `keep_checkpoints`, trainer checkpoints in `workdir` are written every `save_steps` and the newest is resumed.
    """
    quieten()
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    data = Dataset.from_list(tokenised(tokenizer, rows, settings.max_length))
    if len(data) < len(rows):
        log(f"note: {len(rows) - len(data)} of {len(rows)} rows keep no answer within {settings.max_length} tokens and are left out.")
    args = SFTConfig(
        **common_arguments(workdir, seed), learning_rate=settings.lr or (2e-4 if settings.lora else 2e-5),
        num_train_epochs=settings.epochs, per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate, lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup, weight_decay=settings.weight_decay, max_length=settings.max_length, packing=False,
        save_strategy="steps" if keep_checkpoints else "no", save_steps=settings.save_steps, save_total_limit=2,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer,
        peft_config=lora_config(settings.rank, settings.alpha) if settings.lora else None, callbacks=[progress_callback(log), *callbacks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    ready(trainer)
    resume = newest_checkpoint(workdir) if keep_checkpoints else None
    if resume:
        log(f"resuming from {resume}")
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trained: Any = trainer.train_dataset
    count_tokens(round(settings.epochs * sum(len(ids) for ids in trained["input_ids"])))
    return trainer.model


def newest_checkpoint(workdir: Path) -> Path | None:
    """The last complete trainer checkpoint; the trainer writes trainer_state.json last, so what lacks it was interrupted."""
    done = [p.parent for p in workdir.glob("checkpoint-*/trainer_state.json") if p.read_text(encoding="utf-8").strip().endswith("}")]
    for folder in set(workdir.glob("checkpoint-*")) - set(done):
        shutil.rmtree(folder)
    return max(done, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
