"""Build the shipped safety pack: upstream hazardous prompts with our refusals, and our own contrast rows.

What is taken and under which category stands in safety_pack/selection.yaml, the wording in safety_pack/refusals.yaml,
the contrast rows in safety_pack/contrast.jsonl. Every choice is made by hashes, so the same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from resafe.errors import ResafeError
from resafe.files import file_digest, write_text
from resafe.heldout import overlap, suite_prompts
from resafe.rows import Row, answer_of, chat, key, read_jsonl, user_text

HERE = Path(__file__).resolve().parent / "safety_pack"
TARGET = HERE.parents[1] / "resafe/data/safety_pack/pack.jsonl"
NEAR = 0.7  # token Jaccard from which two prompts count as paraphrases
PARAPHRASED = ("advbench", "jailbreakbench", "jailbreakbench_benign", "simplesafetytests", "xstest")
Prompt = tuple[str, str]  # category, prompt


def load(name: str) -> Any:
    """One of our YAML files."""
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def pick(text: str, salt: str, size: int) -> int:
    """A number below `size` that depends on nothing but the text and the salt."""
    return int.from_bytes(hashlib.sha256(f"{salt}\n{text}".encode()).digest()[:8], "big") % size


def catqa_prompts(folder: Path, selection: Any) -> Iterator[Prompt]:
    """CatQA prompts of the selected sub-categories."""
    raw = json.loads((folder / "catqa_english.json").read_text(encoding="utf-8"))
    groups = {f"{top} / {sub}".rstrip(" :"): texts for top, subs in raw.items() for sub, texts in subs.items()}
    if unknown := set(selection["catqa"]) - set(groups):
        raise ResafeError(f"not in catqa_english.json: {', '.join(sorted(unknown))}")
    for group, category in selection["catqa"].items():
        for text in groups[group]:
            if not any(re.search(skip, text) for skip in selection["catqa_skip"]):
                moved = (to for pattern, to in selection["catqa_override"] if re.search(pattern, text))
                yield next(moved, category), text


def harmfulqa_prompts(folder: Path, selection: Any) -> Iterator[Prompt]:
    """HarmfulQA prompts of clearly harmful intent, at most `harmfulqa_per_topic` a topic (the smallest hashes)."""
    raw = json.loads((folder / "harmfulqa.json").read_text(encoding="utf-8"))
    for subtopics in raw.values():
        found = {text: category for texts in subtopics.values() for text in texts if (category := intent(text, selection))}
        chosen = sorted(found, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
        yield from ((found[text], text) for text in chosen[: selection["harmfulqa_per_topic"]])


def intent(text: str, selection: Any) -> str | None:
    """The category whose expression a HarmfulQA prompt matches; None if it shows no clear harmful intent."""
    lower = text.lower()
    if any(re.search(skip, lower) for skip in selection["harmfulqa_skip"]):
        return None
    rules = selection["harmfulqa"].items()
    return next((name for name, rule in rules if any(re.search(pattern, lower) for pattern in rule)), None)


def refusal(category: str, prompt: str, phrases: Any) -> str:
    """Opening, reason and, three times in four, an offer."""
    own = phrases["categories"][category]
    opening = phrases["openings"][pick(prompt, "opening", len(phrases["openings"]))].format(topic=own["topic"])
    parts = [opening, own["reasons"][pick(prompt, "reason", len(own["reasons"]))]]
    if pick(prompt, "offered", 4):
        parts.append(own["offers"][pick(prompt, "offer", len(own["offers"]))])
    return " ".join(parts)


class Paraphrases:
    """Whether a prompt equals or nearly equals an evaluation prompt."""

    def __init__(self) -> None:
        self.known = [set(key(text).split()) for name in PARAPHRASED for text in suite_prompts(name)]

    def __contains__(self, prompt: str) -> bool:
        words = set(key(prompt).split())
        return any(len(words & other) >= NEAR * len(words | other) for other in self.known)


def build(folder: Path) -> list[Row]:
    """All rows of the pack, sorted; checked."""
    selection, phrases, evaluated = load("selection.yaml"), load("refusals.yaml"), Paraphrases()
    rows: dict[str, Row] = {}
    for category, prompt in (*catqa_prompts(folder, selection), *harmfulqa_prompts(folder, selection)):
        if prompt not in evaluated:
            row = chat(prompt.strip(), refusal(category, prompt, phrases), kind="refusal", category=category)
            rows.setdefault(key(prompt), row)
    for own in read_jsonl(HERE / "contrast.jsonl"):
        prompt = user_text(own["messages"])
        assert prompt not in evaluated, f"contrast prompt too close to an evaluation prompt: {prompt}"
        assert key(prompt) not in rows, f"contrast prompt stands twice, or is hazardous: {prompt}"
        rows[key(prompt)] = chat(prompt, answer_of(own), kind="contrast", category=own["category"])
    ordered = sorted(rows.values(), key=lambda row: (row["kind"], row["category"], key(user_text(row["messages"]))))
    check(ordered)
    return ordered


def check(rows: list[Row]) -> None:
    """The promises of the pack's README."""
    refusals = Counter(answer_of(row) for row in rows if row["kind"] == "refusal")
    contrast = sum(row["kind"] == "contrast" for row in rows)
    assert not overlap(rows), f"evaluation prompts in the pack: {overlap(rows)}"
    assert refusals.total() >= 600 and contrast >= 220, (refusals.total(), contrast)
    assert len(refusals) >= 300, f"only {len(refusals)} distinct refusals"
    assert max(refusals.values()) <= refusals.total() / 100, f"one refusal dominates: {refusals.most_common(1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--catqa", type=Path, required=True, help="folder with catqa_english.json and harmfulqa.json")
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args()
    rows = build(args.catqa)
    write_text(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    sha256 = file_digest(args.output)
    write_text(args.output.parent / "SHA256", f"{sha256}  {args.output.name}\n")
    for (kind, category), count in sorted(Counter((row["kind"], row["category"]) for row in rows).items()):
        print(f"{count:5}  {kind:8}  {category}")
    texts = [answer_of(row) for row in rows if row["kind"] == "refusal"]
    print(f"{len(texts)} refusals ({len(set(texts))} distinct texts), {len(rows) - len(texts)} contrast rows")
    print(f"sha256 {sha256}")


if __name__ == "__main__":
    main()
