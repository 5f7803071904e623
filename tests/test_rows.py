"""Rows: three shapes in, one shape out, and an error that names the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from resafe.errors import ResafeError
from resafe.rows import key, read_jsonl, read_pairs


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}',
        '{"prompt": "hi", "completion": "yo"}',
        '{"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]}',
        '{"question": "hi", "answer": "yo"}',
        '{"instruction": "hi", "input": "", "output": "yo"}',
    ],
)
def test_every_shape_becomes_messages(line: str, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(line + "\n")
    assert [(m["role"], m["content"]) for m in read_jsonl(file)[0]["messages"]] == [("user", "hi"), ("assistant", "yo")]


def test_an_instructions_input_follows_it(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"instruction": "sum", "input": "1 2", "output": "3"}\n')
    assert read_jsonl(file)[0]["messages"][0]["content"] == "sum\n\n1 2"


GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"text": "x"}', "line 2: expected the keys"),
        ('{"messages": []}', "line 2: 'messages' must be a non-empty list"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "known roles"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "end with assistant"),
        ('{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}', "alternate"),
        ('{"messages": [{"role": "user", "content": 3}]}', "text 'content'"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}', "only come first"),
    ],
)
def test_a_bad_line_is_named_with_its_number(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ResafeError, match=said):
        read_jsonl(file)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_empty_or_undecodable_files_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(content)
    with pytest.raises(ResafeError, match="no rows|not UTF-8"):
        read_jsonl(file)


def test_pairs_hold_a_prompt_and_two_answers(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "chosen": "no", "rejected": "yes"}\n')
    assert read_pairs(file) == [([{"role": "user", "content": "a"}], "no", "yes")]
    file.write_text('{"prompt": "a", "chosen": "no"}\n')
    with pytest.raises(ResafeError, match="line 1: .* rejected missing"):
        read_pairs(file)


def test_prompts_are_compared_without_case_width_or_punctuation() -> None:
    assert key("  Ｈow, do I?") == key("how do i")
    assert key("how do i") != key("how did i")
