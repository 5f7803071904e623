"""Put the same prompts to several targets, judge all answers, and count.

Three phases: every target answers everything and is let go of, then its guard sees the answers, then the judges are asked;
peak memory is the largest of a target, a guard and a judge, not their sum. With a store, answers and verdicts are kept as
they come, and the same call goes on where it was killed. Prompts that any target was trained on (its manifest's "overlap")
are left out for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.backends import Backend, Request
from resafe.errors import ResafeError
from resafe.eval import keeping, lmeval, metrics
from resafe.eval.judges import Judge, Verdict, get_judge, identity, panel, verdicts
from resafe.eval.keeping import KeepingGuard
from resafe.eval.results import Items, Results
from resafe.eval.suite import Blocked, Case, LoadedSuite, load_suite
from resafe.eval.targets import Target, TargetSpec, opened, output_filter, resolve
from resafe.eval.variants import load_variants, varied
from resafe.rows import key, user_text
from resafe.store import Store
from resafe.usage import added, measured

if TYPE_CHECKING:
    from resafe.backends.local import Bases
    from resafe.generate import Answer

Answers = dict[str, dict[str, list["Answer"]]]  # target -> suite -> answers, those to one case in a row
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

    `store` is a folder for answers and verdicts (mode 0600); without one they are forgotten. Answers of a served model
    are kept only until its evaluation is complete, since what it serves cannot be told. `reveal` puts the responses
    into the output (transcripts.jsonl, mode 0600); without it the output holds none. `workers` and `requests_per_minute`
    bound what a served model is asked at a time.
    """
    specs = resolve(targets, labels)
    if lm_eval and (other := [s.name for s in specs if s.folder is None]):
        raise ResafeError(f"lm-evaluation-harness measures model folders; {other[0]} is none.")
    drawn, dropped = _without_overlap(_load(suites, limit, seed, variants, bool(lm_eval)), specs)
    results = Results(
        meta={"seed": seed, "limit": limit, "suites": _described(drawn, dropped), "targets": {}, "judges": {}}
    )
    with ExitStack() as stack:
        kept = stack.enter_context(Store(store)) if store is not None else None
        panels = {s.name: panel(s.suite, judges) for s in drawn}
        asked = {name: get_judge(name, kept, log) for name in dict.fromkeys(n for names in panels.values() for n in names)}
        serving = {"workers": workers, "requests_per_minute": requests_per_minute}
        answers = _answers(specs, drawn, batch_size, serving, output, kept, results, log)
        for spec in specs:
            log(f"{spec.name}: judging")
            for suite in drawn:
                cases = _repeated(suite)
                found = {n: verdicts(asked[n], suite.suite, cases, answers[spec.name][suite.name]) for n in panels[suite.name]}
                _record(results, spec, suite, found, asked)
        results.meta["judges"] = {name: identity(judge) for name, judge in asked.items()}
    _add_lm_eval(results, specs, lm_eval, limit, log)
    if reveal:
        results.transcripts = _transcripts(drawn, answers)
    if output is not None:
        results.save(Path(output))
    _forget_served(specs, output, store)
    return results


def _answers(
    specs: Sequence[TargetSpec], drawn: list[LoadedSuite], batch_size: int, serving: Mapping[str, Any], output: Path | None,
    kept: Store | None, results: Results, log: Say,
) -> Answers:  # fmt: skip
    """Every target's answers, as its users get them: behind its guard."""
    from resafe.backends.local import Bases

    answers: Answers = {}
    with Bases() as bases:
        for spec in specs:
            log(f"{spec.name}: answering {sum(len(s.cases) * s.samples for s in drawn)} prompts")
            answers[spec.name] = _answered(spec, drawn, batch_size, bases, serving, output, kept, results, log)
    for spec in specs:
        if spec.guard:
            answers[spec.name] = _guarded(spec, drawn, answers[spec.name], kept, results, log)
    return answers


def _under(name: str, log: Say) -> Say:
    """Lines about one target."""
    return lambda line: log(f"{name}: {line}")


def _add_lm_eval(results: Results, specs: Sequence[TargetSpec], tasks: Sequence[str], limit: int | None, log: Say) -> None:
    """Standard suites by lm-evaluation-harness, in a process of its own, on the models themselves (no guard before them)."""
    for spec in specs if tasks else ():
        assert spec.folder is not None
        log(f"{spec.name}: lm-evaluation-harness")
        found = lmeval.measure(spec.folder, tasks, limit, _under(spec.name, log))
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
            raise ResafeError(f"every prompt of suite {suite.name} was in the training data of {', '.join(names)}.")
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


def _repeated(suite: LoadedSuite) -> list[Case]:
    """Each case as often as it is answered."""
    return [c for c in suite.cases for _ in range(suite.samples)]


