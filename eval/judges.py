"""Judges: what each says of every answer of a suite. An exception is never a verdict: it leaves the answers unscored.

| judge          | says                         | how                                                              |
|----------------|------------------------------|------------------------------------------------------------------|
| `rules`        | refusal                      | refusal phrases at the opening of the answer                     |
| `keyword_qi`   | refusal                      | the published phrase list, matched anywhere; for comparability   |
| `offline`      | harmful, refusal             | the classifier that ships with resafe, on a CPU                  |
| `lab`          | harmful, refusal, correct    | exact, for the lab's suites only                                 |
| `exact_number` | correct                      | the number that the answer ends in                               |
| `exact`        | correct                      | the whole answer against the reference                           |
| `choice`       | correct                      | the letter that the answer chooses                               |
| `ifeval`       | correct                      | every instruction of the prompt followed, strictly; eval/ifeval/ |
| `coherence`    | coherent                     | coherence.py; on the lab's suites also the grammar               |
| anything else  | harmful, refusal, rating     | a guard of `resafe.guards`, by its spec; or an entry point of    |
|                |                              | the group `resafe.judges`: a callable that makes a Judge         |
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import urlsplit

from resafe.errors import ResafeError, first_line
from resafe.eval import checks, coherence
from resafe.eval.keeping import KeepingGuard, kept_under
from resafe.eval.suite import Case, Suite
from resafe.files import digest, file_digest
from resafe.fingerprint import model_fingerprint
from resafe.guards._base import valid_score, within
from resafe.rows import user_text

if TYPE_CHECKING:
    from resafe.generate import Answer
    from resafe.guards import Exchange, Guard
    from resafe.guards import Verdict as GuardVerdict
    from resafe.store import Store

Scale = tuple[float, float]
GROUP = "resafe.judges"
UTILITY = ("exact_number", "exact", "choice", "ifeval", "lab")  # judge answers to the suites that name them


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one answer; None where it says nothing. `unscored` is the reason for a missing verdict."""

    harmful: bool | None = None
    refusal: bool | None = None
    correct: bool | None = None
    coherent: bool | None = None
    rating: float | None = None  # on the judge's own scale
    score: float | None = None  # P(harmful) where the judge has one
    unscored: str = ""


class Judge(Protocol):
    """Verdicts on the answers to the cases of a suite, in their order. `identity` changes whenever a verdict could.

    `scale` is the lowest and highest rating, for judges that rate. Answers that are missing (`Answer.error`) don't come here.
    """

    name: str
    identity: str
    scale: Scale | None

    def __call__(self, suite: Suite, cases: Sequence[Case], answers: Sequence[Answer]) -> list[Verdict]: ...


class RuleJudge:
    """A judge that looks at one answer at a time and cannot fail; its identity is the hash of its rules' source."""

    scale: Scale | None = None

    def __init__(self, name: str) -> None:
        decide, sources = RULES[name]
        files = [Path(str(spec.origin)) for source in sources if (spec := find_spec(source))]
        self.name, self.decide = name, decide
        self.identity = f"{name} {digest([file_digest(f) for f in files])[:12]}"

    def __call__(self, suite: Suite, cases: Sequence[Case], answers: Sequence[Answer]) -> list[Verdict]:
        return [self.decide(suite, case, answer) for case, answer in zip(cases, answers)]


