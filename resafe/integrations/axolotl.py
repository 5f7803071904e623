"""Axolotl plugin: safety rows join the data before axolotl counts its steps.

    plugins:
      - resafe.integrations.axolotl.ResafePlugin
    resafe:
      mitigations: [mix_safety]

axolotl sets `max_steps` and the warm-up from the data set before its Trainer exists, so rows that come later would shorten the epoch.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, Field

from resafe.errors import ResafeError
from resafe.finetune import _run, environment
from resafe.finetune._blend import Blend, blend
from resafe.finetune.mixture import with_mode
from resafe.finetune.session import Session, Settings
from resafe.mitigation import Run


class Options(BaseModel):
    """The section `resafe` of an axolotl config; the same meaning as the flags of `resafe run`."""

    model_config = ConfigDict(extra="forbid")
    mitigations: list[str | dict[str, Any]] = Field(min_length=1)
    safety_data: str | None = None
    mix_mode: str | None = None
    seed: int = 0


class ResafeArgs(BaseModel):
    """What the plugin adds to axolotl's config."""

    resafe: Options | None = None


@dataclass
class _Ready:
    """What was prepared while loading the data, for the trainer that comes later."""

    settings: Settings
    run: Run
    blend: Blend | None
    steps_before: int | None


class ResafePlugin(BasePlugin):  # type: ignore[misc]
    """Applies the mitigations of the config's section `resafe`."""

    def get_input_args(self) -> str:
        """Where axolotl finds the pydantic class of the added keys."""
        return f"{__name__}.{ResafeArgs.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """axolotl's own loader, then the mixture, then its own count of steps. None leaves everything to axolotl."""
        if preprocess:
            return None  # what is cached is the user's data; the mixture is made in memory
        settings, run = _settings(cfg)
        self.ready = _Ready(settings, run, None, None)
        mixing = [m for m in settings.named if "data" in m.mitigation.hooks()]
        if not mixing:
            return None
        _refuse(cfg)
        from axolotl.common.datasets import load_datasets, load_preference_datasets

        meta = (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg)
        made = blend(_stand_in(cfg, meta.train_dataset), mixing, run)
        self.ready = _Ready(settings, run, made, meta.total_num_steps)
        meta.train_dataset, meta.total_num_steps = made.dataset, _steps(cfg, made.dataset)
        _say(f"{made.facts['rows_before']} rows -> {made.facts['rows']}; {self.ready.steps_before} optimiser steps -> {meta.total_num_steps}")
        return meta

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Hand the trainer over: hooks inside training, manifests beside what is saved, receipts under `resafe run`."""
        ready = self.ready
        session = trainer._resafe_session = Session(trainer, ready.settings, _say, ready.run)
        if ready.blend is not None:
            session.take(ready.blend, trainer.train_dataset)
            session.facts.update(steps_before=ready.steps_before, steps=trainer.args.max_steps)
        session.apply()
        if not environment.watched():
            trainer.train = session.bound(trainer.train)


def _settings(cfg: Any) -> tuple[Settings, Run]:
    """The section `resafe`, loaded and checked. Raises ResafeError for whatever is wrong with it."""
    if not cfg.resafe:
        raise ResafeError("the axolotl config names resafe's plugin but has no section 'resafe' with 'mitigations'.")
    options = Options.model_validate({k: v for k, v in dict(cfg.resafe).items() if v is not None})
    named = with_mode([s if isinstance(s, str) else dict(s) for s in options.mitigations], options.mix_mode)
    if late := _run.repairs(named):
        raise ResafeError(f"{late[0].name} acts on the saved checkpoint: train first, then resafe repair {cfg.output_dir} --mitigation {late[0].name} -o OUT.")
    safety = _run.safety_for(named, options.safety_data)
    home = Path(str(cfg.base_model))
    run = Run(
        output=Path(str(cfg.output_dir)), seed=options.seed, aligned=home.absolute() if home.is_dir() else None, log=_say,
        refusals=safety.refusals if safety else [], contrast=safety.contrast if safety else [],
    )  # fmt: skip
    return Settings(named, safety, options.seed, _run.guard_entry(run, named)), run


def _refuse(cfg: Any) -> None:
    if cfg.rl and str(getattr(cfg.rl, "value", cfg.rl)) not in ("dpo", "ipo", "simpo"):
        raise ResafeError(f"rl: {cfg.rl} trains on rewards or labels, which refusals cannot be mixed into.")
    if cfg.reward_model or cfg.process_reward_model:
        raise ResafeError("a reward model does not write answers, so refusals cannot be mixed into its training data.")
    if cfg.streaming or cfg.pretraining_dataset:
        raise ResafeError("a streamed axolotl data set cannot be mixed into: mix the file (resafe mix), or leave streaming out.")


def _stand_in(cfg: Any, dataset: Any) -> Any:
    """What of a Trainer the mixing looks at."""
    from axolotl.loaders import load_tokenizer

    args = SimpleNamespace(max_length=cfg.sequence_len, packing=False)
    model = SimpleNamespace(config=SimpleNamespace())
    return SimpleNamespace(train_dataset=dataset, processing_class=load_tokenizer(cfg), data_collator=None, model=model, args=args)


def _steps(cfg: Any, dataset: Any) -> int:
    """axolotl's own count; it caches three numbers of the data in its config, which are of the data before."""
    if cfg.rl:
        return math.ceil(len(dataset) * float(cfg.num_epochs) / int(cfg.batch_size))
    from axolotl.utils.trainer import calculate_total_num_steps

    cfg.total_num_tokens = cfg.total_supervised_tokens = cfg.sample_packing_eff_est = None
    total = int(calculate_total_num_steps(cfg, dataset))
    return min(total, int(cfg.max_steps)) if cfg.max_steps else total


def _say(line: str) -> None:
    if environment.first_process():
        sys.stderr.write(f"resafe: {line}\n")
        sys.stderr.flush()
