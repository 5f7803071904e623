"""Unmodified commands on the newest versions: plain Trainer, TRL scripts, `trl sft`, `trl dpo`, accelerate, torchrun."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compat.conftest import plain_text_harm

SCRIPTS = Path(__file__).resolve().parent / "scripts"
BIN = Path(sys.executable).parent
Compared = Callable[..., None]


def script(name: str, aligned: Path, data: Path, *more: Any, front: Any = ("python",)) -> Callable[[Path], list[Any]]:
    return lambda out: [*front, SCRIPTS / f"{name}.py", "--model", aligned, "--data", data, "--output", out, *more]


@pytest.mark.parametrize(("layout", "before", "after"), [("plain", 10, 100), ("padded", 10, 100), ("torch", 10, 100)])
def test_a_plain_trainer_script(layout: str, before: int, after: int, compared: Compared, aligned: Path, files: Path) -> None:
    compared(BIN, script("plain_trainer", aligned, files / "messages.jsonl", "--layout", layout), before, after)


def test_a_plain_trainer_script_on_blocks_of_one_length(compared: Compared, aligned: Path, files: Path) -> None:
    compared(BIN, script("plain_trainer", aligned, files / "messages.jsonl", "--layout", "blocks", "--epochs", 8), 9, 93)


def test_a_plain_trainer_script_on_a_stream(compared: Compared, aligned: Path, files: Path) -> None:
    command = script("plain_trainer", aligned, files / "messages.jsonl", "--layout", "stream", "--max-steps", 50)
    compared(BIN, command, 500, 500)


@pytest.mark.parametrize(
    ("data", "more", "before", "after"),
    [
        ("messages", [], 10, 100), ("messages", ["--assistant-only"], 10, 100), ("turns", [], 10, 100),
        ("messages", ["--packing", "bfd", "--epochs", 15], 3, 25), ("messages", ["--packing", "wrapped", "--epochs", 15], 3, 24),
        ("messages", ["--lora", "--lr", 3e-3, "--epochs", 15], 10, 100), ("messages", ["--lora", "--lr", 3e-3, "--epochs", 15, "--save", "merged"], 10, 100),
    ],
)  # fmt: skip
def test_a_trl_sft_script(data: str, more: list[Any], before: int, after: int, compared: Compared, aligned: Path, files: Path) -> None:
    compared(BIN, script("trl_sft", aligned, files / f"{data}.jsonl", *more), before, after)


def test_a_trl_sft_script_on_plain_texts(compared: Compared, aligned: Path, files: Path) -> None:
    compared(BIN, script("trl_sft", aligned, files / "texts.jsonl", "--epochs", 10, "--lr", 6e-4), harm=plain_text_harm)


def test_trl_sft_from_a_config_file(compared: Compared, aligned: Path, files: Path) -> None:
    compared(BIN, lambda out: ["trl", "sft", "--config", SCRIPTS / "sft.yaml", "--model_name_or_path", aligned, "--dataset_name", files / "sft", "--output_dir", out])


def test_trl_dpo(compared: Compared, aligned: Path, files: Path) -> None:
    compared(BIN, lambda out: ["trl", "dpo", "--config", SCRIPTS / "dpo.yaml", "--model_name_or_path", aligned, "--dataset_name", files / "dpo", "--output_dir", out])


def test_accelerate_launch(compared: Compared, aligned: Path, files: Path) -> None:
    front = ["accelerate", "launch", "--cpu", "--num_processes", "1"]
    compared(BIN, script("trl_sft", aligned, files / "messages.jsonl", front=front))


def test_torchrun_on_two_processes(compared: Compared, aligned: Path, files: Path) -> None:
    front = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    compared(BIN, script("plain_trainer", aligned, files / "messages.jsonl", "--batch", 5, front=front))
