"""The first half of an evaluation: every target answers everything, and its guard sees the answers.

One target is in memory at a time, then one guard. What is missing - a request that failed, a guard that could not be
asked - is no answer, and never a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resafe.backends import Backend, Request
from resafe.errors import ResafeError, first_line
from resafe.eval import keeping
from resafe.eval.keeping import KeepingGuard
from resafe.eval.suite import Blocked, Case, LoadedSuite
from resafe.eval.targets import TargetSpec, opened, output_filter
from resafe.files import digest
from resafe.generate import Answer
from resafe.store import Store
from resafe.usage import added, measured

if TYPE_CHECKING:
    from resafe.backends.local import Bases
    from resafe.guards import Verdict
    from resafe.guards.filter import OutputFilter

Say = Callable[[str], None]
Answers = dict[str, dict[str, list[Answer]]]  # target -> suite -> answers, those to one case in a row
UNREACHED = ("api_error", "timeout")  # a guard's faults that say nothing of the answer: users would see an outage


@dataclass
class Asking:
    """What is asked, and where it is kept. `targets` fills with how each target was measured.

    `run` names this evaluation: what a served model or judge said is kept under it until the evaluation is complete.
    """

    drawn: list[LoadedSuite]
    kept: Store | None
    run: str
    log: Say
    batch_size: int = 64
    serving: Mapping[str, Any] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def everything(self, specs: Sequence[TargetSpec]) -> Answers:
        """Every target's answers, as its users get them: behind its guard."""
        from resafe.backends.local import Bases

        answers: Answers = {}
        with Bases() as bases:
            for spec in specs:
                self.log(f"{spec.name}: answering {sum(len(s.cases) * s.samples for s in self.drawn)} prompts")
                answers[spec.name] = self.answered(spec, bases)
        for spec in specs:
            if spec.guard:
                answers[spec.name] = self.guarded(spec, answers[spec.name])
        return answers

    def answered(self, spec: TargetSpec, bases: Bases) -> dict[str, list[Answer]]:
        """A target's own answers, by suite."""
        parts = [_requests(s) for s in self.drawn]
        requests, origins = [r for rs, _ in parts for r in rs], [o for _, os in parts for o in os]
        say, workdir = under(spec.name, self.log), self.kept.root / "batches" if self.kept else None
        with measured() as usage, opened(spec, self.batch_size, bases, workdir=workdir, log=say, **self.serving) as backend:
            identity = self.identity(spec, backend)
            memory = self.kept.log("answers", identity) if self.kept and identity is not None else None
            found, reused = keeping.answered(backend, requests, origins, memory, identity, say)
            about = {"identity": backend.identity or "", "template": backend.template}
        self.targets[spec.name] = {
            "folder": str(spec.folder or ""), "served": spec.served, "labelled": spec.labelled, "guard": "", **about, **asdict(usage),
            "tokens": sum(a.tokens for a in found), "answers": len(found), "reused": reused, "cost": dict(spec.cost),
        }  # fmt: skip
        counts = [len(rs) for rs, _ in parts]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return {s.name: found[start : start + n] for s, start, n in zip(self.drawn, starts, counts)}

    def identity(self, spec: TargetSpec, backend: Backend) -> Any:
        """What answers are remembered under: the model; for a served one, this evaluation; for an object, nothing."""
        if backend.identity is not None:
            return backend.identity
        return ["served", spec.served, self.run] if spec.served else None

    def guarded(self, spec: TargetSpec, answers: dict[str, list[Answer]]) -> dict[str, list[Answer]]:
        """The answers after the target's guard. Raises ResafeError where the guard fails as a whole."""
        assert spec.guard is not None
        self.log(f"{spec.name}: filtering through its guard")
        with measured() as usage:
            guard = output_filter(spec.guard)
            about, faults = guard.identity, dict[str, int]()
            if (named := guard.entry.get("identity", about)) != about:
                self.log(f"{spec.name}: its manifest was written with the guard {named}; measured with {about}")
            if self.kept is not None:
                guard = replace(guard, guard=KeepingGuard(guard.guard, self.kept, keeping.kept_under(str(guard.entry["guard_model"]), self.run)))
            out = {suite.name: self._filtered(spec, guard, suite, answers[suite.name], faults) for suite in self.drawn}
        entry = self.targets[spec.name]
        entry |= {"guard": about, "guard_faults": faults, **added({k: entry[k] for k in asdict(usage)}, asdict(usage)), "tokens": entry["tokens"]}
        if faults:
            self.log(f"{spec.name}: its guard could not judge {_counted(faults)}; those answers count as missing")
        return out

    def _filtered(
        self, spec: TargetSpec, guard: OutputFilter, suite: LoadedSuite, answers: list[Answer], faults: dict[str, int]
    ) -> list[Answer]:
        cases = repeated(suite)
        there = [i for i, a in enumerate(answers) if not a.error]
        try:
            verdicts = guard.guard.classify([(list(cases[i].messages), cases[i].whole(answers[i])) for i in there])
        except ResafeError:
            raise
        except Exception as error:  # whatever a guard raises: its target cannot be measured behind it
            raise ResafeError(f"the guard of target {spec.name} failed: {type(error).__name__}: {first_line(error)}") from error
        if len(verdicts) != len(there):
            raise ResafeError(f"the guard of target {spec.name} gave {len(verdicts)} verdicts on {len(there)} answers.")
        out = list(answers)
        for i, verdict in zip(there, verdicts):
            out[i] = _seen(guard, answers[i], verdict, faults)
        return out


def _seen(guard: OutputFilter, answer: Answer, verdict: Verdict, faults: dict[str, int]) -> Answer:
    """What a user sees: the answer, or the guard's refusal in its place; nothing is known where the guard was not reached."""
    if verdict.unscored in UNREACHED:
        faults[verdict.unscored] = faults.get(verdict.unscored, 0) + 1
        return Answer(error=f"guard_{verdict.unscored}")
    return Blocked(guard.refusal, answer.tokens, True) if guard.blocks(verdict) else answer


def _requests(suite: LoadedSuite) -> tuple[list[Request], list[list[Any]]]:
    """What a suite asks for, and where each request comes from (part of an answer's address)."""
    requests, origins = [], []
    for case in suite.cases:
        for k in range(suite.samples):
            sampling = replace(suite.sampling, seed=suite.sampling.seed * 1_000_003 + k)
            requests.append(Request(case.asked, suite.suite.max_new_tokens, sampling))
            origins.append([suite.name, suite.suite.version, case.id, k])
    return requests, origins


def repeated(suite: LoadedSuite) -> list[Case]:
    """Each case as often as it is answered."""
    return [c for c in suite.cases for _ in range(suite.samples)]


def under(name: str, log: Say) -> Say:
    """Lines about one target."""
    return lambda line: log(f"{name}: {line}")


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{n} ({reason})" for reason, n in reasons.items())


def run_name(output: Path | None, asked: Iterable[Any]) -> str:
    """Names an evaluation, so that the same command goes on where it was: its output, else all that it was asked."""
    return str(Path(output).absolute()) if output is not None else digest(list(asked))
