"""`resafe repair --search`: the strength of a repair, chosen on development prompts and held-out rows, with LERP beside it.

Every dose is repaired into a folder of its own, measured and removed, so that the disk holds one candidate at a time. What was
measured stays beside the output until the search has succeeded: the same command resumes, and another margin only decides
anew. Models are measured without the guards that they may be served with.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resafe import manifest
from resafe.errors import ResafeError
from resafe.eval import Results, TargetSpec, evaluate, load_suite
from resafe.eval.dose import BEFORE, LERP, TUNED, Found, add_heldout, decide
from resafe.eval.judges import get_judge, panel
from resafe.eval.suite import LoadedSuite, names
from resafe.files import digest, write_json
from resafe.finetune import _run
from resafe.finetune._measure import row_votes
from resafe.finetune.repair import Job, perform
from resafe.fingerprint import model_fingerprint
from resafe.mitigations import Named, make
from resafe.mitigations.restore_weights import RestoreWeights
from resafe.models import read_config
from resafe.quiet import quieten
from resafe.rows import user_text

SUITES = ("advbench", "xstest_safe")
DONE = "done.json"
HELDOUT_LIMIT = 1000


@dataclass(frozen=True)
class Settings:
    """How to search. `doses` None takes the method's own; `store` keeps answers and verdicts, as an evaluation does."""

    suites: tuple[str, ...] = SUITES  # one harmful, one benign
    limit: int | None = 100  # prompts per suite, drawn by the run's seed; they are then spent for measuring the result
    margin: float = 0.02
    doses: tuple[float, ...] | None = None
    judges: tuple[str, ...] | None = None
    batch_size: int = 64
    store: Path | None = None


@dataclass(frozen=True)
class Searched:
    """What a search found; `job` has the chosen dose, if there is one."""

    job: Job
    found: Found
    results: Results
    overlap: dict[str, list[str]]  # the prompts that the choice was made on
    model: str | None  # fingerprint of the candidate that was chosen
    usage: dict[str, float]  # what searching took (resafe.usage)

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        used = {name: {"n": suite["n"], "version": suite.get("version")} for name, suite in self.results.meta["suites"].items()}
        return {**self.found.to_json(), "calibrated_on": used, "judges": self.results.meta["judges"], "usage": self.usage}


def finish(searched: Searched) -> Path:
    """Write the repaired checkpoint with the chosen dose, and how it was chosen into its manifest.

    Raises ResafeError where no dose was chosen. Says so if the checkpoint is not the very one that was measured.
    """
    if searched.found.chosen is None:
        raise ResafeError(searched.found.why)
    folder = perform(searched.job, searched.record, searched.overlap)
    if model_fingerprint(folder) != searched.model:
        searched.job.run.log("made again, the method gave other weights than those that were measured: evaluate the result before relying on these numbers")
    return folder


def search(job: Job, how: Settings) -> Searched:
    """Measure every dose of the one method of `job` that declares some, and every dose of LERP in its place; decide.

    Raises ResafeError before any work where there is no such method, its dose is given, or suites or rows do not fit.
    """
    at, parameter, doses = _searched(job.named, how.doses)
    method = job.named[at].name
    candidates = {(method, d): _with(job.named, at, {**job.named[at].spec, parameter: d}) for d in doses}
    if method != LERP:
        candidates |= {(LERP, d): _with(job.named, at, {"name": LERP, "strength": d}) for d in RestoreWeights.dose[1]}
    for named in candidates.values():
        for m in named:
            m.mitigation.check(m.name, job.run)
    suites = _suites(how, job.run.seed)
    if not job.heldout:
        raise ResafeError("a search measures utility on rows of the task that were not trained on: name them with --heldout (JSONL).")
    quieten()
    measuring = Measuring(job, how, suites)
    targets = {f"{name} {parameter if name == method else 'strength'}={d:.12g}": (name, d) for name, d in candidates}
    with _run.spending(measuring.work) as usage:
        measuring.references()
        for i, (target, named) in enumerate(zip(targets, candidates.values()), 1):
            job.run.log(f"[{i}/{len(targets)}] {target}")
            measuring.candidate(target, named, at)
    results = Results.merge(measuring.parts)
    found = decide(results, parameter, method, targets, how.margin)
    if found.chosen is None or found.chosen.dose is None:
        return Searched(job, found, results, _used(suites), None, usage)
    chosen = replace(job, named=candidates[method, found.chosen.dose])
    return Searched(chosen, found, results, _used(suites), measuring.models[found.chosen.target], usage)