def _requests(suite: LoadedSuite) -> tuple[list[Request], list[list[Any]]]:
    """What a suite asks for, and where each request comes from (part of an answer's address)."""
    requests, origins = [], []
    for case in suite.cases:
        for k in range(suite.samples):
            sampling = replace(suite.sampling, seed=suite.sampling.seed * 1_000_003 + k)
            requests.append(Request(case.asked, suite.suite.max_new_tokens, sampling))
            origins.append([suite.name, suite.suite.version, case.id, k])
    return requests, origins


def _answered(
    spec: TargetSpec, drawn: list[LoadedSuite], batch_size: int, bases: Bases, serving: Mapping[str, Any], output: Path | None,
    kept: Store | None, results: Results, log: Say,
) -> dict[str, list[Answer]]:  # fmt: skip
    parts = [_requests(s) for s in drawn]
    requests, origins = [r for rs, _ in parts for r in rs], [o for _, os in parts for o in os]
    workdir = kept.root / "batches" if kept else None
    say = _under(spec.name, log)
    with measured() as usage, opened(spec, batch_size, bases, workdir=workdir, log=say, **serving) as backend:
        identity = _identity(spec, backend, output)
        memory = kept.log("answers", identity) if kept and identity is not None else None
        found, reused = keeping.answered(backend, requests, origins, memory, identity, say)
        about = {"identity": backend.identity or "", "template": backend.template}
    results.meta["targets"][spec.name] = {
        "folder": str(spec.folder or ""), "served": spec.served, "guard": "", **about, **asdict(usage),
        "tokens": sum(a.tokens for a in found), "answers": len(found), "reused": reused, "cost": dict(spec.cost),
    }  # fmt: skip
    counts = [len(rs) for rs, _ in parts]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return {s.name: found[start : start + n] for s, start, n in zip(drawn, starts, counts)}


def _identity(spec: TargetSpec, backend: Backend, output: Path | None) -> Any:
    """What answers are remembered under: the model; for a served one, this evaluation; else nothing."""
    if backend.identity is not None:
        return backend.identity
    return ["served", spec.served, str(output.absolute())] if spec.served and output is not None else None


def _forget_served(specs: Sequence[TargetSpec], output: Path | None, store: Path | None) -> None:
    """A complete evaluation of a served model is not an answer to the next one: the server may serve another by then."""
    if store is None or output is None:
        return
    for spec in specs:
        if spec.served and spec.folder is None:
            Store(store).forget("answers", ["served", spec.served, str(Path(output).absolute())])


def _guarded(
    spec: TargetSpec, drawn: list[LoadedSuite], answers: dict[str, list[Answer]], kept: Store | None, results: Results, log: Say
) -> dict[str, list[Answer]]:
    """The answers after the target's guard. Missing ones stay missing."""
    assert spec.guard is not None
    log(f"{spec.name}: filtering through its guard")
    with measured() as usage:
        guard = output_filter(spec.guard)
        about, guarding = guard.identity, guard
        if kept is not None:
            guarding = replace(guard, guard=KeepingGuard(guard.guard, kept))
        out = {}
        for suite in drawn:
            found, cases = answers[suite.name], _repeated(suite)
            texts = guarding.apply([c.messages for c in cases], [c.whole(a) for c, a in zip(cases, found)])
            out[suite.name] = [_filtered(c, a, text) for c, a, text in zip(cases, found, texts)]
    entry = results.meta["targets"][spec.name]
    entry |= {"guard": about, **added({k: entry[k] for k in asdict(usage)}, asdict(usage))}
    return out


def _filtered(case: Case, answer: Answer, text: str) -> Answer:
    """What a user sees: the answer, or the guard's refusal in its place."""
    blocked = not answer.error and text != case.whole(answer)
    return Blocked(text, answer.tokens, True) if blocked else answer


def _record(
    results: Results, spec: TargetSpec, suite: LoadedSuite, found: dict[str, list[Verdict]], asked: Mapping[str, Judge]
) -> None:
    """Add the rows, votes and agreement of one target and suite to `results`."""
    cases, table = suite.cases, metrics.collapsed(metrics.votes(suite.suite.kind, found), suite.samples)
    who = {"target": spec.name, "attack": spec.attack, "mitigation": spec.mitigation, "seed": spec.seed}
    items = Items(
        [c.id for c in cases],
        [c.key[:16] for c in cases],
        [c.category for c in cases],
        {f"{metric}|{judge}": column for (metric, judge), column in table.items()},
        {name: scale for name in found if (scale := asked[name].scale) is not None},
    )
    results.add({**who, "suite": suite.name}, suite.suite.kind, items)


def _transcripts(drawn: list[LoadedSuite], answers: Answers) -> list[dict[str, Any]]:
    return [
        {"target": target, "suite": suite.name, "id": case.id, "messages": case.asked, "response": answer.text}
        | ({"error": answer.error} if answer.error else {})
        for target, by_suite in answers.items()
        for suite in drawn
        for case, answer in zip(_repeated(suite), by_suite[suite.name])
    ]
