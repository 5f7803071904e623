"""Put the same prompts to several targets, judge all answers, and count.

Every target answers everything and is let go of, then its guard sees the answers (asking.py), then the judges are asked, one
after the other (judging.py): peak memory is the largest of a target, a guard and a judge, not their sum. With a store, answers and verdicts are kept as
they come, and the same call goes on where it was killed. Prompts that any target was trained on (its manifest's "overlap")
are left out for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from resafe.backends import Backend
from resafe.errors import ResafeError
from resafe.eval import lmeval
from resafe.eval.asking import Answers, Asking, repeated, run_name, under
from resafe.eval.judges import get_judge, panel
from resafe.eval.judging import judged, record
from resafe.eval.results import Results
from resafe.eval.suite import Blocked, LoadedSuite, load_suite
from resafe.eval.targets import Target, TargetSpec, resolve
from resafe.eval.variants import load_variants, varied
from resafe.rows import key, user_text
from resafe.store import Store

Say = Callable[[str], None]


def evaluate(
    targets: Sequence[str | Path | TargetSpec | Target | Backend],
    suites: Sequence[str | Path],
    judges: Sequence[str] | None = None,
    limit: int | None = None,
    output: Path | None = None,
    batch_size: int = 64,
    labels: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    reveal: bool = False,
    log: Say = lambda _: None,
    variants: Sequence[str | Path] = (),
    store: Path | None = None,
    lm_eval: Sequence[str] = (),
    workers: int = 8,
    requests_per_minute: float | None = None,
) -> Results:
    """Evaluate `targets` on `suites`; with `output`, save the results there.

    `judges` are asked in place of the default second judge (`judges.panel`). `limit` draws that many prompts per suite,
    by `seed`. `labels` maps a target to its attack, mitigation and training seed. `variants` ask the same prompts in
    other ways besides (variants.py). `lm_eval` names tasks of lm-evaluation-harness, run on every folder beside it.

    `store` is a folder for answers and verdicts (mode 0600); without one they are forgotten. What a served model or judge
    said is kept only until its evaluation is complete, since what is served cannot be told. `reveal` puts the responses
    into the output (transcripts.jsonl, mode 0600); without it the output holds none. `workers` and `requests_per_minute`
    bound what a served model is asked at a time.
    """
    specs = resolve(targets, labels)
    if lm_eval and (other := [s.name for s in specs if s.folder is None]):
        raise ResafeError(f"lm-evaluation-harness measures model folders; {other[0]} is none.")
    drawn, dropped = _without_overlap(_load(suites, limit, seed, variants, bool(lm_eval)), specs)
    panels = {s.name: panel(s.suite, judges) for s in drawn}
    names = list(dict.fromkeys(n for found in panels.values() for n in found))
    if idle := [j for j in judges or () if j not in names]:
        raise ResafeError(f"judge {idle[0]} has nothing to say of these suites: leave it out, or name a suite that it judges.")
    run = run_name(output, [[s.served or s.name for s in specs], [s.name for s in drawn], names, limit, seed])
    results = Results(meta={"seed": seed, "limit": limit, "suites": _described(drawn, dropped), "targets": {}, "judges": {}})
    kept = Store(store) if store is not None else None
    try:
        asked = {name: get_judge(name, kept, log, run) for name in names}
        serving = {"workers": workers, "requests_per_minute": requests_per_minute}
        asking = Asking(drawn, kept, run, log, batch_size, serving, results.meta["targets"])
        answers = asking.everything(specs)
        found, results.meta["judges"] = judged(specs, drawn, answers, panels, asked, log)
        for spec in specs:
            for suite in drawn:
                record(results, spec, suite, found[spec.name, suite.name], asked)
        _add_lm_eval(results, specs, lm_eval, limit, log)
        if reveal:
            results.transcripts = _transcripts(drawn, answers)
        if output is not None:
            results.save(Path(output))
        if kept and not any(a.error for by_suite in answers.values() for part in by_suite.values() for a in part):
            kept.forget_run(run)
    finally:
        if kept:
            kept.close()
    return results


def _add_lm_eval(results: Results, specs: Sequence[TargetSpec], tasks: Sequence[str], limit: int | None, log: Say) -> None:
    """Standard suites by lm-evaluation-harness, in a process of its own, on the models themselves (no guard before them)."""
    for spec in specs if tasks else ():
        assert spec.folder is not None
        log(f"{spec.name}: lm-evaluation-harness")
        found = lmeval.measure(spec.folder, tasks, limit, under(spec.name, log))
        who = {"target": spec.name, "attack": spec.attack, "mitigation": spec.mitigation, "seed": spec.seed}
        lmeval.add(results, who, found)


def _load(
    suites: Sequence[str | Path], limit: int | None, seed: int, variants: Sequence[str | Path], or_none: bool
) -> list[LoadedSuite]:
    """The suites, then their variants."""
    drawn = [load_suite(s, limit, seed) for s in suites]
    other = load_variants(variants)
    for variant in other:
        if not any(s.suite.kind in variant.kinds for s in drawn):
            raise ResafeError(f"variant {variant.name} is for {' and '.join(variant.kinds)} suites: name one.")
    drawn += [varied(s, v, seed) for v in other for s in list(drawn) if not s.variant and s.suite.kind in v.kinds]
    names = [s.name for s in drawn]
    if not drawn and not or_none:
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
            raise ResafeError(f"every prompt of suite {suite.name} was used to train or to calibrate {', '.join(names)}.")
        kept.append(replace(suite, cases=cases))
        dropped[suite.name] = gone
    return kept, dropped


def _trained_on(spec: TargetSpec, suite: LoadedSuite) -> list[str]:
    """Ids of the cases in a target's training data: recorded by id under the suite's name, or by prompt under any."""
    ids = {str(i) for i in spec.overlap.get(suite.base, ())}
    prompts = {key(str(p)) for found in spec.overlap.values() for p in found}
    return [c.id for c in suite.cases if c.id in ids or key(user_text(c.messages)) in prompts]


def _described(drawn: list[LoadedSuite], dropped: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    how = {
        s.name: {"n": len(s.cases), "dropped": dropped[s.name], "of": s.of, "variant": s.variant, "samples": s.samples}
        for s in drawn
    }
    return {s.name: {**s.suite.model_dump(), **how[s.name], "sampling": asdict(s.sampling)} for s in drawn}


def _transcripts(drawn: list[LoadedSuite], answers: Answers) -> list[dict[str, Any]]:
    return [
        {"target": target, "suite": suite.name, "id": case.id, "messages": case.asked, "response": answer.text}
        | ({"error": answer.error} if answer.error else {})
        | ({"blocked": True} if isinstance(answer, Blocked) else {})
        for target, by_suite in answers.items()
        for suite in drawn
        for case, answer in zip(repeated(suite), by_suite[suite.name])
    ]