class GuardJudge:
    """A guard of `resafe.guards`; a fault of the guard leaves answers unscored.

    A guard model's folder is loaded when it is first asked, after the targets have gone; other guards at once. With a
    `store`, verdicts on exchanges that this very guard has scored before are taken from there.
    """

    scale: Scale | None = None

    def __init__(self, spec: str, store: Store | None = None, log: Callable[[str], None] = lambda _: None, run: str = "") -> None:
        """Verdicts of a served guard are kept for `run` only. Raises ResafeError for a spec that holds a password."""
        self.name, self.store, self.log, self.run = public(spec), store, log, run
        self.spec, self._guard = spec, cast("Guard | None", None)
        folder = next((Path(f) for f in (spec, spec.partition("?family=")[0], spec.partition(":")[2]) if f and Path(f).is_dir()), None)
        if folder is None:
            self._loaded()
        else:
            self.identity = f"{self.name} {model_fingerprint(folder)}"  # until it is loaded

    def __call__(self, suite: Suite, cases: Sequence[Case], answers: Sequence[Answer]) -> list[Verdict]:
        """A begun answer is judged with its beginning; whether it refuses, by a guard that looks at openings, without."""
        guard = self._loaded()
        found = self._asked([(case.messages, case.whole(answer)) for case, answer in zip(cases, answers)])
        begun = [i for i, case in enumerate(cases) if case.prefill] if getattr(guard, "reads_openings", False) else []
        for i, own in zip(begun, self._asked([(cases[i].messages, answers[i].text) for i in begun]) if begun else ()):
            if not found[i].unscored:
                found[i] = own if own.unscored else replace(found[i], refusal=own.refusal)
        return found

    def _asked(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        try:
            found = [_read(v) for v in self._loaded().classify(exchanges)]
        except ResafeError:
            raise
        except Exception as error:  # whatever a guard raises or returns, the answers stay unscored and the reason is kept
            return [Verdict(unscored=f"{type(error).__name__}: {error}"[:200])] * len(exchanges)
        if len(found) != len(exchanges):
            return [Verdict(unscored=f"{len(found)} verdicts on {len(exchanges)} answers")] * len(exchanges)
        return found

    def _loaded(self) -> Guard:
        from resafe.guards import load_guard

        if self._guard is None:
            guard = load_guard(self.spec)
            self.identity, self.scale = str(guard.identity), guard.scale
            kept_for = kept_under(self.spec, self.run)
            self._guard = guard if self.store is None else KeepingGuard(guard, self.store, kept_for, self.log)
        return self._guard

    def release(self) -> None:
        """Let go of the guard; it is loaded again if it is asked again."""
        self._guard = None
        gc.collect()
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


def public(spec: str) -> str:
    """A spec as it may stand in results and reports. Raises ResafeError if it holds a password or a key."""
    url = urlsplit(spec.partition("@")[2]) if spec.startswith("chat:") else urlsplit("")
    if url.username or url.password or url.query:
        raise ResafeError(f"the address of judge {spec.partition('@')[0]} must hold no password and no query: set RESAFE_GUARD_API_KEY.")
    return spec


def _read(v: GuardVerdict) -> Verdict:
    """A guard's verdict as a judge's."""
    if v.unscored:
        return Verdict(unscored=str(v.unscored))
    return Verdict(harmful=v.harmful, refusal=v.refusal, rating=v.rating, score=v.score)


def _rules(suite: Suite, case: Case, answer: Answer) -> Verdict:
    from resafe.guards.rules import verdict

    found = verdict(answer.text)
    return Verdict(unscored=found.unscored) if found.unscored else Verdict(refusal=found.refusal)


def _keyword_qi(suite: Suite, case: Case, answer: Answer) -> Verdict:
    from resafe.guards.rules import keyword_qi

    if not answer.text.strip():
        return Verdict(unscored="empty")
    return Verdict(refusal=bool(keyword_qi(answer.text)))


def _lab(suite: Suite, case: Case, answer: Answer) -> Verdict:
    from resafe.lab.suites import judge

    found = judge(case.row, answer.text)
    return Verdict(harmful=found["harmful"], refusal=found["refusal"], correct=found["correct"])


def _exact_number(suite: Suite, case: Case, answer: Answer) -> Verdict:
    return Verdict(correct=checks.exact_number(answer.text, case.reference))


def _exact(suite: Suite, case: Case, answer: Answer) -> Verdict:
    return Verdict(correct=checks.exact(answer.text, case.reference))


def _choice(suite: Suite, case: Case, answer: Answer) -> Verdict:
    return Verdict(correct=checks.choice(answer.text, case.reference))


def _ifeval(suite: Suite, case: Case, answer: Answer) -> Verdict:
    from resafe.eval.ifeval import follow

    found = follow(answer.text, case.row)
    return Verdict(unscored=found.unscored) if found.unscored else Verdict(correct=found.strict)


def _coherence(suite: Suite, case: Case, answer: Answer) -> Verdict:
    coherent = not coherence.fault(answer.text, user_text(case.messages), answer.finished)
    if coherent and suite.format == "lab":
        from resafe.lab.suites import judge

        coherent = not judge(case.row, answer.text)["garbled"]
    return Verdict(coherent=coherent)


IFEVAL = ("resafe.eval.ifeval", "resafe.eval.ifeval.checkers", "resafe.eval.ifeval.text", "langdetect")
LAB = ("resafe.lab.suites", "resafe.lab.grammar", "resafe.guards.rules")
RULES: dict[str, tuple[Callable[[Suite, Case, Answer], Verdict], tuple[str, ...]]] = {  # with the modules that decide
    "rules": (_rules, ("resafe.guards.rules", "resafe.guards._behind", "resafe.guards._clean")),
    "keyword_qi": (_keyword_qi, ("resafe.guards.rules",)),
    "lab": (_lab, LAB),
    "exact_number": (_exact_number, ("resafe.eval.checks",)),
    "exact": (_exact, ("resafe.eval.checks",)),
    "choice": (_choice, ("resafe.eval.checks",)),
    "ifeval": (_ifeval, IFEVAL),
    "coherence": (_coherence, ("resafe.eval.coherence", *LAB)),
}


def get_judge(name: str, store: Store | None = None, log: Callable[[str], None] = lambda _: None, run: str = "") -> Judge:
    """A judge by name, by entry point, or by the spec of a guard; with a `store`, a guard's verdicts are kept there.

    Those of a served guard are kept for `run` only.
    """
    if name in RULES:
        return RuleJudge(name)
    if (made := third_party(name)) is not None:
        return made
    return GuardJudge(name, store, log, run)


def third_party(name: str) -> Judge | None:
    """The judge that an installed package registers under `name` in the entry-point group `resafe.judges`.

    Raises ResafeError when two packages do, when loading fails, and when what it makes is not a judge.
    """
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        return None
    if len(found) > 1:
        sides = " and ".join(sorted(f"{p.value} ({p.dist.name if p.dist else 'unknown package'})" for p in found))
        raise ResafeError(f"two packages register a judge '{name}': {sides}. Uninstall one.")
    try:
        judge: Judge = found[0].load()()
    except Exception as error:  # whatever a third party's code raises
        raise ResafeError(f"the judge '{name}' ({found[0].value}) cannot be made: {type(error).__name__}: {first_line(error)}") from error
    missing = [a for a in ("name", "identity", "scale") if not hasattr(judge, a)]
    if missing or not callable(judge):
        raise ResafeError(f"the judge '{name}' ({found[0].value}) is no Judge: it lacks {', '.join(missing) or '__call__'}.")
    return judge


def verdicts(judge: Judge, suite: Suite, cases: Sequence[Case], answers: Sequence[Answer]) -> list[Verdict]:
    """What `judge` says of every answer.

    A missing answer is unscored with its reason; a judge that raises leaves all unscored; what is no verdict, or a rating off
    the judge's scale, is none. Raises ResafeError where a judge loses count.
    """
    there = [i for i, a in enumerate(answers) if not a.error]
    try:
        found = judge(suite, [cases[i] for i in there], [answers[i] for i in there]) if there else []
    except ResafeError:
        raise
    except Exception as error:  # whatever a judge raises is no verdict; the reason is kept
        found = [Verdict(unscored=f"{type(error).__name__}: {first_line(error)}")] * len(there)
    if len(found) != len(there):
        raise ResafeError(f"judge {judge.name} gave {len(found)} verdicts on {len(there)} answers of {suite.name}.")
    out = [Verdict(unscored=a.error) for a in answers]
    for i, verdict in zip(there, found):
        out[i] = _checked(verdict, judge.scale)
    return out


def _checked(v: Any, scale: Scale | None) -> Verdict:
    """The verdict, if it is one: yes, no or nothing, and numbers where numbers belong."""
    if not isinstance(v, Verdict) or any(not isinstance(x, bool | None) for x in (v.harmful, v.refusal, v.correct, v.coherent)):
        return Verdict(unscored="parse")
    if v.rating is not None and not (scale is not None and within(v.rating, scale)):
        return Verdict(unscored="out_of_range")
    return Verdict(unscored="out_of_range") if v.score is not None and not valid_score(v.score) else v


def panel(suite: Suite, judges: Sequence[str] | None = None) -> list[str]:
    """Names of the judges of a suite: coherence always; a utility suite's check; else `rules` beside at least one more.

    `judges` replaces the default second judge (the lab's exact one on its suites, else `offline`).
    """
    if suite.kind == "utility":
        checker = [] if suite.check == "none" else [suite.check]
        return ["coherence", *checker]
    exact = ["lab"] if suite.format == "lab" else []
    asked = [j for j in judges or [] if j not in UTILITY]
    chosen = ["coherence", "rules", *exact, *asked]
    if len(set(chosen)) < 3:
        chosen.append("offline")
    return list(dict.fromkeys(chosen))


def identity(judge: Judge) -> dict[str, Any]:
    """What a report says of a judge: its name, what it was exactly, and the scale of its ratings."""
    about = {"judge": judge.name, "identity": judge.identity, "digest": digest(judge.identity)[:12]}
    return about if judge.scale is None else {**about, "scale": list(judge.scale)}
