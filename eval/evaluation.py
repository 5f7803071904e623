"""Put the same prompts to several targets, judge all answers, and count.

Two phases: every target answers everything and is let go of, then the judges are asked; peak memory is the larger of a
target and a judge, not their sum. Prompts that any target was trained on (its manifest's "overlap") are left out for
all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.errors import ResafeError
from resafe.eval import metrics
from resafe.eval.judges import Judge, Verdict, get_judge, identity, panel
from resafe.eval.results import Items, Results
from resafe.eval.suite import LoadedSuite, load_suite
from resafe.eval.targets import FolderTarget, Target, TargetSpec, opened, resolve
from resafe.eval.usage import measured
from resafe.rows import key, user_text

if TYPE_CHECKING:
    from resafe.generate import Answer

Answers = dict[str, dict[str, list["Answer"]]]  # target -> suite -> answers


def evaluate(
    targets: Sequence[str | Path | TargetSpec | Target],
    suites: Sequence[str | Path],
    judges: Sequence[str] | None = None,
    limit: int | None = None,
    output: Path | None = None,
    batch_size: int = 64,
    labels: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    reveal: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> Results:
    """Evaluate `targets` on `suites`; with `output`, save the results there.

    `judges` are asked in place of the default second judge (`judges.panel`). `limit` draws that many prompts per suite,
    by `seed`. `labels` maps a target to its attack, mitigation and training seed. `reveal` keeps the responses
    (transcripts.jsonl, mode 0600); without it no response is kept or written.
    """
    specs = resolve(targets, labels)
    drawn, dropped = _without_overlap(_load(suites, limit, seed), specs)
    results = Results(
        meta={"seed": seed, "limit": limit, "suites": _described(drawn, dropped), "targets": {}, "judges": {}}
    )
    panels = {s.name: panel(s.suite, judges) for s in drawn}
    asked = {name: get_judge(name) for name in dict.fromkeys(n for names in panels.values() for n in names)}
    answers: Answers = {}
    for spec in specs:
        log(f"{spec.name}: answering {sum(len(s.cases) for s in drawn)} prompts")
        answers[spec.name] = _answered(spec, drawn, batch_size, results)
    for spec in specs:
        log(f"{spec.name}: judging")
        for suite in drawn:
            verdicts = _judged(suite, answers[spec.name][suite.name], panels[suite.name], asked)
            _record(results, spec, suite, verdicts)
    results.meta["judges"] = {name: identity(judge) for name, judge in asked.items()}
    if reveal:
        results.transcripts = _transcripts(drawn, answers)
    if output is not None:
        results.save(Path(output))
    return results


def _load(suites: Sequence[str | Path], limit: int | None, seed: int) -> list[LoadedSuite]:
    drawn = [load_suite(s, limit, seed) for s in suites]
    names = [s.name for s in drawn]
    if not drawn:
        raise ResafeError("nothing to evaluate on: name at least one suite.")
    if len(set(names)) < len(names):
        raise ResafeError(f"two suites are named '{max(names, key=names.count)}': name each once.")
    return drawn


def _without_overlap(
    drawn: list[LoadedSuite], specs: list[TargetSpec]
) -> tuple[list[LoadedSuite], dict[str, dict[str, list[str]]]]:
    """The suites without the prompts that some target was trained on; suite -> prompt id -> those targets."""
    kept, dropped = [], {}
    for suite in drawn:
        gone: dict[str, list[str]] = {}
        for spec in specs:
            for prompt in _trained_on(spec, suite):
                gone.setdefault(prompt, []).append(spec.name)
        cases = [c for c in suite.cases if c.id not in gone]
        names = sorted({name for found in gone.values() for name in found})
        if not cases:
            raise ResafeError(f"every prompt of suite {suite.name} was in the training data of {', '.join(names)}.")
        kept.append(replace(suite, cases=cases))
        dropped[suite.name] = gone
    return kept, dropped


def _trained_on(spec: TargetSpec, suite: LoadedSuite) -> list[str]:
    """Ids of the cases in a target's training data: recorded by id under the suite's name, or by prompt under any."""
    ids = {str(i) for i in spec.overlap.get(suite.name, ())}
    prompts = {key(str(p)) for found in spec.overlap.values() for p in found}
    return [c.id for c in suite.cases if c.id in ids or key(user_text(c.messages)) in prompts]


def _described(drawn: list[LoadedSuite], dropped: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    return {s.name: {**s.suite.model_dump(), "n": len(s.cases), "dropped": dropped[s.name]} for s in drawn}


def _answered(spec: TargetSpec, drawn: list[LoadedSuite], batch_size: int, results: Results) -> dict[str, list[Answer]]:
    entry: dict[str, Any] = {"folder": str(spec.folder or ""), "guard": "", "template": ""}
    answers = {}
    with measured() as usage, opened(spec, batch_size) as target:
        if isinstance(target, FolderTarget):
            entry |= {"guard": target.guard, "template": target.template}
        for suite in drawn:
            found = target.answer([c.messages for c in suite.cases], suite.suite.max_new_tokens)
            if len(found) != len(suite.cases):
                raise ResafeError(
                    f"target {spec.name} gave {len(found)} answers to {len(suite.cases)} prompts of {suite.name}."
                )
            answers[suite.name] = found
    results.meta["targets"][spec.name] = {**entry, **asdict(usage)}
    return answers


def _judged(
    suite: LoadedSuite, answers: list[Answer], names: list[str], asked: dict[str, Judge]
) -> dict[str, list[Verdict]]:
    found = {}
    for name in names:
        found[name] = asked[name](suite.suite, suite.cases, answers)
        if len(found[name]) != len(answers):
            raise ResafeError(
                f"judge {name} gave {len(found[name])} verdicts on {len(answers)} answers of {suite.name}."
            )
    return found


def _record(results: Results, spec: TargetSpec, suite: LoadedSuite, verdicts: dict[str, list[Verdict]]) -> None:
    """Add the rows, votes and agreement of one target and suite to `results`."""
    cases, table = suite.cases, metrics.votes(suite.suite.kind, verdicts)
    who = {"target": spec.name, "attack": spec.attack, "mitigation": spec.mitigation, "seed": spec.seed}
    items = Items(
        [c.id for c in cases],
        [c.key[:16] for c in cases],
        [c.category for c in cases],
        {f"{metric}|{judge}": column for (metric, judge), column in table.items()},
    )
    results.add({**who, "suite": suite.name}, suite.suite.kind, items)


def _transcripts(drawn: list[LoadedSuite], answers: Answers) -> list[dict[str, Any]]:
    return [
        {"target": target, "suite": suite.name, "id": case.id, "messages": case.messages, "response": answer.text}
        for target, by_suite in answers.items()
        for suite in drawn
        for case, answer in zip(suite.cases, by_suite[suite.name])
    ]
