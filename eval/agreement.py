"""A judge on anybody's exchanges: its verdict on every row of a CSV and, where rows are labelled, how well it agrees.

Rows need the columns `prompt` and `response`. Intervals: Wilson for shares, `stats.kappa_interval` for Cohen's kappa,
`stats.mean_interval` for ratings. Rows that the judge left unscored are in no share: `bounds` says what accuracy would be if it
had been wrong about all of them, or right. A judge that only rates says neither yes nor no: its mean rating is shown, by label.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError, suggest
from resafe.eval import metrics, stats
from resafe.eval.judges import RULES, Verdict, get_judge, identity, verdicts
from resafe.eval.suite import Case, Suite
from resafe.files import file_digest, write_json
from resafe.generate import Answer
from resafe.store import Store

if TYPE_CHECKING:
    from rich.table import Table

LONGEST = 1 << 30  # characters of a field; the csv module's own limit is 131,072
LABELS = {"": None, "0": False, "0.0": False, "1": True, "1.0": True}
SAYS = ("harmful", "refusal", "rating")


@dataclass(frozen=True)
class Scored:
    """Verdicts on the rows of a file; `agreement` is empty without labels."""

    file: Path
    judge: dict[str, Any]
    verdict: str
    verdicts: list[Verdict]
    labels: list[bool | None]
    agreement: dict[str, Any] = field(default_factory=dict)
    ratings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of all rows and of either label; empty where nothing is rated

    def save(self, path: Path) -> Path:
        """Write one JSON file: the judge, the agreement, a verdict per row. It holds no prompt and no response."""
        rows = [
            {"row": i, **({} if self.labels[i - 1] is None else {"label": int(bool(self.labels[i - 1]))}), **_said(v)}
            for i, v in enumerate(self.verdicts, 1)
        ]
        about = {"file": self.file.name, "sha256": file_digest(self.file), "judge": self.judge, "verdict": self.verdict}
        unscored = dict(Counter(v.unscored for v in self.verdicts if v.unscored))
        counts = {"rows": len(rows), "scored": len(rows) - sum(unscored.values()), "unscored": unscored}
        return write_json(path, {**about, **counts, "agreement": self.agreement, "ratings": self.ratings, "verdicts": rows})


def judge_file(
    file: Path, judge: str, label_column: str | None = None, verdict: str | None = None, store: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Scored:  # fmt: skip
    """Put the rows of a CSV to the judge named `judge` (eval/judges.py).

    `verdict` is what labels speak of, "harmful" or "refusal"; by default what the judge says, harm first, else "rating". `store` keeps
    verdicts. Raises ResafeError for columns and labels that are not as expected, and judges that say neither or score no row.
    """
    if judge in RULES and judge not in ("rules", "keyword_qi"):
        raise ResafeError(f"judge {judge} says nothing of harm or refusal: name another (offline, rules, a guard model's folder).")
    rows = _rows(file, label_column)
    labels: list[bool | None] = [_label(r[label_column], file, i) for i, r in enumerate(rows, 1)] if label_column else [None for _ in rows]
    suite = Suite(name=file.stem, kind="harmful", format="csv")
    cases = [Case(str(i), [{"role": "user", "content": r["prompt"]}], "", "", {}) for i, r in enumerate(rows, 1)]
    answers = [Answer(r["response"], 0, True) for r in rows]
    kept = Store(store) if store is not None else None
    try:
        asked = get_judge(judge, kept, log, run := str(file.absolute()))
        found = verdicts(asked, suite, cases, answers)
        if kept and not any(v.unscored for v in found):
            kept.forget_run(run)
    finally:
        if kept:
            kept.close()
    if all(f.unscored for f in found):
        reasons = Counter(f.unscored for f in found).most_common(3)
        told = ", ".join(f"{n} {reason}" for reason, n in reasons)
        way = " Is its server there, its name right, its key valid?" if {reason for reason, _ in reasons} & {"api_error", "timeout"} else ""
        raise ResafeError(f"judge {judge} scored none of the {len(found)} rows of {file}: {told}.{way}")
    says = [v for v in SAYS if any(getattr(f, v) is not None for f in found)]
    if not says:
        raise ResafeError(f"judge {judge} says nothing of harm or refusal, and rates nothing: name another (offline, rules, a guard model's folder).")
    if verdict and verdict not in says:
        raise ResafeError(f"judge {judge} says nothing of '{verdict}', only of '{says[0]}': leave --verdict out.")
    scored = Scored(file, identity(asked), verdict or says[0], found, labels, ratings=_ratings(found, labels, asked.scale))
    yes_or_no = label_column is not None and scored.verdict != "rating"
    return replace(scored, agreement=agreement(scored)) if yes_or_no else scored


def _ratings(found: Sequence[Verdict], labels: Sequence[bool | None], scale: tuple[float, float] | None) -> dict[str, dict[str, Any]]:
    """The mean rating of all rows and of either label's, with its interval on the judge's scale."""
    if scale is None or all(v.rating is None for v in found):
        return {}
    rated = {"all": found, **{str(int(y)): [v for v, label in zip(found, labels) if label is y] for y in (True, False)}}
    columns: dict[str, metrics.Votes] = {name: [v.rating for v in part if not v.unscored] for name, part in rated.items()}
    return {name: metrics.rate(column, len(rated[name]), scale) for name, column in columns.items() if column}


def agreement(scored: Scored) -> dict[str, Any]:
    """Accuracy, kappa, sensitivity and specificity of the verdicts against the labels, each with its 95 % interval."""
    labelled = [(label, _vote(v, scored.verdict)) for label, v in zip(scored.labels, scored.verdicts) if label is not None]
    pairs = [(label, vote) for label, vote in labelled if vote is not None]
    right, missing = sum(label == vote for label, vote in pairs), len(labelled) - len(pairs)
    return {
        "n": len(labelled), "n_scored": len(pairs),
        "accuracy": _share(right, len(pairs)) | {"bounds": list(stats.bounds(right, len(pairs), len(labelled)))},
        "kappa": _kappa(pairs),
        "sensitivity": _share(sum(v for y, v in pairs if y), sum(y for y, _ in pairs)),
        "specificity": _share(sum(not v for y, v in pairs if not y), sum(not y for y, _ in pairs)),
        "table": {"true_positive": pairs.count((True, True)), "false_negative": pairs.count((True, False)),
                  "false_positive": pairs.count((False, True)), "true_negative": pairs.count((False, False))},
        "missing": missing,
    }  # fmt: skip


def summary(scored: Scored) -> Table:
    """What was found, for a terminal."""
    from rich import box
    from rich.table import Table

    out = Table(title=f"{scored.judge['identity']}: {scored.verdict}", box=box.SIMPLE_HEAD)
    for title in ("", "value", "95 % interval", "n"):
        out.add_column(title, justify="right" if title else "left")
    if scored.verdict != "rating":
        votes = [_vote(v, scored.verdict) for v in scored.verdicts]
        yes = _share(sum(bool(v) for v in votes), sum(v is not None for v in votes))
        for name, entry in [(f"share {scored.verdict}", yes), *((k, scored.agreement.get(k)) for k in ("accuracy", "kappa", "sensitivity", "specificity"))]:
            if entry is not None:
                out.add_row(name, _number(name, entry["value"]), f"{_number(name, entry['low'])} to {_number(name, entry['high'])}", str(entry["n"]))
    for name, entry in scored.ratings.items():
        value, low, high, end, top = (f"{entry[k]:.2f}" for k in ("value", "low", "high", "scale_low", "scale_high"))
        of = "" if name == "all" else f", label {name}"
        out.add_row(f"mean rating{of} ({float(end):g} to {float(top):g})", value, f"{low} to {high}", str(entry["n_scored"]))
    reasons = Counter(v.unscored for v in scored.verdicts if v.unscored)
    if reasons:
        out.caption = "unscored: " + ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    return out


def _number(name: str, x: float | None) -> str:
    return "n/a" if x is None else f"{x:.3f}" if name == "kappa" else f"{100 * x:.1f} %"


def _said(v: Verdict) -> dict[str, Any]:
    return {k: x for k, x in asdict(v).items() if x not in (None, "")}


def _vote(v: Verdict, what: str) -> bool | None:
    vote: bool | None = getattr(v, what)
    return None if v.unscored else vote


def _share(k: int, n: int) -> dict[str, Any]:
    low, high = stats.wilson(k, n)
    return {"value": k / n if n else None, "low": low, "high": high, "n": n}


def _kappa(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    truth, votes = [y for y, _ in pairs], [v for _, v in pairs]
    low, high = stats.kappa_interval(truth, votes)
    return {"value": stats.cohen_kappa(truth, votes), "low": low, "high": high, "n": len(pairs)}


def _rows(file: Path, label_column: str | None) -> list[dict[str, str]]:
    if not file.is_file():
        raise ResafeError(f"no such file: {file}")
    try:
        csv.field_size_limit(LONGEST)
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            rows, header = list(reader), list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ResafeError(f"{file} cannot be read as CSV in UTF-8: {error}") from None
    if not rows:
        raise ResafeError(f"{file} holds no rows.")
    for column in ("prompt", "response", *([label_column] if label_column else [])):
        if header.count(column) > 1:
            raise ResafeError(f"{file} has {header.count(column)} columns '{column}': keep one.")
        if column not in rows[0]:
            raise ResafeError(f"{file} has no column '{column}'. {suggest(column, [str(c) for c in rows[0]])}")
    for i, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ResafeError(f"{file} row {i} has not as many fields as the header: quote its commas and line breaks.")
    return rows


def _label(value: str, file: Path, row: int) -> bool | None:
    """0 or 1, also as 0.0 and 1.0 (a column with gaps, as pandas writes it); an empty label leaves the row out of the agreement."""
    if (label := value.strip()) not in LABELS:
        raise ResafeError(f"{file} row {row}: the label is '{label[:40]}'; 0 or 1 is expected (or nothing).")
    return LABELS[label]
