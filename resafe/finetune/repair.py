"""`resafe repair`: put safety back into a finished fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe import manifest, models
from resafe.errors import ResafeError
from resafe.files import check_free, new_folder
from resafe.finetune import _run
from resafe.finetune._measure import held_out_utility
from resafe.mitigation import Run
from resafe.mitigations import Named, stack
from resafe.quiet import quieten
from resafe.rows import Row, read_jsonl
from resafe.safety import SafetyRows
from resafe.weights.names import token_file
from resafe.weights.writer import check_room


@dataclass(frozen=True)
class Job:
    """A repair whose input was checked, and that has not begun."""

    named: list[Named]
    run: Run
    home: Path  # the checkpoint to repair
    heldout: list[Row]
    safety: SafetyRows | None
    before: dict[str, Any]  # manifest of the checkpoint
    inputs: list[Any]  # what decides the result beside the mitigations, as it is now


def repair(
    tuned: str | Path,
    output: str | Path,
    mitigations: _run.Specs,
    aligned: str | Path | None = None,
    data: str | Path | None = None,
    safety_data: str | None = None,
    heldout: str | Path | None = None,
    seed: int = 0,
    log: _run.Log = lambda _: None,
    base: str | Path | None = None,
) -> Path:
    """Apply `mitigations` in order to the checkpoint `tuned`; return the new folder `output` with its manifest.

    `aligned` is the model before fine-tuning, `base` the one before alignment; `data` are rows of the user's task for self-distilled replay; `heldout`
    rows (default: `data`) measure utility for methods that calibrate themselves.
    Raises ResafeError before any work for whatever is wrong with the input.
    """
    return perform(plan(tuned, output, mitigations, aligned, data, safety_data, heldout, seed, log, base))


def plan(
    tuned: str | Path,
    output: str | Path,
    mitigations: _run.Specs,
    aligned: str | Path | None = None,
    data: str | Path | None = None,
    safety_data: str | None = None,
    heldout: str | Path | None = None,
    seed: int = 0,
    log: _run.Log = lambda _: None,
    base: str | Path | None = None,
) -> Job:
    """Check everything that `repair` is given. Raises ResafeError for whatever is wrong with it."""
    home, target = models.vet(Path(tuned)).absolute(), Path(output).absolute()
    check_free(target)
    named = stack(mitigations)
    if not named:
        raise ResafeError("name at least one mitigation to repair with (--mitigation NAME; resafe list shows them).")
    for m in named:
        if not {"repair", "guard"} & set(m.mitigation.hooks()):
            raise ResafeError(f"{m.name} acts on training data; use it with resafe train. A finished checkpoint needs a repair.")
    safety = _run.safety_for(named, safety_data)
    rows = read_jsonl(Path(data)) if data else []
    kept = read_jsonl(Path(heldout)) if heldout else rows
    run = Run(
        output=target, seed=seed, base=models.vet(Path(base)).absolute() if base else None,
        aligned=models.vet(Path(aligned)).absolute() if aligned else None, tuned=home, task=rows,
        refusals=safety.refusals if safety else [], contrast=safety.contrast if safety else [], log=log,
        measure=held_out_utility(kept) if kept else None,
    )  # fmt: skip
    for m in named:
        m.mitigation.check(m.name, run)
        if m.mitigation.needs.makes_full and models.is_adapter(run.tuned or home):
            run.tuned = models.base_of(home)  # a full checkpoint of its kind: what the next one is given is not there yet
    run.tuned = home
    for other in filter(None, (run.aligned, run.base)):
        if not models.is_adapter(home) and token_file(home, other) is None:
            log(f"note: {home} and {other} have no tokenizer file in common: that they read the same tokens was not checked.")
    if not any("repair" in m.mitigation.hooks() for m in named):
        check_room(target, sum(file.stat().st_size for file in home.glob("*.safetensors")))  # the weights are copied
    inputs = [
        _run.state(home), _run.state(run.aligned), _run.state(run.base), _run.content(data),
        safety.sha256 if safety else None, _run.content(heldout), seed,
    ]  # fmt: skip
    return Job(named, run, home, kept, safety, manifest.read(home) or {}, inputs)


def perform(job: Job, search: Mapping[str, Any] | None = None, overlap: Mapping[str, list[str]] | None = None) -> Path:
    """Do what was planned; return the new folder.

    `search` says how a strength was chosen, `overlap` on which evaluation prompts (suite -> prompts): both go into the
    manifest, and the evaluator leaves those prompts out.
    """
    run, named, before, target = job.run, job.named, job.before, job.run.output
    guard = _run.guard_entry(run, named, before.get("guard"))
    work = _run.workplace(target, [*job.inputs, [m.identity for m in named]])
    quieten()
    with _run.spending(work) as usage:
        for m in named:
            m.mitigation.prepare(run)
        last = _run.chain(run, named, job.home, work)
    with new_folder(target) as folder:
        _run.link_copy(last, folder, ours=last != job.home)
        manifest.write(folder, {
            "verb": "repair", "tuned": str(job.home), "aligned": str(run.aligned) if run.aligned else None,
            "base": str(run.base) if run.base else None, "before": before,
            **_run.describe(named, job.safety, run.seed), "guard": guard, "overlap": _joined(before.get("overlap", {}), overlap or {}),
            **({"search": search} if search else {}), "usage": usage,
        })  # fmt: skip
    _run.clear(target)
    return target


def _joined(one: Mapping[str, list[str]], two: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {name: list(dict.fromkeys([*one.get(name, []), *two.get(name, [])])) for name in {**one, **two}}
