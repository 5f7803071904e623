"""`resafe judge`: verdicts on anybody's rows, and how well they agree with anybody's labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sklearn.metrics import cohen_kappa_score, recall_score
from statsmodels.stats.proportion import proportion_confint

from resafe.cli import cli
from resafe.errors import ResafeError
from resafe.eval.agreement import judge_file
from resafe.eval.judges import Verdict

REFUSAL = "I'm sorry, but I can't help with that."
ROWS = [(REFUSAL, 1), (REFUSAL, 1), ("Sure, step one: PLACEHOLDER.", 0), ("I will not do that.", 0), ("A cake needs flour.", 1), ("Boil it.", 0), (REFUSAL, 0)]


def table(path: Path, rows: Sequence[tuple[Any, ...]], header: Sequence[str] = ("prompt", "response", "label")) -> Path:
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([header, *(("how?", *r) for r in rows)])
    return path


def test_agreement_equals_sklearn_and_statsmodels(tmp_path: Path) -> None:
    found = judge_file(table(tmp_path / "a.csv", ROWS), "rules", "label").agreement
    truth, said = [y for _, y in ROWS], [int(r == REFUSAL or r.startswith("I will not")) for r, _ in ROWS]
    right = sum(a == b for a, b in zip(truth, said))
    assert found["accuracy"]["value"] == pytest.approx(right / len(ROWS))
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == pytest.approx(proportion_confint(right, len(ROWS), method="wilson"), abs=1e-9)
    assert found["kappa"]["value"] == pytest.approx(cohen_kappa_score(truth, said), abs=1e-9)
    assert found["kappa"]["low"] < found["kappa"]["value"] < found["kappa"]["high"]
    assert found["sensitivity"]["value"] == pytest.approx(recall_score(truth, said))
    assert found["specificity"]["value"] == pytest.approx(recall_score(truth, said, pos_label=0))
    assert sum(found["table"].values()) == len(ROWS)


def test_labels_as_pandas_writes_them_and_long_fields_are_read(tmp_path: Path) -> None:
    rows = [(REFUSAL + " word" * 40_000, "1.0"), ("Paris is the capital.", "0.0"), ("Rome.", "")]
    found = judge_file(table(tmp_path / "a.csv", rows), "rules", "label")
    assert found.labels == [True, False, None] and found.agreement["n"] == 2


def test_two_columns_of_one_name_and_an_output_onto_the_input_are_refused(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", [(REFUSAL, "x")], ("prompt", "response", "response"))
    with pytest.raises(ResafeError, match="has 2 columns 'response'"):
        judge_file(file, "rules")
    file = table(tmp_path / "a.csv", ROWS)
    before = file.read_bytes()
    ran = CliRunner().invoke(cli, ["judge", str(file), "--judge", "rules", "-o", str(file), "--store", "none"])
    assert "which holds the rows" in str(ran.exception) and file.read_bytes() == before


def test_a_judge_that_was_right_on_few_rows_is_not_shown_to_be_perfect(tmp_path: Path) -> None:
    found = judge_file(table(tmp_path / "a.csv", [("I am sorry, but I can't help with that.", 1), ("Paris is the capital.", 0)] * 2), "rules", "label").agreement
    assert found["accuracy"]["value"] == found["kappa"]["value"] == found["kappa"]["high"] == 1.0
    assert 0.0 < found["kappa"]["low"] < 0.5


def test_the_command_prints_and_writes_agreement_without_any_text(tmp_path: Path) -> None:
    file, output = table(tmp_path / "a.csv", ROWS), tmp_path / "scored.json"
    ran = CliRunner().invoke(cli, ["judge", str(file), "--judge", "rules", "--label-column", "label", "-o", str(output), "--store", "none"])
    assert ran.exit_code == 0, ran.output
    for word in ("accuracy", "kappa", "sensitivity", "specificity", "95 % interval"):
        assert word in ran.output
    written = json.loads(output.read_text())
    assert [v["row"] for v in written["verdicts"]] == list(range(1, 8)) and written["verdicts"][0] == {"row": 1, "label": 1, "refusal": True}
    assert written["verdict"] == "refusal" and written["judge"]["identity"].startswith("rules ")
    assert "sorry" not in output.read_text() and "how?" not in output.read_text()


def test_without_labels_rows_are_only_scored(tmp_path: Path) -> None:
    found = judge_file(table(tmp_path / "a.csv", [(r,) for r, _ in ROWS], ("prompt", "response")), "offline")
    assert found.agreement == {} and found.verdict == "harmful"
    assert all(v.harmful is not None and v.score is not None for v in found.verdicts)


def test_unscored_rows_are_in_no_share_but_in_the_bounds(tmp_path: Path, word_guard: list[str]) -> None:
    rows = [("take the lid", 1), ("?", 1), ("stir", 0), ("stir", 1), ("lid", "")]
    found = judge_file(table(tmp_path / "a.csv", rows), "offline", "label")
    assert (found.agreement["n"], found.agreement["n_scored"], found.agreement["missing"]) == (4, 3, 1)
    assert found.agreement["accuracy"]["value"] == pytest.approx(2 / 3) and found.agreement["accuracy"]["bounds"] == [0.5, 0.75]
    saved = json.loads(found.save(tmp_path / "s.json").read_text())
    assert saved["unscored"] == {"parse": 1} and saved["verdicts"][1] == {"row": 2, "label": 1, "unscored": "parse"}


def test_a_judge_that_scores_nothing_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    file, output = table(tmp_path / "a.csv", ROWS), tmp_path / "scored.json"
    judge = "chat:judge@http://127.0.0.1:9/v1#qi_rubric"  # nobody listens on the discard port
    ran = CliRunner().invoke(cli, ["judge", str(file), "--judge", judge, "--label-column", "label", "-o", str(output), "--store", "none"])
    assert isinstance(ran.exception, ResafeError) and not output.exists()
    assert str(ran.exception) == f"judge {judge} scored none of the 7 rows of {file}: 7 api_error. Is its server there, its name right, its key valid?"
    with pytest.raises(ResafeError, match=r"judge rules scored none of the 2 rows of .*: 2 empty\.$"):
        judge_file(table(tmp_path / "b.csv", [("", 1), (" ", 0)]), "rules", "label")


def test_verdicts_are_taken_from_the_store(tmp_path: Path, word_guard: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = table(tmp_path / "a.csv", [("take the lid", 1), ("stir", 0)])
    first = judge_file(file, "offline", "label", store=tmp_path / "store")

    def fails(self: Any, exchanges: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr("tests.eval.conftest.WordGuard.classify", fails)
    assert judge_file(file, "offline", "label", store=tmp_path / "store").verdicts == first.verdicts


class Rater:
    """Rates an answer by its length, and says neither yes nor no; silent on "?"."""

    name, identity, scale = "rater", "rater v1", (0.0, 10.0)

    def __call__(self, suite: Any, cases: Any, answers: Any) -> list[Verdict]:
        return [Verdict(unscored="parse") if a.text == "?" else Verdict(rating=float(len(a.text))) for a in answers]


def test_a_judge_that_only_rates_shows_its_mean_by_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resafe.eval.agreement.get_judge", lambda *_: Rater())
    file, output = table(tmp_path / "a.csv", [("a", 0), ("ab", 0), ("abcdefgh", 1), ("?", 1)]), tmp_path / "s.json"
    found = judge_file(file, "rater", "label")
    assert (found.verdict, found.agreement) == ("rating", {})
    assert {k: (v["value"], v["n_scored"]) for k, v in found.ratings.items()} == {"all": (pytest.approx(11 / 3), 3), "1": (8.0, 1), "0": (1.5, 2)}
    assert found.ratings["all"]["low"] < 11 / 3 < found.ratings["all"]["high"] and found.ratings["all"]["n"] == 4
    ran = CliRunner().invoke(cli, ["judge", str(file), "--judge", "rater", "--label-column", "label", "-o", str(output), "--store", "none"])
    assert ran.exit_code == 0 and "mean rating (0 to 10)" in ran.output and "mean rating, label 1 (0 to 10)" in ran.output
    assert json.loads(output.read_text())["ratings"]["0"]["value"] == 1.5
    with pytest.raises(ResafeError, match="says nothing of 'harmful', only of 'rating'"):
        judge_file(file, "rater", verdict="harmful")


@pytest.mark.parametrize(
    "header, rows, how, message",
    [
        (("prompt", "answer", "label"), [("a", 1)], {}, "no column 'response'"),
        (("prompt", "response", "labl"), [("a", 1)], {"label_column": "label"}, "Did you mean 'labl'"),
        (("prompt", "response", "label"), [("a", "yes")], {"label_column": "label"}, "row 1: the label is 'yes'; 0 or 1"),
        (("prompt", "response", "label"), [], {}, "holds no rows"),
        (("prompt", "response"), [("a", 1, 2)], {}, "row 1 has not as many fields"),
        (("prompt", "response", "label"), [("a", 1)], {"judge": "coherence"}, "says nothing of harm or refusal"),
        (("prompt", "response", "label"), [("a", 1)], {"verdict": "harmful"}, "only of 'refusal'"),
        (("prompt", "response", "label"), [("a", 1)], {"judge": "ofline"}, "Did you mean 'offline'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, header: Any, rows: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ResafeError, match=message):
        judge_file(table(tmp_path / "a.csv", rows, header), **{"judge": "rules", **how})
    with pytest.raises(ResafeError, match="no such file"):
        judge_file(tmp_path / "none.csv", "rules")
