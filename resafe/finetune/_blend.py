"""A trainer's map-style data with the mixture in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resafe.finetune._data import read_data, safety_for_preferences
from resafe.finetune._pack import Wrapped
from resafe.finetune.mixture import Mixture, mix, mix_unread
from resafe.heldout import overlap
from resafe.mitigation import Run
from resafe.mitigations import Named


@dataclass(frozen=True)
class Proof:
    """One added row of the mixture: where it stands, and what it holds."""

    rows: int
    index: int
    column: str
    value: Any

    def holds(self, dataset: Any) -> bool:
        """Whether `dataset`, as a data loader reads it, is the mixture; what has no length or no such column is not judged."""
        try:
            if len(dataset) != self.rows:
                return False
            found = dataset[self.index]
        except TypeError:
            return True
        if not isinstance(found, Mapping) or self.column not in found:
            return True
        value = found[self.column]
        return bool((value.tolist() if callable(getattr(value, "tolist", None)) else value) == self.value)


@dataclass(frozen=True)
class Blend:
    """A trainer's data set with the mixture in it."""

    dataset: Any
    mixture: Mixture
    facts: dict[str, Any]  # rows, tokens and hash before and after
    overlap: dict[str, list[str]]  # evaluation prompts among the user's rows
    proof: Proof | None = None


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
    dataset, entries, tokens = data.mixed(mixture)
    rows = len(entries)
    facts = {
        "rows_before": len(trainer.train_dataset), "rows": rows, "added": len(mixture.added), "sha256": mixture.sha256,
        "tokens_before": data.tokens(), "tokens": tokens, "encoder": data.encoder.name, "masking": data.policy,
    }  # fmt: skip
    if rows != mixture.after:
        facts.update(documents_before=mixture.before, documents=mixture.after)
    met = overlap(data.rows)
    for line in (*data.notes, *_overlap_notes(met)):
        run.log(f"note: {line}")
    return Blend(dataset, mixture, facts, met, _proof(entries))


def _proof(entries: Sequence[Any]) -> Proof | None:
    place = next((i for i, e in enumerate(entries) if not isinstance(e, int)), None)
    if place is None:
        return None
    column = next((c for c in ("input_ids", "chosen_ids", "chosen_input_ids") if entries[place].get(c) is not None), None)
    return Proof(len(entries), place, column or "", entries[place].get(column) if column else None)


def _overlap_notes(met: dict[str, list[str]]) -> list[str]:
    return [f"{len(p)} prompts of the evaluation suite {suite} are in the training data; evaluation will leave them out." for suite, p in met.items()]
