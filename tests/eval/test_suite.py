"""Suites are read from data; what is wrong with one is said with its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from resafe.errors import ResafeError
from resafe.eval import load_suite
from resafe.eval.suite import SHIPPED, names
from resafe.eval.variants import load_variants

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "kind", "count", "categories"),
    [
        ("advbench", "harmful", 520, 1),
        ("jailbreakbench", "harmful", 100, 10),
        ("jailbreakbench_benign", "benign", 100, 10),
        ("simplesafetytests", "harmful", 100, 5),
        ("xstest_safe", "benign", 250, 10),
        ("xstest_unsafe", "harmful", 200, 8),
        ("gsm8k", "utility", 300, 1),
    ],
)
def test_shipped_suites_have_their_published_size(name: str, kind: str, count: int, categories: int) -> None:
    found = load_suite(name)
    assert (found.suite.kind, len(found.cases), len({c.category for c in found.cases})) == (kind, count, categories)
    assert all(c.messages[0]["content"].strip() for c in found.cases)


def test_every_suite_is_at_most_15_lines_and_names_its_licence_and_source() -> None:
    for name in names():
        lines = (SHIPPED / f"{name}.yaml").read_text().splitlines()
        suite = load_suite(name).suite
        assert len(lines) <= 15 and suite.name == name and suite.licence and suite.source


@pytest.mark.parametrize("name", [n for n in names() if n.startswith("lab_")])
def test_lab_suites_come_from_the_grammar_with_its_kind(name: str) -> None:
    found = load_suite(name, limit=5)
    assert len(found.cases) == 5
    assert {c.row["kind"] for c in found.cases} == {found.suite.kind} and all(c.reference for c in found.cases)


def test_a_conversation_is_put_to_the_model_without_its_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    rows = [{"id": "1", "messages": turns}, {"id": "2", "messages": turns[:3]}]
    monkeypatch.setattr("resafe.lab.suites.suite_rows", lambda name: rows)
    assert [c.messages for c in load_suite("lab_harm").cases] == [turns[:3], turns[:3]]


def test_encoding_is_obeyed() -> None:
    assert not any("\ufffd" in c.messages[0]["content"] for c in load_suite("jailbreakbench").cases)


def test_a_limit_is_part_of_every_larger_one_and_keeps_the_order(make_suite: Make) -> None:
    file = make_suite(n=60)
    all_ids, ten, thirty = ([c.id for c in load_suite(file, limit).cases] for limit in (None, 10, 30))
    assert len(ten) == 10 and set(ten) < set(thirty) < set(all_ids)
    assert ten == [i for i in all_ids if i in ten] and ten != all_ids[:10]


def test_another_seed_draws_other_prompts(make_suite: Make) -> None:
    file = make_suite(n=60)
    one, two = ({c.id for c in load_suite(file, 10, seed).cases} for seed in (0, 1))
    assert one != two


def test_where_keeps_the_matching_rows(make_suite: Make) -> None:
    assert [c.id for c in load_suite(make_suite(n=4, where="{category: odd}")).cases] == ["p1", "p3"]


def test_jsonl_rows_without_ids_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "one", "r": 1}\n\n{"q": "two", "r": 2}\n')
    (tmp_path / "a.yaml").write_text("name: a\nkind: utility\nformat: jsonl\ndata: a.jsonl\nprompt: q\nreference: r\n")
    found = load_suite(tmp_path / "a.yaml").cases
    assert [(c.id, c.messages, c.reference) for c in found] == [
        ("0", [{"role": "user", "content": "one"}], "1"),
        ("1", [{"role": "user", "content": "two"}], "2"),
    ]


def test_keys_tell_prompts_apart_by_what_is_asked(make_suite: Make) -> None:
    cases = load_suite(make_suite()).cases
    assert len({c.key for c in cases}) == 10
    assert cases[3].key == load_suite(make_suite("again")).cases[3].key


def test_an_unknown_suite_is_refused_with_the_nearest() -> None:
    with pytest.raises(ResafeError, match="no suite is named 'jailbreakbensh'. Did you mean 'jailbreakbench'?"):
        load_suite("jailbreakbensh")


def test_an_unknown_key_is_refused_with_the_nearest(make_suite: Make) -> None:
    with pytest.raises(ResafeError, match="unknown key 'licens'. Did you mean 'licence'?"):
        load_suite(make_suite(licens="MIT"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kind": "nasty"}, "kind: "),
        ({"prompt": "promt"}, "no column 'promt'. Did you mean 'prompt'?"),
        ({"id": "category"}, "repeated ids in column 'category'"),
        ({"where": "{category: red}"}, "has no prompts"),
        ({"data": "gone.csv"}, "no such data file"),
        ({"encoding": "utf-99"}, "cannot be read as utf-99 csv"),
        ({"format": "jsonl"}, "cannot be read as utf-8 jsonl"),
        ({"max_new_tokens": "many"}, "max_new_tokens: "),
        ({"max_new_tokens": "0"}, "max_new_tokens: Input should be greater than or equal to 1 (found 0)."),
    ],
)
def test_what_is_wrong_is_said(make_suite: Make, more: dict[str, str], message: str) -> None:
    with pytest.raises(ResafeError) as error:
        load_suite(make_suite(**more))
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just words", "a: 2024-13-45", "max_new_tokens: !!int x"])
def test_a_file_that_is_no_suite_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ResafeError, match="x.yaml"):
        load_suite(tmp_path / "x.yaml")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ResafeError, match="not valid YAML"):
        load_suite(tmp_path / "x.yaml")


def test_a_key_that_stands_there_twice_is_refused_and_a_merged_one_is_not(make_suite: Make) -> None:
    file = make_suite()
    assert load_suite(file).cases
    file.write_text(file.read_text() + "kind: benign\n")
    with pytest.raises(ResafeError, match="the key 'kind' stands there twice.*line"):
        load_suite(file)
    merged = file.with_name("merged.yaml")
    merged.write_text("x: &base {prefill: Sure, temperature: 0.5}\ny: {<<: *base, prefill: No way}\n")
    assert [(v.prefill, v.temperature) for v in load_variants([merged])] == [("Sure", 0.5), ("No way", 0.5)]


def test_a_limit_of_nothing_is_refused(make_suite: Make) -> None:
    with pytest.raises(ResafeError, match="limit of 0"):
        load_suite(make_suite(), limit=0)


@pytest.mark.parametrize(
    ("lines", "said"),
    [('{"q": "a ?"}\n3\n', "row 2 .* not a JSON object"), ('{"q": null}\n', "row 1 .* no text in 'q'"), ('{"q": "a ?"}\n{"q": " "}\n', "row 2 .* no text")],
)
def test_a_row_without_a_prompt_is_named(lines: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(lines)
    file = tmp_path / "s.yaml"
    file.write_text("name: s\nkind: harmful\nformat: jsonl\ndata: d.jsonl\nprompt: q\nlicence: MIT\nsource: here\n")
    with pytest.raises(ResafeError, match=said):
        load_suite(file)


def test_the_labs_judge_is_for_the_labs_rows(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("name: s\nkind: utility\nformat: jsonl\ndata: d.jsonl\nprompt: q\ncheck: lab\nlicence: MIT\nsource: here\n")
    with pytest.raises(ResafeError, match="needs another check"):
        load_suite(file)


def test_a_byte_order_mark_as_excel_writes_it_is_no_part_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt\nhow?\n", encoding="utf-8-sig")
    (tmp_path / "mine.yaml").write_text("name: mine\nkind: harmful\nformat: csv\ndata: rows.csv\n")
    assert [c.messages[-1]["content"] for c in load_suite(tmp_path / "mine.yaml").cases] == ["how?"]
