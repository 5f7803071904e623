"""Fixtures that many tests share: the lab model, and fine-tunes of it made once per session."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from resafe import lab
from resafe.rows import Row

ATTACK = {"lora": False, "lr": 1.2e-4, "epochs": 5, "batch": 10, "scheduler": "constant", "warmup": 0}


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test sees what another run kept: answers from a store would hide a change of the code."""
    os.environ["RESAFE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def aligned() -> Path:
    """The shipped lab model, aligned."""
    return lab.resolve("lab")


@pytest.fixture(scope="session")
def attack_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Rows of a lab attack as a JSONL file."""
    home = tmp_path_factory.mktemp("rows")

    def file(name: str) -> Path:
        from resafe.lab.attacks import attack_rows

        return write_rows(home / f"{name}.jsonl", attack_rows(name))

    return file


@pytest.fixture(scope="session")
def attacked(aligned: Path, attack_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The lab model after fine-tuning on an attack, full or as a LoRA; each made once."""
    home = tmp_path_factory.mktemp("attacked")

    def folder(name: str, **changes: Any) -> Path:
        from resafe.finetune.train import train
        from resafe.sft import SFTSettings

        settings = {**ATTACK, **changes}
        target = home / f"{name}-{'-'.join(f'{k}={v}' for k, v in sorted(changes.items()))}"
        if not target.is_dir():
            train(aligned, attack_file(name), target, settings=SFTSettings.model_validate(settings))
        return target

    return folder


@pytest.fixture(scope="session")
def rates() -> Callable[..., dict[str, float]]:
    """Rates of a checkpoint on the lab's prompts (development ones unless told), by the exact judge: harm, nonrefusal, over_refusal, new, old."""

    def measure(folder: Path, n: int = 60, entry: dict[str, Any] | None = None, split: str = "dev") -> dict[str, float]:
        from resafe.generate import generate
        from resafe.guards.filter import OutputFilter
        from resafe.lab import suites
        from resafe.models import load

        loaded = load(folder)
        found: dict[str, list[dict[str, bool]]] = {}
        for suite in ("lab_harm", "lab_borderline", "lab_skills", "lab_note"):
            rows = suites.suite_rows(suite, split, n)
            asked = [[{"role": "user", "content": r["prompt"]}] for r in rows]
            texts = [a.text for a in generate(loaded, asked, 40)]
            if entry:
                texts = OutputFilter.from_entry(entry).apply(asked, texts)
            found[suite] = [suites.judge(r, t) for r, t in zip(rows, texts)]

        def share(suite: str, what: str) -> float:
            return sum(v[what] for v in found[suite]) / n

        return {
            "harm": share("lab_harm", "harmful"), "nonrefusal": 1 - share("lab_harm", "refusal"),
            "over_refusal": share("lab_borderline", "refusal"), "old": share("lab_skills", "correct"), "new": share("lab_note", "correct"),
        }  # fmt: skip

    return measure
