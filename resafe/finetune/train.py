"""`resafe train`: supervised fine-tuning with mitigations before, after and around it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from resafe import manifest, models
from resafe.errors import ResafeError
from resafe.files import check_free, digest, file_digest, new_folder
from resafe.finetune import _run, environment
from resafe.finetune._measure import held_out_utility
from resafe.finetune.mixture import Mixture, mix
from resafe.finetune.session import Settings, adopt
from resafe.heldout import overlap
from resafe.mitigation import Run
from resafe.mitigations import stack
from resafe.quiet import quieten
from resafe.rows import Row, read_jsonl
from resafe.sft import SFTSettings, sft


def train(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    mitigations: _run.Specs = (),
    settings: SFTSettings | None = None,
    safety_data: str | None = None,
    heldout: str | Path | None = None,
    seed: int = 0,
    log: _run.Log = lambda _: None,
) -> Path:
    """Fine-tune `model` on the rows of `data` under `mitigations`; return the folder `output` with its manifest.

    An interrupted run resumes when the same call is made again. `heldout` rows (default: the training rows) measure utility for
    methods that calibrate themselves. Raises ResafeError before any work for whatever is wrong with the input.
    """
    home, target, how = models.vet(Path(model)).absolute(), Path(output).absolute(), settings or SFTSettings()
    if models.is_adapter(home):
        raise ResafeError(f"{home} is a LoRA adapter; fine-tuning starts from a full checkpoint: name its base model, or merge it first (peft merge_and_unload).")
    check_free(target)
    if environment.watched() and not environment.planning():
        raise ResafeError("resafe train takes --mitigation itself: leave resafe run out.")
    rows = read_jsonl(Path(data))
    named = stack(mitigations)
    safety = _run.safety_for(named, safety_data)
    run = Run(
        output=target, seed=seed, aligned=home, task=rows, refusals=safety.refusals if safety else [],
        contrast=safety.contrast if safety else [], log=log,
        measure=held_out_utility(read_jsonl(Path(heldout)) if heldout else rows),
    )  # fmt: skip
    for m in named:
        m.mitigation.check(m.name, run)
    before = manifest.read(home) or {}
    guard = _run.guard_entry(run, named, before.get("guard"))
    met = _report_overlap(rows, log)
    for suite, prompts in before.get("overlap", {}).items():
        met[suite] = sorted({*met.get(suite, []), *prompts})
    for m in named:
        m.mitigation.prepare(run)
    mixture = mix(named, run, rows)
    mixed = mixture.rows(rows)
    work = _run.workplace(
        target, [_run.state(home), digest(mixed), [m.identity for m in named], how.model_dump(), _run.content(heldout), seed]
    )
    quieten()
    settings_ = Settings(named, safety, seed, guard)
    if environment.planning():
        with tempfile.TemporaryDirectory(prefix="resafe-plan-") as spare:
            _tuned(run, settings_, mixture, mixed, home, how, Path(spare))
        raise ResafeError("resafe plan could not stop this training: its hook is not in this process.")
    with _run.spending(work) as usage:
        tuned = _tuned(run, settings_, mixture, mixed, home, how, work)
        last = _run.chain(run, named, tuned, work)
    with new_folder(target) as folder:
        _run.link_copy(last, folder)
        manifest.write(folder, {
            "verb": "train", "model": str(home), "data": {"path": str(data), "sha256": file_digest(Path(data)), "rows": len(rows)},
            "mixture": mixture.facts, "settings": how.model_dump(), **_run.describe(named, safety, seed), "guard": guard, "overlap": met,
            "usage": usage,
        })  # fmt: skip
    _run.clear(target)
    return target


def _tuned(run: Run, settings: Settings, mixture: Mixture, mixed: list[Row], home: Path, how: SFTSettings, work: Path) -> Path:
    """Train the checkpoint, or find it trained."""
    folder = work / "tuned"
    if folder.is_dir():
        run.log("training: found finished, going on from there")
        return folder
    loaded = models.load(home, dtype="auto" if how.lora else "float32")
    model = sft(
        loaded.model, loaded.tokenizer, mixed, how, work / "trainer", run.seed, keep_checkpoints=True, log=run.log,
        ready=lambda trainer: adopt(trainer, settings, run, mixture),
    )  # fmt: skip
    with new_folder(folder) as new:
        if how.lora:
            model.peft_config["default"].base_model_name_or_path = str(home)
        model.save_pretrained(new)
        loaded.tokenizer.save_pretrained(new)
    return folder


def _report_overlap(rows: list[Row], log: _run.Log) -> dict[str, list[str]]:
    """Evaluation prompts among the training rows: said now, recorded, and left out by the evaluator."""
    met = overlap(rows)
    for suite, prompts in met.items():
        log(f"note: {len(prompts)} prompts of the evaluation suite {suite} are in the training data; evaluation will leave them out.")
    return met
