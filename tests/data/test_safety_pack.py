"""The shipped safety pack keeps the promises of its README and can be rebuilt from its sources."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from resafe.files import file_digest
from resafe.heldout import SUITES, overlap, suite_prompts
from resafe.rows import Row, answer_of, key, keys, read_jsonl, user_text

ROOT = Path(__file__).parents[2]
PACK = ROOT / "resafe/data/safety_pack"
RAW = os.environ.get("RESAFE_RAW_DATA")
needs_raw = pytest.mark.skipif(not RAW, reason="RESAFE_RAW_DATA does not name the raw data folder")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_jsonl(PACK / "pack.jsonl")


def test_recorded_hash_is_the_files_hash() -> None:
    assert (PACK / "SHA256").read_text().split() == [file_digest(PACK / "pack.jsonl"), "pack.jsonl"]


def test_it_is_large_enough_and_counts_agree_with_the_readme(rows: list[Row]) -> None:
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == {"refusal", "contrast"} and kinds["refusal"] >= 600 and kinds["contrast"] >= 220
    readme = (PACK / "README.md").read_text()
    assert all(f"| {kind} | {count} |" in readme for kind, count in kinds.items())


def test_every_row_has_one_turn_a_category_and_a_prompt_of_its_own(rows: list[Row]) -> None:
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] and row["category"] for row in rows)
    assert len(keys(rows)) == len(rows)


def test_no_prompt_is_an_evaluation_prompt(rows: list[Row]) -> None:
    assert overlap(rows) == {}


def test_no_contrast_prompt_paraphrases_an_over_refusal_prompt(rows: list[Row]) -> None:
    known = [set(key(text).split()) for name in ("xstest", "jailbreakbench_benign") for text in suite_prompts(name)]
    for row in (row for row in rows if row["kind"] == "contrast"):
        words = set(key(user_text(row["messages"])).split())
        assert all(len(words & other) < 0.7 * len(words | other) for other in known), row


def test_refusals_are_varied(rows: list[Row]) -> None:
    texts = Counter(answer_of(row) for row in rows if row["kind"] == "refusal")
    assert len(texts) >= 300 and max(texts.values()) <= texts.total() / 100


def test_every_refusal_opens_with_a_refusal_and_no_contrast_answer_does(rows: list[Row]) -> None:
    phrases = yaml.safe_load((ROOT / "benchmarks/safety_pack/refusals.yaml").read_text())
    openings = tuple(opening.split("{")[0] for opening in phrases["openings"])
    for row in rows:
        assert answer_of(row).startswith(openings) == (row["kind"] == "refusal"), row


def test_every_category_has_enough_wordings_of_its_own() -> None:
    phrases = yaml.safe_load((ROOT / "benchmarks/safety_pack/refusals.yaml").read_text())
    assert len(set(phrases["openings"])) >= 8
    for name, own in phrases["categories"].items():
        assert len(set(own["reasons"])) >= 6 and len(set(own["offers"])) >= 6, name


@needs_raw
@pytest.mark.parametrize(
    ("script", "option", "source", "shipped"),
    [
        ("build_safety_pack.py", "--catqa", "catqa_harmfulqa", PACK / "pack.jsonl"),
        ("build_gsm8k_suite.py", "--train", "gsm8k/train.jsonl", SUITES / "gsm8k/gsm8k_300.jsonl"),
        ("build_mmlu_suite.py", "--dev", "mmlu/dev", SUITES / "mmlu/mmlu_dev.jsonl"),
    ],
)
def test_rebuilding_gives_the_same_bytes(script: str, option: str, source: str, shipped: Path, tmp_path: Path) -> None:
    output = tmp_path / shipped.name
    command = [sys.executable, str(ROOT / "benchmarks" / script), option, str(Path(RAW or "") / source), "--output", str(output)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    assert output.read_bytes() == shipped.read_bytes()
