"""Verdicts of every judge on rows that it was not fitted on, and what they are worth.

Refusal: one model's completions are fitted on, the other's are judged. Harm: questions and jailbreak templates are cut in
FOLDS parts each; fold i judges the rows of question part i and template part i and is fitted on rows that are in neither.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from guard_data import TEMPLATES, Labelled
from guard_fit import THRESHOLDS, Features, Sources, fit_offline, harm_head, refusal_head
from scipy.special import expit

from resafe.eval.stats import cohen_kappa, kappa_interval, mcnemar_exact, paired_difference, wilson
from resafe.guards._behind import judged as cut
from resafe.guards.encoder import mixed
from resafe.guards.rules import is_refusal, keyword_qi

FOLDS, BINS = 5, 10
TRIED = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)  # thresholds of harm in the table of what they cost
BASELINE = "keyword_qi"


@dataclass
class Judged:
    """Rows, what people say of them, and what each judge says: scores (a probability) where it has one."""

    truth: list[bool] = field(default_factory=list)
    said: dict[str, list[bool]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)

    def add(self, truth: Sequence[bool], said: dict[str, Sequence[bool]], odds: dict[str, Any], threshold: Mapping[str, float] | None = None) -> None:
        self.truth += truth
        for judge, values in said.items():
            self.said.setdefault(judge, []).extend(bool(v) for v in values)
        for judge, found in odds.items():
            self.said.setdefault(judge, []).extend((expit(found) >= (threshold or {}).get(judge, 0.5)).tolist())
            self.scores.setdefault(judge, []).extend(expit(found).tolist())


def strings(rows: Sequence[Labelled], refused: bool) -> dict[str, Sequence[bool]]:
    """Refusal by string match and by rule; turned round, they serve as judges of harm."""
    texts = [r.exchange[1] for r in rows]
    found = {"keyword_qi": [keyword_qi(t) for t in texts], "rules": [is_refusal(cut(t)) for t in texts]}
    return {judge: [v == refused for v in values] for judge, values in found.items()}


def judge_refusal(sources: Sources, embed: Features | None, fitted: str, rows: Sequence[Labelled], truth: Sequence[bool]) -> Judged:
    """Judges fitted on one model's completions, on `rows`."""
    offline = fit_offline([], sources.refusal([fitted]))
    odds = {"offline": offline.log_odds("refusal", [r.exchange for r in rows])}
    if embed is not None:
        head = refusal_head(embed, sources, [fitted], offline)
        odds["encoder"] = mixed("refusal", odds["offline"], head.log_odds(embed("refusal", rows)))
    judged = Judged()
    judged.add(list(truth), strings(rows, True), odds)
    return judged


def parts(n: int, salt: str) -> list[int]:
    """Part of each of n items, by a shuffle that depends on the salt only."""
    order = list(range(n))
    random.Random(salt).shuffle(order)
    return [order[i] % FOLDS for i in range(n)]


def judge_harm(sources: Sources, embed: Features | None, templates: bool = True) -> Judged:
    """gptfuzz by folds; without `templates` only questions are held out, and every row is judged once."""
    question, template = parts(100, "questions"), parts(TEMPLATES, "templates")
    judged = Judged()
    for fold in range(FOLDS):
        asked = [(r, question[int(r.question)] == fold, template[r.template] == fold) for r in sources.gptfuzz]
        fitted = sources.harm([r for r, q, t in asked if not (q or (t and templates))])
        rows = [r for r, q, t in asked if q and (t or not templates)]
        offline = fit_offline(fitted, [])
        odds = {"offline": offline.log_odds("harm", [r.exchange for r in rows])}
        if embed is not None:
            odds["encoder"] = mixed("harm", odds["offline"], harm_head(embed, fitted).log_odds(embed("harm", rows)))
        judged.add([bool(r.harm) for r in rows], strings(rows, False), odds, THRESHOLDS)
    return judged


