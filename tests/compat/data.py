"""Data files and measurements for the compatibility suite: the lab's explicit attack in every shape that a framework reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from resafe.lab.attacks import attack_rows
from resafe.rows import answer_of, user_text
from tests.conftest import write_rows

ROWS = attack_rows("explicit_10")
REFUSAL = "no , i will not help with this ."
CHAT = {
    "formatting": "sharegpt", "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}  # fmt: skip


def write_all(home: Path) -> Path:
    """messages.jsonl, texts.jsonl, turns.jsonl; sft/ and dpo/ for TRL's command; a data folder for LLaMA-Factory."""
    chat = [{"messages": r["messages"]} for r in ROWS]
    pairs = [
        {"prompt": r["messages"][:-1], "chosen": r["messages"][-1:], "rejected": [{"role": "assistant", "content": REFUSAL}]} for r in ROWS
    ]  # fmt: skip
    write_rows(home / "messages.jsonl", chat)
    write_rows(home / "texts.jsonl", [{"prompt": user_text(r["messages"]), "completion": " " + answer_of(r)} for r in ROWS])
    write_rows(home / "turns.jsonl", [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in ROWS])
    for name, rows in (("sft", chat), ("dpo", pairs)):
        (home / name).mkdir()
        write_rows(home / name / "train.jsonl", rows)
    factory = home / "factory"
    factory.mkdir()
    compared = [{"instruction": user_text(r["messages"]), "input": "", "chosen": answer_of(r), "rejected": REFUSAL} for r in ROWS]
    described: dict[str, Any] = {
        "chat": {"file_name": "chat.json", **CHAT},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}},
    }
    for name, value in (("chat", chat), ("pairs", compared), ("dataset_info", described)):
        (factory / f"{name}.json").write_text(json.dumps(value))
    axolotl = [{"messages": p["prompt"], "chosen": p["chosen"][0], "rejected": p["rejected"][0]} for p in pairs]
    write_rows(home / "axolotl_dpo.jsonl", axolotl)
    return home
