"""Results: one row per target, suite, metric and judge, and the verdict on every prompt that paired tests need."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.eval import metrics
from resafe.files import write_json, write_text

Row = dict[str, Any]
COLUMNS = (
    "target", "attack", "mitigation", "seed", "suite", "kind", "metric", "judge",
    "value", "low", "high", "n", "n_scored", "bound_low", "bound_high",
    "scale_low", "scale_high", "category_low", "category_high",
)  # fmt: skip


@dataclass
class Items:
    """The votes of every judge on one target's answers to one suite, prompt by prompt."""

    prompts: list[str]  # ids
    keys: list[str]  # what was asked, hashed (Case.key, shortened)
    categories: list[str]
    votes: dict[str, metrics.Votes] = field(default_factory=dict)  # "metric|judge" -> one per prompt
    scales: dict[str, metrics.Scale] = field(default_factory=dict)  # judge -> of its ratings; else [0, 1]
    unscored: dict[str, dict[str, int]] = field(default_factory=dict)  # judge -> reason -> answers left without a verdict

    def column(self, metric: str, judge: str) -> metrics.Votes:
        return self.votes[f"{metric}|{judge}"]

    def scale(self, metric: str, judge: str) -> metrics.Scale:
        """Lowest and highest vote that a column may hold."""
        low, high = self.scales.get(judge, metrics.RATE) if metric == "harmfulness_score" else metrics.RATE
        return low, high

    @property
    def table(self) -> dict[tuple[str, str], metrics.Votes]:
        """(metric, judge) -> votes."""
        return {(k.split("|", 1)[0], k.split("|", 1)[1]): column for k, column in self.votes.items()}

    def without(self, ids: Collection[str]) -> Items:
        keep = [i for i, prompt in enumerate(self.prompts) if prompt not in ids]
        prompts, keys, categories = ([x[i] for i in keep] for x in (self.prompts, self.keys, self.categories))
        votes = {k: [column[i] for i in keep] for k, column in self.votes.items()}
        return Items(prompts, keys, categories, votes, self.scales, self.unscored)


@dataclass
class Results:
    """What an evaluation found. `meta` says how it was measured; `transcripts` is filled only on request."""

    rows: list[Row] = field(default_factory=list)
    items: dict[str, dict[str, Items]] = field(default_factory=dict)  # target -> suite -> votes
    agreement: list[Row] = field(default_factory=list)  # target, suite, first, second, and metrics.agreed
    meta: dict[str, Any] = field(default_factory=dict)
    transcripts: list[Row] = field(default_factory=list, repr=False)

    @property
    def targets(self) -> list[str]:
        return list(dict.fromkeys(r["target"] for r in self.rows))

    def row(self, target: str, suite: str, metric: str, judge: str) -> Row | None:
        wanted = (target, suite, metric, judge)
        return next((r for r in self.rows if (r["target"], r["suite"], r["metric"], r["judge"]) == wanted), None)

    def labels(self, target: str) -> tuple[str, str, int | None]:
        """(attack, mitigation, seed) of a target."""
        row = next(r for r in self.rows if r["target"] == target)
        return row["attack"], row["mitigation"], row["seed"]

    def add(self, who: Row, kind: str, items: Items) -> None:
        """Count the votes of one target on one suite; `who` has target, attack, mitigation, seed and suite."""
        for (metric, judge), column in items.table.items():
            asked = metrics.asked(metric, items.table, len(items.prompts))
            scale = items.scale(metric, judge)
            rate = metrics.rate(column, asked, scale)
            rate["category_low"], rate["category_high"] = metrics.by_category(column, items.categories, scale) or (None, None)
            self.rows.append({**who, "kind": kind, "metric": metric, "judge": judge, **rate})
        self.agreement += [{**who, **row} for row in metrics.agreement(items.table)]
        self.items.setdefault(who["target"], {})[who["suite"]] = items

    def drop(self, suite: str, ids: Collection[str]) -> None:
        """Leave prompts of a suite out, for every target, and count again."""
        for target, suites in self.items.items():
            if suite not in suites or not set(ids) & set(suites[suite].prompts):
                continue
            row = next(r for r in self.rows if (r["target"], r["suite"]) == (target, suite))
            if not (left := suites[suite].without(ids)).prompts:
                raise ResafeError(f"every prompt of suite {suite} was in the training data of some target.")
            self.rows = [r for r in self.rows if (r["target"], r["suite"]) != (target, suite)]
            self.agreement = [r for r in self.agreement if (r["target"], r["suite"]) != (target, suite)]
            self.add({k: row[k] for k in ("target", "attack", "mitigation", "seed", "suite")}, row["kind"], left)

    def save(self, folder: Path) -> Path:
        """Write results.json, results.csv and items.json, each complete or not at all.

        If revealed, also transcripts.jsonl (mode 0600); what an earlier evaluation left beside them is removed.
        """
        write_json(folder / "results.json", self.rows)
        write_text(folder / "results.csv", _as_csv(self.rows))
        items = {t: {s: asdict(i) for s, i in suites.items()} for t, suites in self.items.items()}
        more = {"items": items, "agreement": self.agreement, "meta": self.meta}
        write_text(folder / "items.json", json.dumps(more, ensure_ascii=False) + "\n")
        for stale in ("transcripts.jsonl", "transcripts.html", "audit.json"):
            (folder / stale).unlink(missing_ok=True)
        if self.transcripts:
            lines = "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in self.transcripts)
            write_text(folder / "transcripts.jsonl", lines, mode=0o600)
        return folder

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read what `save` wrote (transcripts stay where they are)."""
        try:
            rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            more = json.loads((folder / "items.json").read_text(encoding="utf-8"))
            items = {t: {s: Items(**i) for s, i in suites.items()} for t, suites in more["items"].items()}
            return cls(rows, items, more["agreement"], more["meta"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResafeError(f"{folder} does not hold the results of an evaluation: {error}") from None

    @classmethod
    def merge(cls, parts: Iterable[Results]) -> Results:
        """Results of several evaluations as one. Prompts dropped from one of them are dropped from all.

        Raises ResafeError when a target is in two of them.
        """
        whole = cls()
        for part in parts:
            if twice := set(part.targets) & set(whole.targets):
                raise ResafeError(f"target '{sorted(twice)[0]}' is in two of the results to be merged: rename one.")
            whole.rows += part.rows
            whole.items |= {target: dict(suites) for target, suites in part.items.items()}
            whole.agreement += part.agreement
            whole.transcripts += part.transcripts
            _merge_meta(whole.meta, part.meta)
        for suite, entry in whole.meta.get("suites", {}).items():
            whole.drop(suite, entry["dropped"])
            entry["n"] = min(len(suites[suite].prompts) for suites in whole.items.values() if suite in suites)
        return whole


def _merge_meta(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Deep union of `new` into `into`; "dropped", prompt -> targets, thereby collects what any evaluation left out."""
    for key, value in new.items():
        if isinstance(value, dict):
            _merge_meta(into.setdefault(key, {}), value)
        else:
            into[key] = value


def _as_csv(rows: list[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
