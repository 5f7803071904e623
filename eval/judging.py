"""The second half of an evaluation: every judge sees every answer, one judge in memory at a time; then votes are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from resafe.eval import metrics
from resafe.eval.asking import Answers, Say, repeated
from resafe.eval.judges import GuardJudge, Judge, Verdict, identity, verdicts
from resafe.eval.results import Items, Results
from resafe.eval.suite import LoadedSuite
from resafe.eval.targets import TargetSpec

Found = dict[tuple[str, str], dict[str, list[Verdict]]]  # (target, suite) -> judge -> verdicts


def judged(
    specs: Sequence[TargetSpec], drawn: Sequence[LoadedSuite], answers: Answers, panels: Mapping[str, Sequence[str]],
    asked: Mapping[str, Judge], log: Say,
) -> tuple[Found, dict[str, Any]]:  # fmt: skip
    """Every judge's verdicts, and what each judge was. A guard model is let go of before the next is loaded."""
    found: Found = {(spec.name, suite.name): {} for spec in specs for suite in drawn}
    about = {}
    for name, judge in asked.items():
        log(f"judge {name}")
        for spec in specs:
            for suite in drawn:
                if name in panels[suite.name]:
                    said = verdicts(judge, suite.suite, repeated(suite), answers[spec.name][suite.name])
                    found[spec.name, suite.name][name] = said
                    _tell(spec.name, suite.name, name, said, log)
        about[name] = identity(judge)
        if isinstance(judge, GuardJudge):
            judge.release()
    return found, about


def _tell(target: str, suite: str, judge: str, said: Sequence[Verdict], log: Say) -> None:
    """A line where verdicts are missing."""
    if reasons := Counter(v.unscored for v in said if v.unscored):
        told = ", ".join(f"{n} ({reason})" for reason, n in reasons.most_common(3))
        log(f"{target}: {judge} left {sum(reasons.values())} of {len(said)} answers of {suite} unscored: {told}")


def record(results: Results, spec: TargetSpec, suite: LoadedSuite, found: Mapping[str, list[Verdict]], asked: Mapping[str, Judge]) -> None:
    """Add the rows, votes and agreement of one target and suite to `results`."""
    cases, table = suite.cases, metrics.collapsed(metrics.votes(suite.suite.kind, found), suite.samples)
    who = {"target": spec.name, "attack": spec.attack, "mitigation": spec.mitigation, "seed": spec.seed}
    items = Items(
        [c.id for c in cases],
        [c.key[:16] for c in cases],
        [c.category for c in cases],
        {f"{metric}|{judge}": column for (metric, judge), column in table.items()},
        {name: scale for name in found if (scale := asked[name].scale) is not None},
        {name: dict(reasons) for name, said in found.items() if (reasons := Counter(v.unscored for v in said if v.unscored))},
    )
    results.add({**who, "suite": suite.name}, suite.suite.kind, items)
