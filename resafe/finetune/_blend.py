"""A trainer's map-style data with the mixture in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resafe.finetune._data import read_data, safety_for_preferences
from resafe.finetune._pack import Wrapped
from resafe.finetune.mixture import Mixture, mix, mix_unread
from resafe.heldout import overlap
from resafe.mitigation import Run
from resafe.mitigations import Named


@dataclass(frozen=True)
class Blend:
    """A trainer's data set with the mixture in it."""

    dataset: Any
    mixture: Mixture
    facts: dict[str, Any]  # rows, tokens and hash before and after
    overlap: dict[str, list[str]]  # evaluation prompts among the user's rows


def blend(trainer: Any, mixing: Sequence[Named], run: Run, preparing: Sequence[Named] = ()) -> Blend:
    """Mix into the trainer's map-style data; the trainer is only read. Fills `run.task` and `run.tokenizer`.

    Raises ResafeError for data that no safety row can stand among.
    """
    data = read_data(trainer)
    run.tokenizer, run.task = data.tokenizer, data.rows
    if data.preference:
        safety_for_preferences(run)
    for m in preparing or mixing:
        m.mitigation.prepare(run)
    if isinstance(data.layout, Wrapped):
        mixture = mix_unread(mixing, run, data.layout.documents, [r["messages"] for r in data.rows])
    else:
        mixture = mix(mixing, run, data.rows)
    dataset, rows, tokens = data.mixed(mixture)
    facts = {
        "rows_before": len(trainer.train_dataset), "rows": rows, "added": len(mixture.added), "sha256": mixture.sha256,
        "tokens_before": data.tokens(), "tokens": tokens, "encoder": data.encoder.name, "masking": data.policy,
    }  # fmt: skip
    if rows != mixture.after:
        facts.update(documents_before=mixture.before, documents=mixture.after)
    met = overlap(data.rows)
    for line in (*data.notes, *_overlap_notes(met)):
        run.log(f"note: {line}")
    return Blend(dataset, mixture, facts, met)


def _overlap_notes(met: dict[str, list[str]]) -> list[str]:
    return [f"{len(p)} prompts of the evaluation suite {suite} are in the training data; evaluation will leave them out." for suite, p in met.items()]
