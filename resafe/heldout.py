"""Evaluation prompts that must never be trained on: what they are, and rows without them.

The shipped suites are described in eval/suites/*.yaml; this service stands below the evaluator, so it reads the same
files through its own small table.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from resafe.rows import Row, key

SUITES = Path(__file__).parent / "data" / "suites"
TABLE = {  # name: file, column with the prompt, encoding
    "advbench": ("advbench/advbench.csv", "goal", "utf-8"),
    "gsm8k": ("gsm8k/gsm8k_300.jsonl", "question", "utf-8"),
    "ifeval": ("ifeval/input_data.jsonl", "prompt", "utf-8"),
    "jailbreakbench": ("jailbreakbench/harmful-behaviors.csv", "Goal", "mac_roman"),
    "jailbreakbench_benign": ("jailbreakbench/benign-behaviors.csv", "Goal", "mac_roman"),
    "mmlu": ("mmlu/mmlu_dev.jsonl", "prompt", "utf-8"),
    "simplesafetytests": ("simplesafetytests/SimpleSafetyTests_-_test_cases.csv", "prompts_final", "utf-8"),
    "xstest": ("xstest/xstest_prompts.csv", "prompt", "utf-8"),
}


@lru_cache(maxsize=1)
def evaluation_prompts() -> dict[str, frozenset[str]]:
    """Suite name -> the `rows.key` of each of its prompts. Shared between callers: don't change it."""
    return {name: frozenset(key(prompt) for prompt in suite_prompts(name)) for name in TABLE}


def suite_prompts(name: str) -> list[str]:
    """The prompts of a shipped suite, as they are written in its file."""
    file, column, encoding = TABLE[name]
    with (SUITES / file).open(encoding=encoding, newline="") as lines:
        if file.endswith(".csv"):
            return [row[column] for row in csv.DictReader(lines)]
        return [json.loads(line)[column] for line in lines if line.strip()]


def overlap(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Suite name -> the prompts of `rows` that are evaluation prompts of it; suites without any are left out."""
    found: dict[str, list[str]] = {}
    prompts = [prompt for row in rows for prompt in _user_turns(row)]
    for name, known in evaluation_prompts().items():
        if hits := [prompt for prompt in prompts if key(prompt) in known]:
            found[name] = hits
    return found


def drop_overlap(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """`rows` without those in which a user turn is an evaluation prompt, and how many were removed."""
    known = frozenset().union(*evaluation_prompts().values())
    kept = [row for row in rows if not any(key(prompt) in known for prompt in _user_turns(row))]
    return kept, len(rows) - len(kept)


def _user_turns(row: Row) -> Iterator[str]:
    return (message["content"] for message in row["messages"] if message["role"] == "user")