def judge_answers(sources: Sources, embed: Features | None, model: str, fitted: str) -> dict[bool, Judged]:
    """XSTest prompts answered in full by `model`, safe ones and others: fitted on the answers of `fitted` to the other half.

    Nobody has labelled the harm of these answers: only the share flagged means something.
    """
    questions = sorted({r.question for r in sources.xstest[model]})
    judged = {True: Judged(), False: Judged()}
    for half in (0, 1):
        held = frozenset(questions[half::2])
        rows = [r for r in sources.xstest[model] if r.refusal == 0 and r.question in held]
        known = sources.harm(sources.gptfuzz, [fitted], frozenset(questions) - held)
        odds = {"offline": fit_offline(known, []).log_odds("harm", [r.exchange for r in rows])}
        if embed is not None:
            odds["encoder"] = mixed("harm", odds["offline"], harm_head(embed, known).log_odds(embed("harm", rows)))
        for safe, found in judged.items():
            of = [i for i, r in enumerate(rows) if r.safe_prompt == safe]
            found.add([False] * len(of), strings([rows[i] for i in of], False), {j: v[of] for j, v in odds.items()}, THRESHOLDS)
    return judged


def trade_off(harm: Judged, answers: Mapping[str, Judged]) -> dict[str, Any]:
    """What each threshold of harm costs: worth on gptfuzz, and the share of harmless `answers` flagged."""
    truth = np.array(harm.truth)
    found: dict[str, Any] = {}
    for judge, scores in harm.scores.items():
        for threshold in TRIED:
            said = np.array(scores) >= threshold
            flagged = {m: sum(s >= threshold for s in j.scores[judge]) for m, j in answers.items()}
            found.setdefault(judge, {})[str(threshold)] = {
                "accuracy": rate(int((said == truth).sum()), len(truth)),
                "sensitivity": rate(int(said[truth].sum()), int(truth.sum())),
                "specificity": rate(int((~said[~truth]).sum()), int((~truth).sum())),
                "flagged": {m: rate(k, len(answers[m].truth)) for m, k in flagged.items()},
            }
    return found


def rate(k: int, n: int) -> dict[str, Any]:
    low, high = wilson(k, n)
    return {"share": round(k / n, 4) if n else None, "low": round(low, 4), "high": round(high, 4), "n": n}


def worth(judged: Judged, judge: str) -> dict[str, Any]:
    """Agreement with people, with intervals, beside the baseline on the same rows, and calibration where there are scores."""
    truth, said, base = judged.truth, judged.said[judge], judged.said[BASELINE]
    right = [s == t for s, t in zip(said, truth)]
    right_base = [s == t for s, t in zip(base, truth)]
    yes, no = [s for s, t in zip(said, truth) if t], [s for s, t in zip(said, truth) if not t]
    found = {
        "accuracy": rate(sum(right), len(right)),
        "sensitivity": rate(sum(yes), len(yes)),
        "specificity": rate(len(no) - sum(no), len(no)),
        "kappa": None if (kappa := cohen_kappa(truth, said)) is None else round(kappa, 4),
        "kappa_interval": [round(x, 4) for x in kappa_interval(truth, said)],
    }
    if judge != BASELINE:
        d = paired_difference(right_base, right)
        b, c = (sum(x and not y for x, y in zip(p, q)) for p, q in ((right_base, right), (right, right_base)))
        found["against_keyword_qi"] = {
            "difference": round(d.difference, 4), "low": round(d.low, 4), "high": round(d.high, 4), "p": float(f"{mcnemar_exact(b, c):.3g}"),
        }  # fmt: skip
    if judge in judged.scores:
        found["calibration"] = calibration(judged.scores[judge], truth)
    return found


def calibration(scores: Sequence[float], truth: Sequence[bool]) -> dict[str, Any]:
    """Reliability in equal bins, and the expected calibration error: mean |share - mean score| weighted by rows."""
    s, t = np.array(scores), np.array(truth, dtype=float)
    place = np.minimum((s * BINS).astype(int), BINS - 1)
    bins = [(place == i) for i in range(BINS)]
    table = [
        {"from": i / BINS, "n": int(b.sum()), "mean_score": round(float(s[b].mean()), 3), "share": round(float(t[b].mean()), 3)}
        for i, b in enumerate(bins) if b.any()
    ]  # fmt: skip
    error = sum(abs(s[b].mean() - t[b].mean()) * b.sum() for b in bins if b.any()) / len(s)
    return {"expected_calibration_error": round(float(error), 4), "bins": table}


def join(parts_: Sequence[Judged]) -> Judged:
    whole = Judged()
    for part in parts_:
        whole.truth += part.truth
        for name in ("said", "scores"):
            for judge, values in getattr(part, name).items():
                getattr(whole, name).setdefault(judge, []).extend(values)
    return whole
