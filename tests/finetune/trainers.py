"""Real trainers on the lab model, as users build them, for tests of what happens to their data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from resafe.rows import Row, answer_of, user_text

ARGS: dict[str, Any] = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no",
    "dataloader_pin_memory": False, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
}  # fmt: skip
WIDE = 96  # tokens of a padded row


def tokenised(tokenizer: Any, row: Row, layout: str) -> dict[str, list[int]]:
    """How somebody's script turns a conversation into tokens."""
    ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
    head = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
    labels = ids if layout == "all" else [-100] * len(head) + ids[len(head) :]
    example = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
    room = WIDE - len(ids)
    if layout == "padded":
        fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        return {k: v + [fill[k]] * room for k, v in example.items()}
    if layout == "left":
        fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        return {k: [fill[k]] * room + v for k, v in example.items()}
    return example


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A data set of somebody's own."""

    def __init__(self, examples: Sequence[dict[str, list[int]]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {k: torch.tensor(v) for k, v in self.examples[index].items()}


def plain(home: Path, rows: Sequence[Row], output: Path, layout: str = "answer", **args: Any) -> Any:
    """transformers.Trainer on rows that the script tokenised; layouts answer, all, padded, left, blocks, torch, stream."""
    tokenizer: Any = AutoTokenizer.from_pretrained(home)
    examples: list[Any] = [tokenised(tokenizer, r, layout) for r in rows]
    if layout == "blocks":
        stream = [t for e in examples for t in e["input_ids"]]
        examples = [{"input_ids": stream[i : i + 24], "labels": stream[i : i + 24]} for i in range(0, len(stream) - 23, 24)]
    data: Any = Rows(examples) if layout == "torch" else Dataset.from_list(examples) if examples else None
    if layout == "stream":
        data = IterableDataset.from_generator(lambda: (e for _ in range(1000) for e in examples))
    model: Any = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    fixed = layout in ("padded", "left", "blocks")
    return Trainer(
        model=model, args=TrainingArguments(str(output), **{**ARGS, **args}), train_dataset=data, processing_class=tokenizer,
        data_collator=default_data_collator if fixed else DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip


SHAPES: dict[str, Any] = {
    "messages": lambda r: {"messages": r["messages"]},
    "turns": lambda r: {"prompt": r["messages"][:-1], "completion": r["messages"][-1:]},
    "texts": lambda r: {"prompt": user_text(r["messages"]), "completion": " " + answer_of(r)},
}


def trl_sft(home: Path, rows: Sequence[Any], output: Path, **args: Any) -> Any:
    """TRL's SFTTrainer on rows in a shape of its own."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config = SFTConfig(output_dir=str(output), **{**ARGS, "bf16": False, "max_length": 96, "gradient_checkpointing": False, **args})
    model: Any = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(list(rows)), processing_class=AutoTokenizer.from_pretrained(home))


def trl_dpo(home: Path, rows: Sequence[Any], output: Path, **args: Any) -> Any:
    """TRL's DPOTrainer on preference rows."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    config = DPOConfig(output_dir=str(output), **{**ARGS, "bf16": False, "max_length": 96, "gradient_checkpointing": False, **args})
    model: Any = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    return DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(list(rows)), processing_class=AutoTokenizer.from_pretrained(home))
