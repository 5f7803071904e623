"""Judges: what each says of every answer of a suite. An exception is never a verdict: it leaves the answers unscored.

| judge          | says                         | how                                                              |
|----------------|------------------------------|------------------------------------------------------------------|
| `rules`        | refusal                      | refusal phrases at the opening of the answer                     |
| `keyword_qi`   | refusal                      | the published phrase list, matched anywhere; for comparability   |
| `offline`      | harmful, refusal             | the classifier that ships with resafe, on a CPU                  |
| `lab`          | harmful, refusal, correct    | exact, for the lab's suites only                                 |
| `exact_number` | correct                      | the number that the answer ends in                               |
| `coherence`    | coherent                     | coherence.py; on the lab's suites also the grammar               |
| anything else  | harmful, refusal             | a guard of `resafe.guards`, by its spec                          |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from resafe.errors import ResafeError
from resafe.eval import checks, coherence
from resafe.eval.suite import Case, Suite
from resafe.files import digest, file_digest
from resafe.rows import user_text

if TYPE_CHECKING:
    from resafe.generate import Answer
    from resafe.guards import Guard


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one answer; None where it says nothing. `unscored` is the reason for a missing verdict."""

    harmful: bool | None = None
    refusal: bool | None = None
    correct: bool | None = None
    coherent: bool | None = None
    unscored: str = ""


class Judge(Protocol):
    """Verdicts on the answers to the cases of a suite, in their order. `identity` changes whenever a verdict could."""

    name: str
    identity: str

    def __call__(self, suite: Suite, cases: Sequence[Case], answers: Sequence[Answer]) -> list[Verdict]: ...


class RuleJudge:
    """A judge that looks at one answer at a time and cannot fail; its identity is the hash of its rules' source."""

    def __init__(self, name: str) -> None:
        decide, sources = RULES[name]
        files = [Path(str(spec.origin)) for source in sources if (spec := find_spec(source))]
        self.name, self.decide = name, decide
        self.identity = f"{name} {digest([file_digest(f) for f in files])[:12]}"

    def __call__(self, suite: Suite, cases: Sequence[Case], answers: Sequence[Answer]) -> list[Verdict]:
        return [self.decide(suite, case, answer) for case, answer in zip(cases, answers)]


class GuardJudge:
    """A guard of `resafe.guards`; a fault of the guard leaves answers unscored.

    A guard model's folder is loaded when it is first asked, after the targets have gone; other guards at once.
    """

    def __init__(self, spec: str) -> None:
        self.name = self.identity = spec
        self._guard: Guard | None = None
        folders = spec, spec.partition("?family=")[0], spec.partition(":")[2]  # FOLDER, FOLDER?family=X, FAMILY:FOLDER
        if not any(folder and Path(folder).is_dir() for folder in folders):
            self._loaded()

    def __call__(self, suite: Suite, cases: Sequence[Case], answers: Sequence[Answer]) -> list[Verdict]:
        guard = self._loaded()
        exchanges = [(case.messages, answer.text) for case, answer in zip(cases, answers)]
        try:
            found = guard.classify(exchanges)
        except ResafeError:
            raise
        except Exception as error:  # whatever a guard raises, the answers stay unscored and the reason is kept
            return [Verdict(unscored=f"{type(error).__name__}: {error}"[:200])] * len(exchanges)
        if len(found) != len(exchanges):
            return [Verdict(unscored=f"{len(found)} verdicts on {len(exchanges)} answers")] * len(exchanges)
        return [
            Verdict(unscored=str(v.unscored)) if v.unscored else Verdict(harmful=v.harmful, refusal=v.refusal)
            for v in found
        ]

    def _loaded(self) -> Guard:
        from resafe.guards import load_guard

        if self._guard is None:
            self._guard = load_guard(self.name)
            self.identity = str(self._guard.identity)
        return self._guard


def _rules(suite: Suite, case: Case, answer: Answer) -> Verdict:
    from resafe.guards import is_refusal

    return Verdict(refusal=bool(is_refusal(answer.text)))


def _keyword_qi(suite: Suite, case: Case, answer: Answer) -> Verdict:
    from resafe.guards.rules import keyword_qi

    return Verdict(refusal=bool(keyword_qi(answer.text)))


def _lab(suite: Suite, case: Case, answer: Answer) -> Verdict:
    from resafe.lab.suites import judge

    found = judge(case.row, answer.text)
    return Verdict(harmful=found["harmful"], refusal=found["refusal"], correct=found["correct"])


def _exact_number(suite: Suite, case: Case, answer: Answer) -> Verdict:
    return Verdict(correct=checks.exact_number(answer.text, case.reference))


def _coherence(suite: Suite, case: Case, answer: Answer) -> Verdict:
    coherent = not coherence.fault(answer.text, user_text(case.messages), answer.finished)
    if coherent and suite.format == "lab":
        from resafe.lab.suites import judge

        coherent = not judge(case.row, answer.text)["garbled"]
    return Verdict(coherent=coherent)


LAB = ("resafe.lab.suites", "resafe.lab.grammar", "resafe.guards.rules")
RULES: dict[str, tuple[Callable[[Suite, Case, Answer], Verdict], tuple[str, ...]]] = {  # with the modules that decide
    "rules": (_rules, ("resafe.guards.rules",)),
    "keyword_qi": (_keyword_qi, ("resafe.guards.rules",)),
    "lab": (_lab, LAB),
    "exact_number": (_exact_number, ("resafe.eval.checks",)),
    "coherence": (_coherence, ("resafe.eval.coherence", *LAB)),
}


def get_judge(name: str) -> Judge:
    """A judge by name, or by the spec of a guard."""
    return RuleJudge(name) if name in RULES else GuardJudge(name)


def panel(suite: Suite, judges: Sequence[str] | None = None) -> list[str]:
    """Names of the judges of a suite: coherence always; a utility suite's check; else `rules` beside at least one more.

    `judges` replaces the default second judge (the lab's exact one on its suites, else `offline`).
    """
    if suite.kind == "utility":
        checker = [] if suite.check == "none" else [suite.check]
        return ["coherence", *checker]
    exact = ["lab"] if suite.format == "lab" else []
    asked = [j for j in judges or [] if j != "lab"]
    chosen = ["coherence", "rules", *exact, *asked]
    if len(set(chosen)) < 3:
        chosen.append("offline")
    return list(dict.fromkeys(chosen))


def identity(judge: Judge) -> dict[str, str]:
    """What a report says of a judge: its name and what it was exactly."""
    return {"judge": judge.name, "identity": judge.identity, "digest": digest(judge.identity)[:12]}
