"""Take the update back along the output directions that the aligned model uses on safety data: ActSVD turned into a restoration.

Wei et al. 2024, arXiv 2402.05162 (ActSVD: the left singular vectors U of Z = W X, with X a layer's inputs at the refusals)

W = W_tuned + strength U U^T (W_aligned - W_tuned), U being the top `rank` directions of the aligned model's outputs. The
paper removes these ranks to show that safety lies in them; using them to restore a fine-tune is resafe's reading. With
`utility_rank`, directions that benign prompts use most are left alone, as in the paper's orthogonal projection (I - U_u U_u^T) U_s U_s^T.
A projection from the left keeps a LoRA a LoRA: B <- B - strength P B. Embeddings, head and 1-D tensors stay as fine-tuned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from resafe.errors import ResafeError
from resafe.files import check_free
from resafe.mitigation import Mitigation, Needs, Run
from resafe.mitigations._calibrated import by_module, sampled, two_models
from resafe.models import base_of, is_adapter
from resafe.weights import adapter_of

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.models import Loaded
    from resafe.rows import Row
    from resafe.sensitivity import InputMoment
    from resafe.weights import Twin


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
        layers = self._layers(run, aligned, pair.aligned.names())

        def rule(twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
            if twin.aligned not in layers:
                return ours
            layer = layers[twin.aligned]
            back = self._projected(layer, layer.turn(theirs), layer.turn(theirs - ours))
            return ours + self.strength * layer.turn(back)

        return write_checkpoint(tuned, run.output, pair.edit(rule), config=pair.config)

    def _adapter(self, run: Run, tuned: Path, aligned: Path) -> Path:
        """D = s B A, so that D - strength P D = s (B - strength P B) A."""
        from resafe.weights import Checkpoint, translate, wide, write_adapter

        adapter, model = adapter_of(tuned, aligned), Checkpoint(aligned).plain()
        layers = self._layers(run, aligned, model.names())
        modules = {f"{name}.weight": module for name, module in adapter.modules.items()}
        tensors = {name: adapter.finite(name) for name in adapter.names()}
        known = {name: there for name, there in translate(modules, model.names()).items() if there in layers}
        if not known:
            raise ResafeError(f"restore_rank: {tuned} adapts no linear layer, such as {min(modules)}: there is nothing that it could restore.")
        for name, there in known.items():
            b = tensors[modules[name].b]
            back = self._projected(layers[there], layers[there].turn(wide(model.finite(there))), wide(b))
            tensors[modules[name].b] = (wide(b) - self.strength * back).to(b.dtype)
        config = {**adapter.config, "base_model_name_or_path": str(base_of(tuned).absolute())}
        return write_adapter(tuned, run.output, config, tensors)

    def _layers(self, run: Run, aligned: Path, stored: list[str]) -> dict[str, _Layer]:
        """What is known of every linear weight, by its name in the aligned checkpoint."""
        from resafe import models
        from resafe.sensitivity import linears
        from resafe.sensitivity.linears import turned

        loaded = models.load(aligned)
        safe = self._moments(run, loaded, run.refusals)
        there, modules = by_module(loaded, stored, safe), linears(loaded.model)
        benign = self._moments(run, loaded, run.task or run.contrast) if self.utility_rank else {}
        return {s: _Layer(turned(modules[n]), safe[n], benign.get(n)) for s, n in there.items()}

    def _moments(self, run: Run, loaded: Loaded, rows: list[Row]) -> dict[str, InputMoment]:
        from resafe.sensitivity import answers, input_moments

        chosen = sampled(rows, self.rows, run, "restore_rank")
        return input_moments(loaded.model, answers(loaded.tokenizer, chosen, max_length=self.max_length))

    def _projected(self, layer: _Layer, w: Tensor, x: Tensor) -> Tensor:
        """P x for the aligned weight `w`, (out, in), and `x`, (out, n)."""
        u = output_directions(w, layer.safe, self.rank).to(x.dtype)
        found = u @ (u.T @ x)
        if layer.benign is not None:
            v = output_directions(w, layer.benign, self.utility_rank).to(x.dtype)
            found = found - v @ (v.T @ found)
        return found


@dataclass(frozen=True)
class _Layer:
    """Whether its weight is stored as (in, out), and the moments of its inputs on refusals and on benign rows."""

    turned: bool
    safe: InputMoment
    benign: InputMoment | None

    def turn(self, x: Tensor) -> Tensor:
        """Between the stored layout and (out, in), either way."""
        return x.T if self.turned else x


def output_directions(w: Tensor, moment: InputMoment, k: int) -> Tensor:
    """Orthonormal (out, k): top left singular vectors of W X, as eigenvectors of W (X X^T) W^T; float64. `k` is at most `out`.

    Where outputs take fewer directions than `k`, others fill up: there the aligned model says nothing, which is restored too, so
    that all `out` directions are the aligned weights. On the lab model that leaves less harm than stopping at the rank.
    """
    from resafe.weights.subspace import top_left

    return top_left(w.double() @ moment.total @ w.double().T, k, beyond=True)
