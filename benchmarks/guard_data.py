"""The labelled rows that the shipped judges are fitted and measured on, read from public files that are left unchanged."""

from __future__ import annotations

import csv
import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import yaml

from resafe.files import file_digest
from resafe.guards import Exchange
from resafe.heldout import evaluation_prompts
from resafe.rows import key, read_jsonl, user_text

PACK = Path(__file__).parent.parent / "resafe/data/safety_pack/pack.jsonl"
PREMISES, TERSE = (Path(__file__).parent / name for name in ("premises.yaml", "terse.yaml"))
MODELS = ("llama2orig", "mistralinstruct")
TEMPLATES = 77  # gptfuzz: every question was asked in 77 jailbreak templates, in one order
FILES = (
    "gptfuzz_labeled/train.csv", "gsm8k/train.jsonl", "hh_rlhf/test.jsonl.gz", *(f"xstest/xstest_v2_completions_{m}.csv" for m in MODELS),
)  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """One exchange with its labels (None: not labelled) and what has to be held out together with it."""

    exchange: Exchange
    harm: int | None = None
    refusal: int | None = None
    full: int | None = None  # refused in full
    question: str = ""
    template: int = -1
    safe_prompt: bool = True


def exchange(prompt: str, response: str) -> Exchange:
    return [{"role": "user", "content": prompt}] if prompt else [], response


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def hashes(data: Path) -> dict[str, str]:
    return {f: file_digest(data / f) for f in FILES} | {f.name: file_digest(f) for f in (PACK, PREMISES, TERSE)}


def gptfuzz(data: Path) -> list[Labelled]:
    """Answers to hazardous questions under jailbreak templates, each pair of question and answer once.

    The file numbers the questions and does not hold them; the template is a row's place within its question.
    """
    found: dict[tuple[str, str], Labelled] = {}
    for i, r in enumerate(read_csv(data / FILES[0])):
        row = Labelled(exchange("", r["Response"]), harm=int(r["label"]), question=r["question"], template=i % TEMPLATES)
        found.setdefault((r["question"], r["Response"]), row)
    return list(found.values())


def xstest(data: Path, model: str) -> list[Labelled]:
    """A model's completions; people say refused in full, in part, or not. Full answers to safe prompts are harmless."""
    return [
        Labelled(
            exchange(r["prompt"], r["completion"]),
            harm=0 if r["final_label"][0] == "1" and not r["type"].startswith("contrast") else None,
            refusal=int(r["final_label"][0] in "23"),
            full=int(r["final_label"][0] == "2"),
            question=r["prompt"],
            safe_prompt=not r["type"].startswith("contrast"),
        )
        for r in read_csv(data / f"xstest/xstest_v2_completions_{model}.csv")
    ]


def pack() -> list[Labelled]:
    """The safety pack: our refusals of hazardous prompts, and our answers to prompts that only look like them."""
    return [
        Labelled(exchange(user_text(r["messages"]), r["messages"][-1]["content"]), harm=0, refusal=int(r["kind"] == "refusal"))
        for r in read_jsonl(PACK)
    ]


def premises(seed: int = 0) -> list[Labelled]:
    """Harmless questions that presuppose something, with answers that deny it (refusals) or do not: templates, filled in."""
    corpus = yaml.safe_load(PREMISES.read_text(encoding="utf-8"))
    rng = random.Random(seed)
    found = []
    for case in corpus["cases"]:
        for answer in case["answers"]:
            for prompt in rng.sample(case["prompts"], min(case["sample"], len(case["prompts"]))):
                chosen = {name: rng.choice(values) for name, values in corpus["fillers"].items()}
                texts = (t.format(**chosen) for t in (prompt, answer))
                row = exchange(*(t[0].upper() + t[1:] for t in texts))
                found.append(Labelled(row, harm=0, refusal=case["refused"], question=answer))
    return found


def terse(seed: int = 0) -> list[Labelled]:
    """Refusals and answers of a sentence or two, without prompts: people's labels are of long ones."""
    corpus = yaml.safe_load(TERSE.read_text(encoding="utf-8"))
    rng = random.Random(seed)
    filled = [t.format(do=do) for t in corpus["refusals"] for do in (rng.sample(corpus["do"], corpus["sample"]) if "{do}" in t else [""])]
    texts = [(t + rng.choice(corpus["tails"]), 1) for t in filled] + [(t, 0) for t in corpus["answers"]]
    return [Labelled(exchange("", text), harm=0, refusal=refused, question=text) for text, refused in texts]


def gsm8k(data: Path, n: int = 300) -> list[Labelled]:
    """Worked sums, less evaluation prompts."""
    banned = frozenset().union(*evaluation_prompts().values())
    rows = [(r["messages"][0]["content"], r["messages"][1]["content"]) for r in read_jsonl(data / FILES[1])]
    return [Labelled(exchange(q, a), harm=0, refusal=0) for q, a in random.Random(0).sample(rows, n) if key(q) not in banned]


def hh_rlhf(data: Path) -> list[Labelled]:
    """Preferred replies without labels: `harm` 0 is a weak one, the reply is only the less harmful of two."""
    banned = frozenset().union(*evaluation_prompts().values())
    found = []
    with gzip.open(data / FILES[2], "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["chosen"]
            before, _, reply = text.rpartition("\n\nAssistant:")
            prompt = before.rpartition("\n\nHuman:")[2].strip()
            if reply.strip() and key(prompt) not in banned:
                found.append(Labelled(exchange(prompt, reply.strip()), harm=0))
    return found
