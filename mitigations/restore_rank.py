"""Take the update back along the output directions that the aligned model uses on safety data: ActSVD turned into a restoration.

Wei et al. 2024, arXiv 2402.05162 (ActSVD: the left singular vectors U of Z = W X, with X a layer's inputs at the refusals)

W = W_tuned + strength U U^T (W_aligned - W_tuned), U being the top `rank` directions of the aligned model's outputs. The
paper removes these ranks to show that safety lies in them; using them to restore a fine-tune is resafe's reading. With
`utility_rank`, directions that benign prompts use most are left alone, as in the paper's orthogonal projection (I - U_u U_u^T) U_s U_s^T.
A projection from the left keeps a LoRA a LoRA: B <- B - strength P B. Embeddings, head, routers and 1-D tensors stay as fine-tuned,
and so do experts that no refusal was routed to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from resafe.errors import ResafeError
from resafe.files import check_free
from resafe.mitigation import Mitigation, Needs, Run
from resafe.mitigations._calibrated import Layers, layers_of, sampled, two_models
from resafe.models import base_of, is_adapter
from resafe.weights import adapter_of

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.models import Loaded
    from resafe.rows import Row
    from resafe.sensitivity import InputMoment
    from resafe.weights import Checkpoint, Twin


class RestoreRank(Mitigation):
    """Statistics are those of the aligned model, in one pass over the refusals, for all layers at once."""

    needs: ClassVar[Needs] = Needs(aligned=True, safety=True, quantised=False)
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("rank", (4, 8, 16, 32, 64, 128))

    rank: int = Field(32, ge=1, description="directions restored per weight, at most its number of outputs")
    utility_rank: int = Field(0, ge=0, description="directions per weight, of benign answers, that are left as fine-tuned")
    strength: float = Field(1.0, ge=0, le=1, allow_inf_nan=False, description="1 puts the aligned weights back along the directions")
    rows: int = Field(128, ge=1, description="refusals, and benign rows, that are looked at")
    max_length: int = Field(512, ge=8, description="tokens per row")

    def check(self, name: str, run: Run) -> None:
        """Also refuse utility directions without benign rows."""
        super().check(name, run)
        if self.utility_rank and not (run.task or run.contrast):
            raise ResafeError(f"{name}: utility_rank needs benign rows: pass the task's rows with --data, or safety rows with contrast rows.")

    def repair(self, run: Run) -> Path:
        """Write the restored checkpoint or adapter to `run.output`."""
        check_free(run.output)
        tuned, aligned = two_models(run, "restore_rank")
        return self._adapter(run, tuned, aligned) if is_adapter(tuned) else self._checkpoint(run, tuned, aligned)

    def _checkpoint(self, run: Run, tuned: Path, aligned: Path) -> Path:
        from resafe.weights import Checkpoint, Pair, write_checkpoint

        pair = Pair(Checkpoint(tuned), Checkpoint(aligned), run.log)
        known = self._known(run, aligned, pair.aligned)

        def rule(twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
            if twin.aligned not in known.layers:
                return ours
            result = ours.clone()
            for place, (f, a, target) in known.layers.each(str(twin.aligned), ours, theirs, result):
                target.copy_(f + self.strength * self._projected(known, place.name, a, a - f))
            return result

        return write_checkpoint(tuned, run.output, pair.edit(rule), config=pair.config)

    def _adapter(self, run: Run, tuned: Path, aligned: Path) -> Path:
        """D = s B A, so that D - strength P D = s (B - strength P B) A."""
        from resafe.weights import Checkpoint, wide, write_adapter
        from resafe.weights._pieces import stored_pieces

        adapter, model = adapter_of(tuned, aligned), Checkpoint(aligned).plain()
        known = self._known(run, aligned, model)
        tensors = {name: adapter.finite(name) for name in adapter.names()}
        found = {there: each for there, each in stored_pieces(model, adapter)[0].items() if there in known.layers}
        if not found:
            raise ResafeError(f"restore_rank: {tuned} adapts no linear layer, such as {min(adapter.modules)}: there is nothing that it could restore.")
        for there, each in found.items():
            for piece, (place, (w,)) in zip(each, known.layers.each(there, wide(model.finite(there))), strict=True):
                b = piece.b(tensors[piece.module.b])
                if len(b) != len(w):
                    raise ResafeError(f"restore_rank: {place.name} has {len(w)} outputs in {aligned} and {len(b)} in {tuned}: the adapter is of another model.")
                b.copy_(wide(b) - self.strength * self._projected(known, place.name, w, wide(b)))
        config = {**adapter.config, "base_model_name_or_path": str(base_of(tuned).absolute())}
        return write_adapter(tuned, run.output, config, tensors)

    def _known(self, run: Run, aligned: Path, model: Checkpoint) -> _Known:
        """What is known of every linear weight of the aligned checkpoint."""
        from resafe import models

        loaded = models.load(aligned)
        layers = layers_of(loaded, model)
        safe = self._moments(run, loaded, run.refusals)
        layers.tell_unseen(safe, run.log)
        return _Known(layers, safe, self._moments(run, loaded, run.task or run.contrast) if self.utility_rank else {})

    def _moments(self, run: Run, loaded: Loaded, rows: list[Row]) -> dict[str, InputMoment]:
        from resafe.sensitivity import answers, input_moments

        chosen = sampled(rows, self.rows, run, "restore_rank")
        return input_moments(loaded.model, answers(loaded.tokenizer, chosen, max_length=self.max_length))

    def _projected(self, known: _Known, name: str, w: Tensor, x: Tensor) -> Tensor:
        """P x for the aligned weight `w`, (out, in), and `x`, (out, n)."""
        if name not in known.safe:
            return x * 0
        u = output_directions(w, known.safe[name], self.rank).to(x.dtype)
        found = u @ (u.T @ x)
        if name in known.benign:
            v = output_directions(w, known.benign[name], self.utility_rank).to(x.dtype)
            found = found - v @ (v.T @ found)
        return found


@dataclass(frozen=True)
class _Known:
    """The linear weights, and the moments of their inputs on refusals and on benign rows, by the names of `Place`."""

    layers: Layers
    safe: dict[str, InputMoment]
    benign: dict[str, InputMoment]


def output_directions(w: Tensor, moment: InputMoment, k: int) -> Tensor:
    """Orthonormal (out, k): top left singular vectors of W X, as eigenvectors of W (X X^T) W^T; float64. `k` is at most `out`.

    Where outputs take fewer directions than `k`, others fill up: there the aligned model says nothing, which is restored too, so
    that all `out` directions are the aligned weights. On the lab model that leaves less harm than stopping at the rank.
    """
    from resafe.weights.subspace import top_left

    return top_left(w.double() @ moment.total @ w.double().T, k, beyond=True)
