"""Copy back the aligned weights that make the model read harmful prompts as the aligned model reads them.

Yang et al. 2025, arXiv 2504.09757 (IEEE S&P: the harmful direction restored by gradients, with rollback)

Loss: -cos(h, d), h being the mean hidden state at the last token of harmful prompts (after `depth` of the blocks) and d the same
in the aligned model. An entry is a candidate where a step down the gradient leads back to W_aligned: sign(W - W_aligned) = sign(dL/dW).
Each round copies the candidates of largest |dL/dW|, up to `rate` of every linear weight. Harmful answers are not needed.

Rollback: with held-out rows, a round after which utility is more than `margin` below the fine-tuned model's gives `rollback` of
the copied entries back, those first that help to read benign prompts as the fine-tuned model does; at the end, until the
margin is kept. `rate`, `rounds` and `depth` are resafe's choices, found on the lab model. The model is in memory, with
float32 gradients of its linear weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from resafe.errors import ResafeError
from resafe.files import check_free, scratch, write_json
from resafe.mitigation import Mitigation, Needs, Run
from resafe.mitigations._calibrated import as_full, layers_of, sampled, two_models
from resafe.rows import prompt_of

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.models import Loaded
    from resafe.rows import Row
    from resafe.sensitivity import Batch
    from resafe.weights import Pair, Twin

RECORD = "restore_gradient.json"


class RestoreGradient(Mitigation):
    """Full checkpoint out, also of a LoRA: single entries of W are edited. Embeddings, head, routers and 1-D tensors stay as fine-tuned."""

    needs: ClassVar[Needs] = Needs(aligned=True, safety=True, quantised=False, makes_full=True)
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("rate", (0.005, 0.01, 0.02, 0.05, 0.1, 0.2))

    rate: float = Field(0.01, ge=0, le=1, allow_inf_nan=False, description="share of every weight's entries that one round copies")
    rounds: int = Field(5, ge=1, description="gradients that are taken")
    depth: float = Field(1.0, gt=0, le=1, description="share of the blocks after which hidden states are compared")
    warmup: int = Field(2, ge=0, description="rounds before utility is looked at")
    rollback: float = Field(0.2, gt=0, le=1, allow_inf_nan=False, description="share of the copied entries that is given back when utility drops")
    margin: float = Field(0.02, ge=0, le=1, allow_inf_nan=False, description="utility on held-out rows that may be lost")
    rows: int = Field(256, ge=1, description="harmful prompts, and benign prompts, that are looked at")
    max_length: int = Field(512, ge=8, description="tokens per prompt")

    def check(self, name: str, run: Run) -> None:
        """Also refuse held-out rows without benign prompts, which a rollback goes by."""
        super().check(name, run)
        if run.measure is not None and not (run.task or run.contrast):
            raise ResafeError(f"{name}: a rollback goes by benign prompts: pass the task's rows with --data, or safety rows with contrast rows.")

    def repair(self, run: Run) -> Path:
        """Write the restored checkpoint to `run.output`, with what every round did in restore_gradient.json."""
        from resafe import models
        from resafe.weights import Checkpoint, Pair, write_checkpoint

        check_free(run.output)
        tuned, aligned = two_models(run, "restore_gradient")
        with as_full(run, "restore_gradient", tuned, aligned) as full:
            pair = Pair(Checkpoint(full), Checkpoint(aligned), run.log)
            goal = self._goal(run, models.load(aligned), run.refusals)
            restored = _Restored(pair, models.load(full))
            curve = self._search(run, restored, goal)
            written = write_checkpoint(full, run.output, pair.edit(restored.rule), config=pair.config)
        write_json(written / RECORD, {**self.model_dump(), "curve": curve})
        return written

    def _goal(self, run: Run, loaded: Loaded, rows: list[Row]) -> _Goal:
        """The prompts of `rows` and where `loaded` reads them."""
        from resafe.sensitivity import mean_hidden, prompts

        asked = [prompt_of(r) for r in sampled(rows, self.rows, run, "restore_gradient")]
        batches = prompts(loaded.tokenizer, asked, max_length=self.max_length)
        layer = max(1, round(self.depth * loaded.model.config.get_text_config().num_hidden_layers))
        return _Goal(batches, layer, mean_hidden(loaded.model, batches, layer))

    def _search(self, run: Run, restored: _Restored, goal: _Goal) -> list[dict[str, float]]:
        """All rounds; what each did."""
        utility = _Utility(run, restored, self.margin)
        benign = self._goal(run, restored.loaded, run.task or run.contrast) if utility.known else None
        curve: list[dict[str, float]] = []
        for i in range(self.rounds):
            cosine, gradients = goal.gradient(restored.loaded)
            restored.copy(gradients, self.rate)
            if benign and i >= self.warmup and utility.low():
                restored.give_back(benign.gradient(restored.loaded)[1], self.rollback)
            curve.append({"cosine": cosine, "copied": restored.share})
            run.log(f"restore_gradient: round {i + 1}: cosine {cosine:.4f} before it, {restored.share:.1%} of the entries are copied")
        while benign and utility.low():
            restored.give_back(benign.gradient(restored.loaded)[1], self.rollback)
            if not restored.share:
                raise ResafeError(f"restore_gradient: nothing could stay restored with at most {self.margin:g} of utility lost: allow a larger margin.")
        return [*curve, {"cosine": goal.gradient(restored.loaded)[0], "copied": restored.share}]


@dataclass(frozen=True)
class _Goal:
    """Prompts, the block after which their hidden states are compared, and the mean that is aimed at."""

    batches: list[Batch]
    layer: int
    target: Tensor

    def gradient(self, loaded: Loaded) -> tuple[float, dict[str, Tensor]]:
        """(cosine to the target, gradients of its negative)."""
        from resafe.sensitivity import direction_gradient

        return direction_gradient(loaded.model, self.batches, self.layer, self.target)


class _Restored:
    """The fine-tuned model in memory, with some entries of its linear weights copied from the aligned one."""

    def __init__(self, pair: Pair, loaded: Loaded) -> None:
        import torch

        from resafe.sensitivity import weights

        self.pair, self.loaded = pair, loaded
        self._live = {name: parameter.data for name, parameter in weights(loaded.model).items()}
        self._layers = layers_of(loaded, pair.tuned)
        self._twins = [t for t in pair.twins if t.aligned is not None and t.tuned in self._layers]
        self.copied = {t.tuned: torch.zeros(pair.tuned.shape(t.tuned), dtype=torch.bool) for t in self._twins}

    @property
    def share(self) -> float:
        """Share of the linear weights' entries that are copied."""
        return sum(int(c.sum()) for c in self.copied.values()) / sum(c.numel() for c in self.copied.values())

    def rule(self, twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
        """The result's weights (a `Rule`)."""
        return theirs.where(self.copied[twin.tuned], ours) if twin.tuned in self.copied else ours

    def copy(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """Copy the best `rate` of every matrix's entries, of those not copied yet."""
        for live, copied, f, a, g in self._each(gradients):
            copied |= to_copy(f, a, g, copied, rate)
            live.copy_(a.where(copied, f))

    def give_back(self, gradients: Mapping[str, Tensor], share: float) -> None:
        """Give back the worst `share` of every matrix's copied entries, by the gradients of the benign loss."""
        for live, copied, f, a, g in self._each(gradients):
            copied &= ~to_give_back(f, a, g, copied, share)
            live.copy_(a.where(copied, f))

    def _each(self, gradients: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """(weight in the running model, which entries are copied, W_f, W_a, gradient) of each matrix, (out, in); the first two are views."""
        from resafe.weights import wide

        for twin in self._twins:
            f, a = wide(self.pair.tuned.finite(twin.tuned)), wide(self.pair.aligned.finite(str(twin.aligned)))
            for place, (ours, theirs, copied) in self._layers.each(twin.tuned, f, a, self.copied[twin.tuned]):
                g = place.live(gradients[place.parameter]).to(ours)
                yield place.live(self._live[place.parameter]), copied, ours, theirs, g


class _Utility:
    """Utility of the present state on held-out rows, against that of the fine-tuned model."""

    def __init__(self, run: Run, restored: _Restored, margin: float) -> None:
        self._run, self._restored = run, restored
        self.known = run.measure is not None
        self.least = self._measured() - margin - 1e-9 if self.known else 0.0

    def low(self) -> bool:
        """Whether more than the margin is lost."""
        return self._measured() < self.least

    def _measured(self) -> float:
        from resafe.weights import write_checkpoint

        assert self._run.measure is not None
        pair = self._restored.pair
        with scratch(self._run.output, "try") as tmp:
            folder = write_checkpoint(pair.tuned.folder, tmp / "try", pair.edit(self._restored.rule), config=pair.config)
            found = self._run.measure(folder)
        self._run.log(f"restore_gradient: utility {found:.4f}")
        return found


def to_copy(f: Tensor, a: Tensor, g: Tensor, copied: Tensor, rate: float) -> Tensor:
    """True for the floor(`rate` * size) entries of largest |g|, of those not `copied` where a step along -g leads from f to a."""
    candidates = ~copied & (g != 0) & ((f - a).sign() == g.sign())
    return _largest(g.abs().where(candidates, g * 0), int(rate * g.numel() + 1e-9)) & candidates


def to_give_back(f: Tensor, a: Tensor, g: Tensor, copied: Tensor, share: float) -> Tensor:
    """True for ceil(`share`) of the `copied` entries: first where a step along -g leads from a to f, by |g|; last where it leads away."""
    score = -g * (f - a).sign()
    return _largest(score.where(copied, score * 0 - float("inf")), ceil(share * int(copied.sum()) - 1e-9)) & copied


def _largest(score: Tensor, n: int) -> Tensor:
    import torch

    chosen = torch.zeros(score.numel(), dtype=torch.bool)
    chosen[torch.topk(score.flatten(), min(n, score.numel())).indices] = True
    return chosen.view(score.shape)
