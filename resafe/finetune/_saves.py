"""Hearing of every folder that a trained model is saved to, whichever way the script saves it."""

from __future__ import annotations

import functools
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resafe import manifest
from resafe.finetune.inject._resafe_start import receipt


@dataclass
class Record:
    """What to leave beside a saved model. Outlives the trainer and does not keep it alive: scripts save models late."""

    writes: bool  # rank 0
    entry: dict[str, Any] = field(default_factory=dict)  # the manifest; empty until a mitigation was applied

    def saved(self, folder: str | Path) -> None:
        """After something was saved: rank 0 leaves the manifest beside it and a receipt."""
        home = Path(folder).absolute()
        if self.entry and self.writes and home.is_dir():
            manifest.write(home, self.entry)
            receipt("saved", folder=str(home))


_trained: weakref.WeakKeyDictionary[Any, Record] = weakref.WeakKeyDictionary()


def watch_saves(trainer: Any, record: Record) -> None:
    """Have every `save_pretrained` of the trained model, and every checkpoint, leave a manifest. Patches two classes once."""
    from transformers import PreTrainedModel, TrainerCallback

    for model in (trainer.model, _inner(trainer.model)):
        _trained[model] = record
    kinds = [PreTrainedModel, *([sys.modules["peft"].PeftModel] if "peft" in sys.modules else [])]
    for kind in kinds:
        if not hasattr(kind.save_pretrained, "__resafe__"):
            kind.save_pretrained = _wrapped_save(kind.save_pretrained)

    class Saved(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            record.saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    trainer.add_callback(Saved())


def _inner(model: Any) -> Any:
    """The model inside a PEFT wrapper: what `merge_and_unload` returns."""
    getter = getattr(model, "get_base_model", None)
    return getter() if callable(getter) else model


def _wrapped_save(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, save_directory, *args, **kwargs)
        if record := _trained.get(self):
            record.saved(save_directory)
        return result

    save_pretrained.__resafe__ = True  # type: ignore[attr-defined]
    return save_pretrained


