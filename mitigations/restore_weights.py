"""Move the fine-tuned weights part of the way back to the aligned model: WiSE-FT interpolation.

https://arxiv.org/abs/2109.01903 (WiSE-FT), https://arxiv.org/abs/2412.19512 (for safety after fine-tuning)

Needs no data and no training. A LoRA adapter of the aligned model stays an adapter: interpolating toward its own base is
the same as scaling its update by 1 - strength, which works on a 4-bit base as well. A full checkpoint is streamed, one
tensor at a time; what happens to tied embeddings, added tokens and unmatched tensors is described in
`resafe.weights.pair`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from resafe.errors import ResafeError
from resafe.files import check_free, scratch, write_json
from resafe.mitigation import Mitigation, Needs, Run
from resafe.models import base_of, is_adapter
from resafe.weights import adapter_of

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.weights import Module, Twin

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Step = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]  # 0 would be no restoration at all
CURVE = "restore_weights.json"
NO_ROWS = "strength 'auto' needs held-out rows to measure utility on: pass them with --heldout or --data, or set a strength."


class RestoreWeights(Mitigation):
    """`strength` 0 keeps the fine-tuned weights, 1 returns to the aligned ones.

    "auto" takes the largest strength of `grid` whose utility on held-out rows is at most `margin` below that of the
    fine-tuned model, and writes the utilities that it measured to restore_weights.json.

    `layers` makes the strength depend on the depth: `[0.5, 1, 0.5]` takes half of it in the first and the last block, all of it
    in the middle, and what lies between in between. Embeddings count as the first block, final norm and head as the last.
    """

    needs: ClassVar[Needs] = Needs(aligned=True)  # a quantised base serves a LoRA run; a quantised full one is refused
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("strength", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))

    strength: Fraction | Literal["auto"] = 0.5
    margin: Fraction = 0.02
    grid: Annotated[tuple[Step, ...], Field(min_length=1)] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    embeddings: Literal["restore", "keep"] = "restore"  # keep: embedding and output head stay as trained
    layers: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (1.0,)  # share of the strength along the depth, linear in between

    def check(self, name: str, run: Run) -> None:
        """Also refuse a calibration without held-out rows."""
        super().check(name, run)
        if self.strength == "auto" and run.measure is None:
            raise ResafeError(NO_ROWS)

    def repair(self, run: Run) -> Path:
        """Write the restored checkpoint or adapter to `run.output`."""
        tuned, aligned = _models(run)
        check_free(run.output)
        if not is_adapter(tuned):
            _check_tuned(tuned, aligned)
        if self.strength == "auto":
            return self._search(run, tuned, aligned)
        return self._restore(run, tuned, aligned, self.strength, run.output)

    def _restore(self, run: Run, tuned: Path, aligned: Path, strength: float, target: Path) -> Path:
        if is_adapter(tuned):
            return self._restore_adapter(tuned, aligned, strength, target)
        return self._restore_checkpoint(run, tuned, aligned, strength, target)

    def _restore_adapter(self, tuned: Path, aligned: Path, strength: float, target: Path) -> Path:
        from resafe.weights import Checkpoint, rescale
        from resafe.weights._pieces import pieces
        from resafe.weights.names import Depths

        def factor(module: Module) -> float:
            if self.embeddings == "keep" and module.vocabulary:
                return 1.0
            return 1 - self._share(depths(there.get(module.weight, module.weight))) * strength  # W - W_a = (1 - a) s B A

        adapter, names = adapter_of(tuned, aligned), Checkpoint(aligned).names()
        depths, there = Depths(names), {p.module.weight: stored for stored, each in pieces(adapter.modules, names).items() for p in each}
        return rescale(adapter, factor, target, base=str(base_of(tuned).absolute()))

    def _restore_checkpoint(self, run: Run, tuned: Path, aligned: Path, strength: float, target: Path) -> Path:
        from resafe.weights import Checkpoint, Pair, write_checkpoint
        from resafe.weights.names import Depths

        def rule(twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
            if self.embeddings == "keep" and twin.vocabulary:
                return ours
            return interpolate(ours, theirs, self._share(depths(twin.name)) * strength)

        pair = Pair(Checkpoint(tuned), Checkpoint(aligned), run.log)
        depths = Depths(t.name for t in pair.twins)
        return write_checkpoint(tuned, target, pair.edit(rule, blocks=True), config=pair.config)

    def _share(self, depth: float) -> float:
        """The share of the strength at a depth in [0, 1]: `layers` are its values at evenly spaced depths."""
        at = depth * (len(self.layers) - 1)
        below = min(int(at), max(0, len(self.layers) - 2))
        above = min(below + 1, len(self.layers) - 1)
        return self.layers[below] + (at - below) * (self.layers[above] - self.layers[below])

    def _search(self, run: Run, tuned: Path, aligned: Path) -> Path:
        start = _utility(run, tuned)
        curve = [{"strength": 0.0, "utility": start}]
        run.log(f"utility {start:.4f} as fine-tuned")
        with scratch(run.output, "tries") as tries:
            for strength in sorted(set(self.grid), reverse=True):  # utility need not be monotone: try from the top
                candidate = self._restore(run, tuned, aligned, strength, tries / f"{strength:g}")
                utility = _utility(run, candidate)
                curve.append({"strength": strength, "utility": utility})
                run.log(f"utility {utility:.4f} at strength {strength:g}")
                if utility >= start - self.margin - 1e-9:
                    write_json(candidate / CURVE, {"strength": strength, "margin": self.margin, "curve": curve})
                    os.replace(candidate, run.output)
                    return run.output
                shutil.rmtree(candidate)
        best = max(curve[1:], key=lambda point: point["utility"])
        raise ResafeError(
            f"no strength kept utility within {self.margin:g} of {start:.4f}; the best was {best['utility']:.4f} at strength "
            f"{best['strength']:g}. Allow a larger margin, or add smaller strengths to the grid."
        )


def interpolate(tuned: Tensor, aligned: Tensor, strength: float) -> Tensor:
    """W = (1 - a) W_f + a W_a: WiSE-FT's eq. (1) with its mixing coefficient 1 - a, as here a points to the aligned model."""
    return tuned.lerp(aligned, strength)


def _check_tuned(tuned: Path, aligned: Path) -> None:
    from resafe.weights import Checkpoint, same_weights

    ours = Checkpoint(tuned)
    if not ours.quantised and same_weights(ours, Checkpoint(aligned)):
        raise ResafeError(f"{tuned} holds the weights of the aligned model {aligned}: name the fine-tuned model, and with --aligned the one before.")


def _models(run: Run) -> tuple[Path, Path]:
    if run.tuned is None:
        raise ResafeError("restore_weights needs the fine-tuned model: name its folder.")
    if run.aligned is None:
        raise ResafeError("restore_weights needs the model before fine-tuning: name its folder with --aligned.")
    return run.tuned, run.aligned


def _utility(run: Run, folder: Path) -> float:
    if run.measure is None:
        raise ResafeError(NO_ROWS)
    utility = run.measure(folder)
    if not 0 <= utility <= 1:
        raise ResafeError(f"the utility of {folder} was measured as {utility}, which is not between 0 and 1.")
    return utility
