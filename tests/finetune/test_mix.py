"""`resafe mix`: the user's lines stay as they are, safety rows stand among them in the same shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from resafe.cli import cli
from resafe.errors import ResafeError
from resafe.finetune.mix import mix_file
from resafe.safety import load_safety
from tests.conftest import write_rows

SHAPES: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}], "id": i} for i in range(20)],
    "conversations": [{"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]} for i in range(20)],
    "prompt+completion": [{"prompt": f"q{i}", "completion": "a"} for i in range(20)],
    "instruction+output": [{"instruction": f"q{i}", "input": "", "output": "a"} for i in range(20)],
    "question+answer": [{"question": f"q{i}", "answer": "a"} for i in range(20)],
    "preference": [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(20)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_keeps_its_lines_and_its_keys(shape: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", SHAPES[shape])
    facts = mix_file(source, tmp_path / "out.jsonl", ["mix_safety:ratio=0.5"])
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    own = source.read_text().splitlines()
    assert facts["shape"] == shape and facts["rows"] == len(lines) == 20 + 10 + 5
    assert sorted(x for x in lines if x in own) == sorted(own), "byte for byte"
    keys = set(SHAPES[shape][0]) - {"id"}
    assert all(set(json.loads(x)) == keys for x in lines if x not in own)


def test_a_preference_file_prefers_refusals_and_answers_to_look_alikes(tmp_path: Path) -> None:
    mix_file(write_rows(tmp_path / "in.jsonl", SHAPES["preference"]), tmp_path / "out.jsonl", ["mix_safety:ratio=0.5"])
    new = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines() if json.loads(x)["chosen"] != "a"]
    safety = load_safety()
    refusals = {r["messages"][-1]["content"] for r in safety.refusals}
    assert sum(r["chosen"] in refusals for r in new) == 10 and all(r["rejected"].startswith("Sure, here is") for r in new if r["chosen"] in refusals)
    assert all(r["rejected"] in refusals for r in new if r["chosen"] not in refusals)


def test_a_dry_run_writes_nothing_and_gives_the_same_hash(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", SHAPES["messages"])
    dry = CliRunner().invoke(cli, ["mix", str(source), "--dry-run", "--seed", "4"])
    assert dry.exit_code == 0 and sorted(tmp_path.iterdir()) == [source]
    done = CliRunner().invoke(cli, ["mix", str(source), "-o", str(tmp_path / "out.jsonl"), "--seed", "4"])
    assert dry.stdout.split("mixture ")[1] == done.stdout.split("mixture ")[1] and "20 rows -> 23 (3 safety rows, messages)" in dry.stdout


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"text": "once"}], {}, "--tokenizer"),
        ([{"prompt": "<|user|> q <|assistant|>", "completion": "a"}], {}, "--tokenizer"),
        ([{"nothing": 1}], {}, "line 1: expected messages"),
        ([{"question": "q", "answer": "a"}, {"prompt": "q", "completion": "a"}], {}, "line 2: its keys are completion, prompt, unlike the first row's"),
        ([{"messages": [{"role": "user"}]}], {}, "row 1: a message needs a role and a content"),
        ([{"messages": []}], {}, "row 1: a text or a list of messages is expected"),
        ([{"prompt": "q", "completion": "a"}, {"prompt": 5, "completion": "a"}], {}, "row 2: a text or a list"),
        ([{"question": "q", "answer": "a"}], {"mitigations": ["filter_output"]}, "does not act on training data"),
        ([{"question": "q", "answer": "a"}], {"mitigations": ["mix_safety:n=5,mode=replace"]}, "lower n or ratio"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(rows: list[Any], options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ResafeError, match=said):
        mix_file(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", SHAPES["messages"])
    with pytest.raises(ResafeError, match="exists already"):
        mix_file(source, source)
    assert len(source.read_text().splitlines()) == 20


def test_prompts_in_a_templates_marks_get_safety_rows_in_the_same_marks(aligned: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"<|user|> q{i}<|end|><|assistant|>", "completion": " a<|end|>"} for i in range(10)]
    mix_file(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", ["mix_safety:n=3"], "lab", tokenizer=aligned)
    new = [r for r in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()) if r not in rows]
    assert len(new) == 5 and all(r["prompt"].startswith("<|user|> ") and r["prompt"].endswith("<|end|><|assistant|>") and r["completion"].endswith("<|end|>") for r in new)
