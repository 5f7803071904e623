"""Build the shipped MMLU suite: the 285 development questions (5 of each of 57 subjects), one prompt each.

The files are read as re-exported with the header question,choice0..choice3,answer (the index of the right choice).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from resafe.files import file_digest, write_text

TARGET = Path(__file__).resolve().parents[1] / "resafe/data/suites/mmlu/mmlu_dev.jsonl"
LETTERS = "ABCD"
ASK = "Answer with the letter of the right option only."


def row(subject: str, number: int, line: dict[str, str]) -> dict[str, str]:
    """One question with its options and what is wanted, in one prompt."""
    options = "\n".join(f"{letter}. {line[f'choice{i}'].strip()}" for i, letter in enumerate(LETTERS))
    return {
        "id": f"{subject}/{number}",
        "subject": subject,
        "prompt": f"{line['question'].strip()}\n\n{options}\n\n{ASK}",
        "answer": LETTERS[int(line["answer"])],
    }


def rows(folder: Path) -> Iterator[dict[str, str]]:
    """Every question of the folder's *_dev.csv files, in the order of the subjects' names."""
    for file in sorted(folder.glob("*_dev.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            for i, line in enumerate(csv.DictReader(lines)):
                yield row(file.name.removesuffix("_dev.csv"), i, line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", type=Path, required=True, help="the folder with *_dev.csv")
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args()
    found = list(rows(args.dev))
    write_text(args.output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found))
    print(f"{len(found)} rows, sha256 {file_digest(args.output)}")


if __name__ == "__main__":
    main()
