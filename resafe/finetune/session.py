"""One Trainer under mitigations: `attach` for notebooks, and what `resafe run` does inside the training process.

At `Trainer.train` the data hooks give the mixture, `params` changes the model, `loss` and `step` are put on the instance; every
saved folder gets its manifest from rank 0. Depends on transformers and datasets only, and looks at columns, not at versions.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resafe import manifest
from resafe.errors import ResafeError
from resafe.finetune import _data, _hooks, _plan, _run, environment
from resafe.finetune._blend import Blend, Proof, blend
from resafe.finetune._saves import Record, watch_saves
from resafe.finetune.inject._resafe_start import explained, receipt
from resafe.finetune.mixture import Mixture, mix_unread, with_mode
from resafe.mitigation import Run
from resafe.mitigations import Named
from resafe.safety import SafetyRows

IN_PROCESS = ("data", "params", "loss", "step")
COLLATED = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "position_ids", "seq_lengths")
LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")  # what the ranks of one launch have in common
_calls = itertools.count()  # trainings of this process, in order: the same on every rank


@dataclass
class Settings:
    """What to apply: the flags of `resafe run`, as Python values."""

    named: list[Named]
    safety: SafetyRows | None
    seed: int = 0
    guard: dict[str, Any] | None = None  # the manifest's guard entry, made once


def attach(
    trainer: Any, *mitigations: str | dict[str, Any], safety_data: str | None = None, mix_mode: str | None = None, seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> Any:  # fmt: skip
    """Apply mitigations to a Trainer before its `train()`; returns the trainer.

    Example: `resafe.attach(trainer, "mix_safety:ratio=0.2").train()`. Mitigations that act on the finished checkpoint
    (realign_dpo, restore_weights) are refused here: run `resafe repair` on the saved folder. Under `resafe run` with the same
    mitigations nothing is applied twice.
    Raises ResafeError for a trainer that cannot be mixed into, and a second time on the same trainer.
    """
    if "_resafe_session" in vars(trainer):
        raise ResafeError("this trainer has its mitigations already.")
    named = with_mode(list(mitigations), mix_mode)
    if not named:
        raise ResafeError("name at least one mitigation; resafe list shows them.")
    if late := _run.repairs(named):
        raise ResafeError(f"{late[0].name} acts on the saved checkpoint: train first, then resafe repair FOLDER --mitigation {late[0].name} -o OUT.")
    safety = _run.safety_for(named, safety_data)
    guard = _run.guard_entry(Run(output=Path(trainer.args.output_dir), seed=seed), named)
    settings = Settings(named, safety, seed, guard)
    _check_nested(settings)
    session = Session(trainer, settings, log or _say(trainer))
    session.apply()
    trainer._resafe_session = session
    if not environment.watched():  # else the wrap of the class finds the session
        trainer.train = session.bound(trainer.train)
    return trainer


def session_of(trainer: Any) -> Session:
    """The session of a Trainer under `resafe run`, made from the environment on its first `train()`."""
    found: Session | None = vars(trainer).get("_resafe_session")
    if found is None:
        found = trainer._resafe_session = Session(trainer, environment.settings(), _say(trainer))
    elif not environment.planning():
        _check_nested(found.settings)
    return found


def adopt(trainer: Any, settings: Settings, run: Run, mixture: Mixture) -> None:
    """For `resafe train`: a trainer made on a mixture already; the hooks in the process are put on, and the facts are kept."""
    session = trainer._resafe_session = Session(trainer, settings, run.log, run)
    session.facts = session.about(mixture.before)
    session.keep(trainer.train_dataset, mixture, mixture.after)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    own = [n for n, entry in zip(lengths, mixture.entries) if isinstance(entry, int)]
    if len(lengths) == mixture.after and len(own) == mixture.before:  # no row was left out as too long or replaced
        session.facts.update(tokens_before=sum(own), tokens=sum(lengths))
    session.change()


def _check_nested(settings: Settings) -> None:
    """Under `resafe run`, `attach` must apply what that run says."""
    if not environment.watched():
        return
    outer = environment.settings()
    same = [m.spec for m in _inside(outer.named)] == [m.spec for m in _inside(settings.named)] and outer.seed == settings.seed
    if not same or (outer.safety and outer.safety.sha256) != (settings.safety and settings.safety.sha256):
        raise ResafeError("this script runs under resafe run with other mitigations than it attaches; name all of them in one place.")


def _inside(named: Sequence[Named]) -> list[Named]:
    """The mitigations that act inside the training process."""
    return [m for m in named if set(m.mitigation.hooks()) & set(IN_PROCESS)]


def _say(trainer: Any) -> Callable[[str], None]:
    """Lines on stderr, from the first process only."""

    def log(line: str) -> None:
        if trainer.args.process_index == 0:
            sys.stderr.write(f"resafe: {line}\n")
            sys.stderr.flush()

    return log


class Session:
    """The mitigations of one Trainer, and what became of them."""

    def __init__(self, trainer: Any, settings: Settings, log: Callable[[str], None], run: Run | None = None) -> None:
        self.trainer, self.settings, self.log = trainer, settings, log
        self.mixture: Mixture | None = None
        self.facts: dict[str, Any] = {}
        self.overlap: dict[str, list[str]] = {}
        self.applied_to: Any = None  # the data set that was put into the trainer
        self.proof: Proof | None = None  # a row that the data loader must give
        self.changed = False  # params, loss and step act once on a trainer
        self.record = Record(writes=trainer.args.process_index == 0)
        safety = settings.safety
        self.run = run or Run(
            output=Path(trainer.args.output_dir), seed=settings.seed, aligned=_aligned(trainer), log=log,
            refusals=safety.refusals if safety else [], contrast=safety.contrast if safety else [],
        )  # fmt: skip

    def train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train` with the mitigations applied before it; receipts before and after."""
        call = next(_calls)
        with explained():
            self.apply()
            self._check_resume(kwargs.get("resume_from_checkpoint", args[0] if args else None))
            if environment.planning():
                _plan.probe(self.trainer, original, self.facts, receipt)
            receipt("applied", call=call, **self._place(), **self.facts)
        if environment.wants_task_rows() and self.trainer.args.process_index == 0:
            environment.keep_task_rows(self.run.task)
        result = original(*args, **kwargs)
        state = self.trainer.state
        receipt("finished", call=call, **self._place(), steps=state.global_step)
        return result

    def bound(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`original` with this session around it."""
        @functools.wraps(original)
        def train(*args: Any, **kwargs: Any) -> Any:
            return self.train(original, *args, **kwargs)

        return train

    def apply(self) -> None:
        """Mix the data and change the model; a second call does what is not done yet (another data set was put in)."""
        trainer, named = self.trainer, self.settings.named
        for m in _inside(named):  # what acts afterwards was checked before the command, with all that it is given
            m.mitigation.check(m.name, self.run)
        if self.applied_to is None or trainer.train_dataset is not self.applied_to:
            self._mix_data([m for m in named if "data" in m.mitigation.hooks()])
        self.change()
        self.record.entry = self.entry()

    def change(self) -> None:
        """Put `params`, `loss` and `step` on the trainer, and watch what is saved; once."""
        if self.changed:
            return
        self.changed = True
        trainer, inside = self.trainer, _inside(self.settings.named)
        watch_saves(trainer, self.record)
        self._watch_loader()
        for m in inside:
            if "params" in m.mitigation.hooks():
                self._params(m)
        if losses := [m for m in inside if "loss" in m.mitigation.hooks()]:
            _hooks.add_loss_terms(trainer, self.run, losses)
        for m in inside:
            if "step" in m.mitigation.hooks():
                _hooks.own_step(trainer, self.run, m, self._safety_batches())

    def _watch_loader(self) -> None:
        """Refuse to train where the script's own data loader does not read the mixture."""
        trainer, original = self.trainer, self.trainer.get_train_dataloader

        @functools.wraps(original)
        def get_train_dataloader(*args: Any, **kwargs: Any) -> Any:
            loader = original(*args, **kwargs)
            with explained():
                if self.proof is not None and not self.proof.holds(getattr(loader, "dataset", None)):
                    raise ResafeError(
                        f"{type(trainer).__name__}.get_train_dataloader does not read trainer.train_dataset, so the mixture would not be trained on: "
                        "let it read that, or mix the file (resafe mix)."
                    )
            return loader

        trainer.get_train_dataloader = get_train_dataloader

    def about(self, before: int | None) -> dict[str, Any]:
        """What is known before anything is mixed; `before` are the user's rows."""
        trainer = self.trainer
        return {
            "trainer": type(trainer).__name__, "mitigations": [m.spec for m in self.settings.named], "rows_before": before, "rows": before,
            "sha256": None, "steps_before": _plan.steps(trainer, before), "aligned": str(self.run.aligned) if self.run.aligned else None,
        }  # fmt: skip

    def _mix_data(self, mixing: Sequence[Named]) -> None:
        before = _rows(self.trainer.train_dataset)
        self.facts = self.about(before)
        if before == 0:
            raise ResafeError("the trainer has no training rows, so there is nothing to apply a mitigation to.")
        if not mixing:
            self._prepare()
            self.applied_to = self.trainer.train_dataset
            return
        if before is None:
            self._stream(mixing)
            return
        made = blend(self.trainer, mixing, self.run, _inside(self.settings.named))
        self.trainer.train_dataset = made.dataset
        _plan.follow(self.trainer, made.facts)
        self.take(made, made.dataset)
        self._report()

    def take(self, made: Blend, dataset: Any) -> None:
        """Remember a mixture and the data set that it became."""
        if not self.facts:
            self.facts = self.about(made.facts["rows_before"])
        self.mixture, self.applied_to, self.overlap, self.proof = made.mixture, dataset, made.overlap, made.proof
        self.facts.update(made.facts, steps=_plan.steps(self.trainer, made.facts["rows"]))

    def _stream(self, mixing: Sequence[Named]) -> None:
        """An IterableDataset: as many rows as max_steps reads, safety rows in the place of the last ones of the stream."""
        trainer = self.trainer
        _data.refuse_unmixable(trainer)
        args = trainer.args
        if args.max_steps <= 0:
            raise ResafeError("the training data is a stream and max_steps is not set, so the share of safety rows cannot be kept: set max_steps.")
        n = args.max_steps * _plan.rows_per_step(trainer)
        stream = trainer.train_dataset
        if iter(stream) is stream:
            raise ResafeError("the training stream can be read once only, and its first rows must be looked at: give the trainer an IterableDataset.")
        sample = list(itertools.islice(iter(stream), 32))
        if not sample:
            raise ResafeError("the training stream is empty.")
        data = _data.describe_stream(trainer, sample)
        self.run.tokenizer = data.tokenizer
        self._prepare()
        whole = mix_unread(mixing, self.run, n)
        mixture = Mixture(whole.entries[:n], n, whole.sha256)
        self.keep(_data.mixed_stream(stream, mixture, data.padded), mixture, n)
        for note in data.notes:
            self.log(f"note: {note}")
        self.facts.update(rows_before=n, steps_before=args.max_steps, stream=True, encoder=data.encoder.name, masking=data.policy)
        self.log(
            f"the data is a stream: max_steps={args.max_steps} stays, so {len(mixture.added)} of the {n} rows that will be read are safety "
            f"rows and {len(mixture.added)} fewer come from the stream."
        )

    def _prepare(self) -> None:
        for m in _inside(self.settings.named):
            m.mitigation.prepare(self.run)

    def keep(self, dataset: Any, mixture: Mixture, rows: int) -> None:
        """Put the mixed data set into the trainer, and remember what it is."""
        self.mixture = mixture
        self.trainer.train_dataset = self.applied_to = dataset
        self.facts.update(rows=rows, added=len(mixture.added), sha256=mixture.sha256, steps=_plan.steps(self.trainer, rows))

    def _report(self) -> None:
        f = self.facts
        words = [f"{f['rows_before']} rows -> {f['rows']} ({f['added']} safety rows, x{f['rows'] / f['rows_before']:.2f})"]
        if f["steps_before"] is not None:
            words.append(f"{f['steps_before']} optimiser steps -> {f['steps']}")
        if f.get("tokens") is not None:
            words.append(f"{f['tokens_before']} tokens a pass -> {f['tokens']} ({100 * (f['tokens'] / f['tokens_before'] - 1):+.1f} %)")
        self.log("; ".join(words))

    def _params(self, m: Named) -> None:
        if self.trainer.model_init is not None:
            raise ResafeError(f"{m.name} changes the model before training, but the trainer builds a new one in train() (model_init).")
        m.mitigation.params(self.run, self.trainer.model)

    def _safety_batches(self) -> Callable[[], Any]:
        """The next batch of safety rows, in the trainer's columns and collated by it; each rank draws its own. Read when first asked."""
        trainer = self.trainer
        rng = random.Random(f"stream {self.settings.seed} {trainer.args.process_index}")

        @functools.cache
        def examples() -> list[Any]:
            if not self.run.refusals or _rows(trainer.train_dataset) is None:
                raise ResafeError("the stream of safety rows needs safety rows, and training data that is no stream itself.")
            data = _data.read_data(trainer)
            wanted = [c for c in COLLATED if c in data.columns]
            return [{c: e[c] for c in wanted} for e in map(data.padded, self.run.refusals)]

        return lambda: trainer.data_collator(rng.sample(examples(), min(trainer.args.train_batch_size, len(examples()))))

    def _place(self) -> dict[str, Any]:
        args, env = self.trainer.args, os.environ
        return {
            "rank": args.process_index, "world": args.world_size, "local_world": int(env.get("LOCAL_WORLD_SIZE", "0")),
            "attempt": env.get("TORCHELASTIC_RESTART_COUNT", "0"), "group": ":".join(env.get(k, "") for k in LAUNCH),
        }  # fmt: skip

    def entry(self) -> dict[str, Any]:
        """The manifest of a folder that this training saved."""
        s = self.settings
        return {
            "verb": "run", "model": self.facts.get("aligned"), **_run.describe(s.named, s.safety, s.seed), "guard": s.guard,
            "mixture": {k: self.facts.get(k) for k in ("rows_before", "rows", "added", "sha256", "masking", "encoder")},
            "overlap": self.overlap, "pending": [m.name for m in _run.repairs(s.named)],
        }  # fmt: skip

    def _check_resume(self, asked: Any) -> None:
        """Refuse to go on from a checkpoint that another mixture trained."""
        if not asked:
            return
        folder = Path(asked) if isinstance(asked, (str, os.PathLike)) else _last_checkpoint(self.trainer.args.output_dir)
        if folder is None or not folder.is_dir():
            return  # the trainer says what is wrong
        found = ((manifest.read(folder) or {}).get("mixture") or {}).get("sha256")
        if found != self.facts.get("sha256"):
            with_what = f"the mixture {found[:12]}" if found else "no mixture of resafe's"
            raise ResafeError(
                f"{folder} was trained on {with_what}, and this run has {str(self.facts.get('sha256'))[:12]}: resume with the same data, "
                "mitigations and seed, or start anew."
            )


def _last_checkpoint(folder: str) -> Path | None:
    from transformers.trainer_utils import get_last_checkpoint

    last: Any = get_last_checkpoint
    found = last(folder) if Path(folder).is_dir() else None
    return Path(found) if found else None


def _rows(dataset: Any) -> int | None:
    """Number of rows; None for a stream."""
    try:
        return 0 if dataset is None else len(dataset)
    except TypeError:
        return None


def _aligned(trainer: Any) -> Path | None:
    """The folder of the model that training started from, if it is a local one."""
    config = getattr(trainer.model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    return Path(name).absolute() if name and Path(name).is_dir() else None