def _searched(named: Sequence[Named], doses: tuple[float, ...] | None) -> tuple[int, str, tuple[float, ...]]:
    """Position of the method to search, its parameter, and the doses to try: the one method whose dose was left open."""
    dosed = {i: m.mitigation.dose for i, m in enumerate(named) if m.mitigation.dose is not None}
    free = {i: d for i, d in dosed.items() if d[0] not in named[i].mitigation.model_fields_set}
    if len(free) == 1:
        ((at, (parameter, own)),) = free.items()
        return at, parameter, tuple(dict.fromkeys(doses or own))
    if free:
        first, second, *_ = (f"{named[i].name}:{d[0]}" for i, d in free.items())
        raise ResafeError(f"--search finds one dose at a time, and both {first} and {second} are open: set all but one, such as {second}=0.5.")
    if dosed:
        given = " and ".join(f"{named[i].name}:{d[0]}" for i, d in dosed.items())
        raise ResafeError(f"--search finds a dose, and {given} is given: leave it out, or name the values to try with --doses.")
    raise ResafeError(f"--search finds the dose of a weight repair, and {' and '.join(m.name for m in named)} has none: name one that has, such as restore_weights.")


def _with(named: list[Named], at: int, spec: dict[str, Any]) -> list[Named]:
    return [*named[:at], make(spec), *named[at + 1 :]]


def _suites(how: Settings, seed: int) -> list[LoadedSuite]:
    found = [load_suite(s, how.limit, seed) for s in how.suites]
    if sorted(s.suite.kind for s in found) != ["benign", "harmful"]:
        raise ResafeError("a search takes one harmful and one benign suite: --search-suite advbench --search-suite xstest_safe, for example.")
    return sorted(found, key=lambda s: s.suite.kind == "benign")


def _used(suites: Sequence[LoadedSuite]) -> dict[str, list[str]]:
    """What a later evaluation leaves out: prompts of shipped suites, which other suites may repeat; ids of the user's own."""
    return {s.name: [user_text(c.messages) if s.name in names() else c.id for c in s.cases] for s in suites}


class Measuring:
    """Repairs and measures candidates one by one into `parts`; what was measured once is read again."""

    def __init__(self, job: Job, how: Settings, suites: Sequence[LoadedSuite]) -> None:
        self.job, self.how = job, how
        self.rows = job.heldout[:HELDOUT_LIMIT]
        judges = sorted({name for s in suites for name in panel(s.suite, how.judges)})
        prompts = [[s.suite.model_dump(mode="json"), [[c.id, c.key] for c in s.cases]] for s in suites]
        identity = [*job.inputs, prompts, [get_judge(j).identity for j in judges]]
        self.work = _run.workplace(job.run.output, identity)
        self.parts: list[Results] = []
        self.models: dict[str, str] = {}  # target -> fingerprint of what was measured

    def references(self) -> None:
        """The model before fine-tuning, and the fine-tuned one."""
        if self.job.run.aligned is not None:
            self._measure(BEFORE, self.job.run.aligned, self.work / "points" / "before", "none", "none")
        self._measure(TUNED, self.job.home, self.work / "points" / "tuned", "fine-tuning", "none")

    def candidate(self, target: str, named: list[Named], at: int) -> None:
        """Repair by `named`, measure, remove. The repairs before position `at` are done once for all candidates."""
        home = self.work / "points" / digest([m.identity for m in named])[:16]
        if (home / DONE).is_file():
            self._read(target, home)
            return
        shutil.rmtree(made := self.work / "candidate", ignore_errors=True)
        made.mkdir(parents=True)
        run = replace(self.job.run)
        for m in named:
            m.mitigation.prepare(run)
        first = self.work / digest([m.identity for m in named[:at]])[:16]
        first.mkdir(parents=True, exist_ok=True)
        start = _run.chain(run, named[:at], self.job.home, first)
        self._measure(target, _run.chain(run, named[at:], start, made), home, "fine-tuning", target)
        shutil.rmtree(made)

    def _measure(self, target: str, folder: Path, home: Path, attack: str, mitigation: str) -> None:
        if not (home / DONE).is_file():
            who = {"target": target, "attack": attack, "mitigation": mitigation, "seed": self.job.run.seed}
            trained_on = (manifest.read(self.job.home) or {}).get("overlap", {})
            spec = TargetSpec(target, folder, guard="", attack=attack, mitigation=mitigation, seed=self.job.run.seed, overlap=trained_on)
            how = self.how
            found = evaluate([spec], how.suites, how.judges, how.limit, None, how.batch_size, seed=self.job.run.seed, store=how.store)
            add_heldout(found, who, [user_text(r["messages"]) for r in self.rows], *row_votes(folder, self.rows))
            found.save(home)
            write_json(home / DONE, {"model": model_fingerprint(folder)})
        self._read(target, home)

    def _read(self, target: str, home: Path) -> None:
        self.parts.append(Results.load(home))
        self.models[target] = read_config(home / DONE)["model"]
