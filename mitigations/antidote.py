"""Prune the weights that carry harmful answers after fine-tuning, those of the largest Wanda scores.

Antidote, Huang et al. 2024, arXiv 2408.09600

Scores are taken on harmful answers; the paper uses a data set of them. Here the fine-tuned model itself answers hazardous
prompts, and the answers are thrown away, so that no harmful data are needed. `action=zero` is the paper's: the top `share` of each row
of W goes to 0, useful weights among them, which costs utility (a named baseline, not a recommendation). `action=aligned`
scores the update D = W - W_aligned instead and takes its top entries back, less those that benign rows use most. On the lab
model no share of `zero` lowers harm much without garbling the answers; `aligned` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from resafe.errors import ResafeError
from resafe.files import check_free
from resafe.mitigation import Mitigation, Needs, Run
from resafe.mitigations._calibrated import Layers, as_full, layers_of, sampled
from resafe.models import base_of, is_adapter
from resafe.rows import prompt_of

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.models import Loaded
    from resafe.rows import Row
    from resafe.sensitivity import InputMoment
    from resafe.weights import Checkpoint, Twin


class Antidote(Mitigation):
    """Full checkpoint out, also of a LoRA: single entries of W are edited. Embeddings, head, routers and 1-D tensors stay as fine-tuned."""

    needs: ClassVar[Needs] = Needs(safety=True, quantised=False, makes_full=True)
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("share", (0.01, 0.03, 0.1, 0.2, 0.3, 0.5))

    share: float = Field(0.1, ge=0, le=1, allow_inf_nan=False, description="of each row of a weight, what is pruned")
    action: Literal["zero", "aligned"] = Field("zero", description="set pruned weights to 0 (the paper), or score and undo the update (needs --aligned)")
    keep: float = Field(0.0, ge=0, le=1, allow_inf_nan=False, description="of each row, the share most used by benign answers, never pruned (needs --data or contrast rows)")
    rows: int = Field(128, ge=1, description="hazardous prompts, and benign rows, that are looked at (the paper: 2000)")
    max_new_tokens: int = Field(128, ge=1, description="length of the model's own answers to hazardous prompts")
    max_length: int = Field(512, ge=8, description="tokens per row")

    def check(self, name: str, run: Run) -> None:
        """Also refuse what the chosen action and `keep` lack."""
        super().check(name, run)
        if self.action == "aligned" and run.aligned is None:
            raise ResafeError(f"{name}: action=aligned needs the model before fine-tuning: name its folder with --aligned.")
        if self.keep and not (run.task or run.contrast):
            raise ResafeError(f"{name}: keep needs benign rows: pass the task's rows with --data, or safety rows with contrast rows.")

    def repair(self, run: Run) -> Path:
        """Write the pruned checkpoint to `run.output`."""
        check_free(run.output)
        if run.tuned is None:
            raise ResafeError("antidote needs the fine-tuned model: name its folder.")
        base = run.aligned or (base_of(run.tuned) if is_adapter(run.tuned) else run.tuned)
        with as_full(run, "antidote", run.tuned, base) as full:
            return self._pruned(run, full)

    def _pruned(self, run: Run, full: Path) -> Path:
        from resafe.weights import Checkpoint, Pair, write_checkpoint

        model = Checkpoint(full).plain()
        if self.action == "zero":
            return write_checkpoint(full, run.output, self._edited(model, self._known(run, full, model)))
        assert run.aligned is not None
        pair = Pair(model, Checkpoint(run.aligned), run.log)
        known = self._known(run, full, model)

        def rule(twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
            return known.undo(twin.tuned, ours, theirs, self.share, self.keep)

        return write_checkpoint(full, run.output, pair.edit(rule), config=pair.config)

    def _edited(self, model: Checkpoint, known: _Known) -> Iterator[tuple[str, Tensor]]:
        from resafe.weights import wide

        for name in model.names():
            value = model.finite(name)
            if name in known.layers:
                w = wide(value)
                value = known.undo(name, w, w * 0, self.share, self.keep).to(value.dtype)
            yield name, value

    def _known(self, run: Run, full: Path, model: Checkpoint) -> _Known:
        """What is known of every linear weight of the checkpoint."""
        from resafe import models
        from resafe.sensitivity import answers, input_moments

        loaded = models.load(full)
        layers = layers_of(loaded, model)

        def moments(rows: list[Row]) -> dict[str, InputMoment]:
            return input_moments(loaded.model, answers(loaded.tokenizer, rows, max_length=self.max_length), full=False)

        harmful = moments(self._harmful(run, loaded))
        layers.tell_unseen(harmful, run.log)
        return _Known(layers, harmful, moments(sampled(run.task or run.contrast, self.rows, run, "antidote benign")) if self.keep else {})

    def _harmful(self, run: Run, loaded: Loaded) -> list[Row]:
        """Hazardous prompts with the fine-tuned model's own answers, where they are no refusals."""
        from resafe.generate import generate
        from resafe.guards import is_refusal

        asked = [prompt_of(r) for r in sampled(run.refusals, self.rows, run, "antidote")]
        texts = [a.text for a in generate(loaded, asked, self.max_new_tokens)]
        found: list[Row] = [{"messages": [*p, {"role": "assistant", "content": t}]} for p, t in zip(asked, texts) if t and not is_refusal(t)]
        run.log(f"antidote: {len(found)} of {len(asked)} hazardous prompts were answered")
        if not found:
            raise ResafeError(f"antidote: the fine-tune answers none of {len(asked)} hazardous prompts, so there is nothing to prune by.")
        return found


@dataclass(frozen=True)
class _Known:
    """The linear weights, and the moments of their inputs on harmful and on benign answers, by the names of `Place`."""

    layers: Layers
    harmful: dict[str, InputMoment]
    benign: dict[str, InputMoment]

    def undo(self, stored: str, w: Tensor, back: Tensor, share: float, keep: float) -> Tensor:
        """`w` with the entries of `back` where the change between them matters most to harmful answers; layout as stored."""
        if stored not in self.layers:
            return w
        result = w.clone()
        for place, (ours, theirs, target) in self.layers.each(stored, w, back, result):
            if place.name in self.harmful:
                chosen = harmful_entries(ours - theirs, self.harmful[place.name], self.benign.get(place.name), share, keep)
                target.copy_(theirs.where(chosen, ours))
        return result


def harmful_entries(d: Tensor, harmful: InputMoment, benign: InputMoment | None, share: float, keep: float) -> Tensor:
    """True for the top `share` of each row of (out, in) by Wanda score, except the top `keep` by the score on benign inputs."""
    from resafe.sensitivity import top_share, wanda

    chosen = top_share(wanda(d, harmful), share)
    return chosen if benign is None else chosen & ~top_share(wanda(d, benign), keep)
