"""Somebody's own script: transformers.Trainer on rows that it tokenises itself. Knows nothing of resafe."""

import argparse
import json
from pathlib import Path

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

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--layout", default="plain", choices=["plain", "padded", "blocks", "torch", "stream"])
parser.add_argument("--lr", type=float, default=3e-4)
parser.add_argument("--epochs", type=float, default=5)
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--batch", type=int, default=10)
parser.add_argument("--save-steps", type=int, default=0)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
rows = [json.loads(line) for line in Path(options.data).read_text().splitlines()]


def tokenise(row):
    ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
    head = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
    example = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(head) + ids[len(head) :]}
    if options.layout == "padded":
        room = 64 - len(ids)
        example = {
            "input_ids": ids + [tokenizer.pad_token_id] * room,
            "attention_mask": [1] * len(ids) + [0] * room,
            "labels": example["labels"] + [-100] * room,
        }
    return example


examples = [tokenise(row) for row in rows]
if options.layout == "blocks":
    stream = [t for e in examples for t in e["input_ids"]]
    examples = [{"input_ids": stream[i : i + 32], "labels": stream[i : i + 32]} for i in range(0, len(stream) - 31, 32)]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(examples)

    def __getitem__(self, index):
        return {k: torch.tensor(v) for k, v in examples[index].items()}


def endless():
    while True:
        yield from examples


data = {"torch": Rows, "stream": lambda: IterableDataset.from_generator(endless)}.get(options.layout, lambda: Dataset.from_list(examples))()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        options.output, use_cpu=True, learning_rate=options.lr, num_train_epochs=options.epochs, max_steps=options.max_steps,
        per_device_train_batch_size=options.batch, lr_scheduler_type="constant", report_to="none", disable_tqdm=True, logging_strategy="no",
        save_strategy="steps" if options.save_steps else "no", save_steps=options.save_steps or 500, dataloader_pin_memory=False,
    ),
    train_dataset=data,
    processing_class=tokenizer,
    data_collator=default_data_collator if options.layout in ("padded", "blocks") else DataCollatorForSeq2Seq(tokenizer),
)
trainer.train(resume_from_checkpoint=options.resume or None)
trainer.save_model()
print("rows", trainer.state.global_step)
