"""Somebody's own TRL script: SFT on messages, prompt-completion or text rows, packed or not, full or LoRA."""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--packing", default="", choices=["", "bfd", "wrapped"])
parser.add_argument("--assistant-only", action="store_true")
parser.add_argument("--lora", action="store_true")
parser.add_argument("--lr", type=float, default=3e-4)
parser.add_argument("--epochs", type=float, default=5)
parser.add_argument("--save", default="trainer", choices=["trainer", "model", "merged"])
options = parser.parse_args()

peft = None
if options.lora:
    from peft import LoraConfig

    peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(options.model, dtype="float32"),
    processing_class=AutoTokenizer.from_pretrained(options.model),
    train_dataset=Dataset.from_list([json.loads(line) for line in Path(options.data).read_text().splitlines()]),
    peft_config=peft,
    args=SFTConfig(
        output_dir=options.output, use_cpu=True, bf16=False, learning_rate=options.lr, num_train_epochs=options.epochs,
        per_device_train_batch_size=10, lr_scheduler_type="constant", report_to="none", save_strategy="no", max_length=128,
        packing=bool(options.packing), packing_strategy=options.packing or "bfd", assistant_only_loss=options.assistant_only,
        gradient_checkpointing=False, dataloader_pin_memory=False, disable_tqdm=True, logging_strategy="no",
    ),
)
trainer.train()
if options.save == "merged":
    trainer.model.merge_and_unload().save_pretrained(options.output)
elif options.save == "model":
    trainer.model.save_pretrained(options.output)
else:
    trainer.save_model(options.output)
trainer.processing_class.save_pretrained(options.output)
