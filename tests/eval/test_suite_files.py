"""A suite is at most fifteen lines of YAML and no code, whichever way its answers are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resafe.errors import ResafeError
from resafe.eval import load_suite
from resafe.eval.judges import get_judge, panel
from resafe.eval.suite import SHIPPED, LoadedSuite, names
from resafe.generate import Answer

IFEVAL = {"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": "Bye."}]}
CHECKED: list[tuple[str, dict[str, Any], str, str]] = [  # check, columns of the row, a right answer, a wrong one
    ("exact_number", {"answer": "so 7"}, "The answer is 7.", "8"),
    ("exact", {"answer": "SELECT a FROM b"}, "```sql\nSELECT a\nFROM b;\n```", "SELECT b"),
    ("choice", {"answer": "B"}, "(B) cats", "A"),
    ("ifeval", IFEVAL, "Well. Bye.", "Bye. Well."),
]


def suite_file(folder: Path, check: str, *rows: dict[str, Any], reference: str = "answer") -> Path:
    """A suite of `rows` with the fewest lines that its check allows."""
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": "q", **row}) + "\n" for row in rows))
    lines = ["name: mine", "kind: utility", "format: jsonl", "data: rows.jsonl", f"check: {check}"]
    file = folder / "mine.yaml"
    file.write_text("\n".join(lines + ([f"reference: {reference}"] if reference else [])) + "\n")
    return file


def verdicts(loaded: LoadedSuite, *texts: str) -> list[bool | None]:
    (name,) = [n for n in panel(loaded.suite) if n != "coherence"]
    found = get_judge(name)(loaded.suite, loaded.cases, [Answer(text, 3, True) for text in texts])
    return [v.correct for v in found]


@pytest.mark.parametrize("name", names())
def test_a_shipped_suite_is_at_most_15_lines_and_loads(name: str) -> None:
    assert len((SHIPPED / f"{name}.yaml").read_text().splitlines()) <= 15
    assert load_suite(name).name == name


@pytest.mark.parametrize(("check", "row", "right", "wrong"), CHECKED)
def test_a_suite_of_six_lines_is_checked(check: str, row: dict[str, Any], right: str, wrong: str, tmp_path: Path) -> None:
    file = suite_file(tmp_path, check, row, row, reference="answer" if "answer" in row else "")
    assert len(file.read_text().splitlines()) <= 6
    assert verdicts(load_suite(file), right, wrong) == [True, False]


def test_a_suite_without_a_check_has_only_coherence(tmp_path: Path) -> None:
    assert panel(load_suite(suite_file(tmp_path, "none", {}, reference="")).suite) == ["coherence"]


def test_every_check_has_its_suite_here() -> None:
    from resafe.eval.suite import Suite

    known = set(Suite.model_fields["check"].annotation.__args__)  # type: ignore[union-attr]
    assert {check for check, *_ in CHECKED} == known - {"none", "lab"}


@pytest.mark.parametrize(
    ("check", "row", "said"),
    [
        ("choice", {"answer": "yes"}, "suite mine: row 1 cannot be checked by 'choice': its reference must be one letter from A to H, not 'yes'."),
        ("exact", {"answer": " "}, "suite mine: row 1 cannot be checked by 'exact': it has no reference."),
        ("ifeval", {**IFEVAL, "kwargs": [{}]}, "suite mine: row 1 cannot be checked by 'ifeval': startend:end_checker needs 'end_phrase' (str) among its kwargs."),
        ("chioce", {"answer": "A"}, "check: Input should be"),
        ("lab", {"answer": "A"}, "needs another check"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_said_before_anything_is_generated(
    check: str, row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    good = next((r for c, r, *_ in CHECKED if c == check), {"answer": "A"})
    with pytest.raises(ResafeError) as error:
        load_suite(suite_file(tmp_path, check, good, row, reference="" if check == "ifeval" else "answer"))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("check", ["choice", "exact"])
def test_a_forgotten_reference_column_is_noticed(check: str, tmp_path: Path) -> None:
    with pytest.raises(ResafeError, match=f"row 0 cannot be checked by '{check}'"):
        load_suite(suite_file(tmp_path, check, {"answer": "A"}, reference=""))
