"""The safety section of a model card: replaced in place, everything else untouched, nothing that others chose as markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from resafe.errors import ResafeError
from resafe.eval import Results, audit
from resafe.eval.card import BEGIN, END, card_file, judge_name, plain, section, update_card
from resafe.eval.results import Items

FRONT = '---\nlicense:   apache-2.0 # as the base model\ntags: ["a",  b]\nbase_model: "x/y"\n---\n'
NASTY = "evil\n\n# Owned | <script>alert(1)</script> [x](http://evil.example) <!-- resafe: safety end --> `code` **b** __c__"


def results(before: str = "aligned", after: str = "tuned", judge: str = "offline", suite: str = "s") -> Results:
    found = Results(
        meta={
            "suites": {suite: {"kind": "harmful", "version": 3, "n": 300, "licence": "CC BY 4.0", "source": "Vidgen et al. 2023", "dropped": {"p1": ["tuned"]}}},
            "judges": {judge: {"judge": judge, "identity": f"{judge} v1", "digest": "0123456789ab"}},
            "targets": {after: {"guard": "words v1", "identity": "weights 00ff00ff00ff00ff00ff", "folder": "/home/me/models/tuned"}},
        }
    )  # fmt: skip
    for target, k in ((before, 1), (after, 250)):
        prompts = [f"p{i}" for i in range(300)]
        votes: list[bool | float | None] = [True] * k + [False] * (300 - k)
        who = {"target": target, "attack": "none", "mitigation": "none", "seed": None, "suite": suite}
        found.add(who, "harmful", Items(prompts, list(prompts), [""] * 300, {f"harmfulness_rate|{judge}": votes}))
    return found


def written(**names: str) -> str:
    found = results(**names)
    return section(audit(found, *found.targets))


def test_the_section_says_what_was_measured_and_decided() -> None:
    text = written()
    for said in (
        "**Degraded.** harmfulness +83.0 points", "| harmfulness | s | offline | 0.3 [0.1, 1.9] | 83.3 [78.7, 87.1] |", "arxiv.org/abs/2310.03693",
        "s v3 | harmful | 300 (1 left out", "CC BY 4.0", "Vidgen et al. 2023", "offline (0123456789ab)", "**aligned** (before)",
        "**tuned** (fingerprint 00ff00ff00ff, behind its output guard) (after)", "Not measured: nonrefusal, over-refusal",
    ):  # fmt: skip
        assert said in text
    assert "/home/me" not in text


def test_a_second_run_changes_no_byte(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"{FRONT}\n# Mine\n\nText.", encoding="utf-8")
    update_card(card, written())
    once = card.read_bytes()
    update_card(card, written())
    assert card.read_bytes() == once and once.count(BEGIN.encode()) == 1


def test_everything_else_stays_as_it_was(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    head, tail = f"{FRONT}\n# Mine  \n\n| a |\n", "\n\n## After\r\nümlaut\t\n\n\n"
    card.write_bytes(f"{head}{BEGIN}\nold\n{END}{tail}".encode())
    update_card(card, "new")
    text = card.read_bytes().decode()
    assert text.startswith(head + BEGIN) and text.endswith(END + tail) and "old" not in text


def test_a_first_section_is_added_at_the_end_and_the_front_matter_still_reads(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    original = f"{FRONT}\n# Mine\n"
    card.write_text(original)
    card.chmod(0o640)
    update_card(card, written())
    text = card.read_text()
    assert text.startswith(original) and text.endswith(f"{END}\n")
    assert ModelCard.load(card).data.license == "apache-2.0" and card.stat().st_mode & 0o777 == 0o640


def test_line_ends_of_the_card_are_kept(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(b"# Mine\r\n\r\nText.\r\n")
    update_card(card, "one\ntwo")
    assert card.read_bytes() == f"# Mine\r\n\r\nText.\r\n\r\n{BEGIN}\r\none\r\ntwo\r\n{END}\r\n".encode()


def test_a_card_that_is_not_there_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "my_model"
    folder.mkdir()
    assert update_card(folder, "new") == folder / "README.md"
    assert (folder / "README.md").read_text() == f"# my_model\n\n{BEGIN}\nnew\n{END}\n"
    once = (folder / "README.md").read_bytes()
    update_card(folder, "new")
    assert (folder / "README.md").read_bytes() == once


@pytest.mark.parametrize(
    "text", [f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n", f"{BEGIN}\n{BEGIN}\n{END}\n", f"{BEGIN}\n{END}\n{END}\n"]
)
def test_markers_that_do_not_match_are_refused_and_nothing_is_written(text: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(text)
    with pytest.raises(ResafeError, match="do not match"):
        update_card(card, "new")
    assert card.read_text() == text


def test_bad_cards_are_refused_in_one_line(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    for content in ("---\nlicense: [\n---\n", "---\n- a\n- b\n---\n"):
        card.write_text(content)
        with pytest.raises(ResafeError, match=r"README.md: the front matter is not valid: [^\n]+$"):
            card_file(tmp_path)
    card.write_bytes(b"\xff\xfe")
    with pytest.raises(ResafeError, match="not UTF-8"):
        card_file(card)
    with pytest.raises(ResafeError, match="is no model card"):
        card_file(tmp_path / "results.json")


def test_names_that_others_chose_are_text_and_not_markup(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    for _ in range(2):
        update_card(card, written(before="base", after=NASTY, judge=NASTY, suite=NASTY))
    text = card.read_text()
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    for markup in ("<script", "](http:", "\n# Owned", "`code`", "**b**", "__c__"):
        assert markup not in text
    (row,) = (line for line in text.split("\n") if line.startswith("| harmfulness"))
    assert row.count("|") == 10, "a cell is a cell"


def test_plain_text_stays_readable() -> None:
    assert plain("Röttger et al. 2024, XSTest, arXiv 2308.01263 (safe prompts)") == "Röttger et al. 2024, XSTest, arXiv 2308.01263 (safe prompts)"
    assert plain("lab_harm") == "lab_harm" and plain("_x_") == "&#95;x&#95;"
    assert plain("a\x00\u202eb\nc") == "a b c" and plain("https://x.y www.z") == "https&#58;//x.y www&#46;z"
    assert len(plain("x" * 1000)) == 300


def test_a_judge_is_named_without_its_address() -> None:
    assert judge_name("chat:org/guard@http://10.0.0.3:8000/v1#llama") == "chat:org/guard"
    assert judge_name("/home/me/guards/llama-guard?family=llama_guard") == "llama-guard"
    assert judge_name("llama_guard:/home/me/g") == "g" and judge_name("offline") == "offline"
    assert "/home/me" not in written(judge="/home/me/guards/mine") and "mine" in written(judge="/home/me/guards/mine")
