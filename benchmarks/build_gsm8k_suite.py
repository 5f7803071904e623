"""Build the shipped GSM8K sample: the 300 rows whose questions hash smallest, so that anybody gets the same ones."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from resafe.files import file_digest, write_text

ROWS = 300
TARGET = Path(__file__).resolve().parents[1] / "resafe/data/suites/gsm8k/gsm8k_300.jsonl"


def sample(lines: list[str]) -> list[str]:
    """The `ROWS` lines with the smallest sha256 of their question, in that order."""
    return sorted(lines, key=lambda line: hashlib.sha256(json.loads(line)["question"].encode()).hexdigest())[:ROWS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, help="train.jsonl of openai/grade-school-math")
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args()
    lines = args.train.read_text(encoding="utf-8").splitlines()
    write_text(args.output, "\n".join(sample(lines)) + "\n")
    print(f"{ROWS} of {len(lines)} rows, sha256 {file_digest(args.output)}")


if __name__ == "__main__":
    main()
