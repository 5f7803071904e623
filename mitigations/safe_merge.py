"""Merge a safety update into the layers where the fine-tuning update leaves the directions of alignment.

SafeMERGE, Djuhera et al. 2025, arXiv 2503.17239

dW' = (1 - strength) dW + strength dW_safe where the weight's score is at most `threshold` (Safe LoRA's test, in either of its
modes), dW' = dW elsewhere: deltas are merged, not their factors, which would make cross terms. dW_safe is the update of a
LoRA (or full fine-tune) of the aligned model on safety rows: `safe` names it, or it is trained here on the run's safety rows and
kept in the cache. Ranks and target modules of the two may differ. The paper has mode=official, threshold 0.35, strength 0.2.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from resafe.errors import ResafeError
from resafe.files import check_free, write_json
from resafe.mitigation import Needs, Run
from resafe.mitigations._leaving import Leaving
from resafe.mitigations._second import trained, update_of
from resafe.mitigations._updates import EXPERT, adapted, decide, fingerprints
from resafe.models import base_of, is_adapter
from resafe.weights import adapter_of

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.weights import Adapter, Module, Twin
    from resafe.weights._pieces import Piece


class SafeMerge(Leaving):
    """Layers whose update lies in the directions of alignment stay as they are, the others become a weighted mean of both updates."""

    needs: ClassVar[Needs] = Needs(base=True, aligned=True, safety=True)
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("strength", (0.2, 0.35, 0.5, 0.65, 0.8, 0.9))

    strength: float = Field(0.2, ge=0, le=1, description="share of the safety update in the layers that are merged")
    safe: Path | None = Field(None, description="folder of the safety model, an adapter of the aligned model or a full checkpoint; default: a LoRA trained here")
    epochs: float = Field(3, gt=0, description="passes over the safety rows")
    lr: float = Field(2e-4, gt=0, description="learning rate of that training")
    max_rank: int = Field(0, ge=0, description="adapters: cut the sum to this rank, and say what is lost; 0: exact, ranks add up")

    def inputs(self) -> list[Path]:
        """See `Mitigation.inputs`."""
        return [self.safe] if self.safe else []

    def check(self, name: str, run: Run) -> None:
        """Also refuse a safety model that is not there, and one that would make a LoRA fine-tune a full one."""
        super().check(name, run)
        if self.safe is None:
            return
        if not self.safe.is_dir():
            raise ResafeError(f"{name}: no such model folder: {self.safe}")
        if run.tuned is not None and is_adapter(run.tuned) and not is_adapter(self.safe):
            raise ResafeError(f"{name}: a LoRA fine-tune needs a safety model that is a LoRA of the same aligned model; or merge the adapter first.")

    def repair(self, run: Run) -> Path:
        """Write the repaired checkpoint or adapter to `run.output`, with the scores in safe_merge.json."""
        check_free(run.output)
        tuned, aligned, base = fingerprints(run, "safe_merge")
        scores = decide(run, tuned, aligned, base, self.operator, self.score)
        chosen = self.chosen("safe_merge", scores)
        safe = self.safe or self._trained(run, aligned)
        run.log(f"safe_merge: {len(chosen)} of {len(scores)} weights leave the directions of alignment; merged")
        if is_adapter(tuned):
            written = self._adapter(run, tuned, aligned, base, safe, chosen)
        else:
            written = self._checkpoint(run, tuned, aligned, base, safe, chosen)
        write_json(written / "safe_merge.json", self.record(scores, chosen))
        return written

    def _trained(self, run: Run, aligned: Path) -> Path:
        from resafe.heldout import drop_overlap
        from resafe.sft import SFTSettings

        rows, _ = drop_overlap([*run.refusals, *run.contrast])
        return trained(run, "safe", aligned, rows, SFTSettings(epochs=self.epochs, lr=self.lr))

    def _adapter(self, run: Run, tuned: Path, aligned: Path, base: Path, safe: Path, chosen: set[str]) -> Path:
        import torch

        from resafe.weights import concat, rescale
        from resafe.weights.alignment import Alignment

        ours, theirs, home = adapter_of(tuned, aligned), adapter_of(safe, aligned), str(base_of(tuned).absolute())
        if not chosen:
            return rescale(ours, 1.0, run.output, home)
        alignment = Alignment(aligned, base)

        def share(adapter: Adapter, there: float, elsewhere: float) -> Callable[[Module], float | Tensor]:
            """`there` in the matrices that are merged, else `elsewhere`: of a stack, expert by expert."""
            merged: dict[str, list[Piece]] = {}
            for stored, each in adapted(adapter, alignment).items():
                for piece in each:
                    if stored + piece.which in chosen:
                        merged.setdefault(piece.module.weight, []).append(piece)

            def of(module: Module) -> float | Tensor:
                each = merged.get(module.weight, [])
                if module.experts is None:
                    return there if each else elsewhere
                found = torch.full(adapter.shape(module.b), elsewhere, dtype=torch.float64)
                for piece in each:
                    piece.b(found).fill_(there)
                return found

            return of

        factors = share(ours, 1 - self.strength, 1.0), share(theirs, self.strength, 0.0)
        return concat(ours, theirs, run.output, home, factors, self.max_rank, run.log)

    def _checkpoint(self, run: Run, tuned: Path, aligned: Path, base: Path, safe: Path, chosen: set[str]) -> Path:
        from resafe.weights import Checkpoint, Pair, write_checkpoint
        from resafe.weights.alignment import Alignment

        alignment = Alignment(aligned, base)
        pair = Pair(Checkpoint(tuned), alignment.aligned, run.log)
        update = update_of(safe, pair)
        touched = {EXPERT.sub("", name) for name in chosen}

        def rule(twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
            if twin.name not in touched:
                return ours
            result, merged = ours.clone(), (1 - self.strength) * ours + self.strength * theirs
            if (step := update(twin, theirs)) is not None:
                merged += self.strength * step
            target, made = (alignment.each(str(twin.aligned), value) for value in (result, merged))
            for which in target:
                if twin.name + which in chosen:
                    target[which].copy_(made[which])
            return result

        return write_checkpoint(tuned, run.output, pair.edit(rule), config=pair.config)
