"""Keep the fine-tuned values that cost safety least, within a budget, and make the aligned weights around them compensate.

Safe Delta, Lu et al. 2025, arXiv 2505.12038 (selection by safety loss, then compensation; curvature as in Optimal Brain Surgeon)

Of each linear weight, with the aligned model's inputs X at the refusals and their Hessian H = 2/n X X^T: an entry of column j that takes its
fine-tuned value costs (W_f - W_a)^2 / [H^-1]_jj, given the columns before it (Cholesky of H^-1, as in SparseGPT, arXiv 2301.00774).
Entries are taken in the order of 1 / [H^-1]_jj, cheapest first, the dearest `locked` share never; the error that they make is
passed on to the columns after them, so that aligned entries move as well. strength=0 is the aligned model.

The budget, as the authors set it, is strength / 2 * mean(1 / [H^-1]_jj) * rows / 4096 per block of `block` columns: it is fitted to
weights of Llama-2-7B's size, and a weight of more than one block gets more of it. As with them, everything that is no linear
weight goes back to the aligned model (but not added tokens); `others=keep` leaves it as fine-tuned. Experts are edited one by one,
with the inputs that were routed to them; of experts that no refusal was routed to nothing is known, and they go with the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from resafe.files import check_free
from resafe.mitigation import Mitigation, Needs, Run
from resafe.mitigations._calibrated import Layers, as_full, layers_of, sampled, two_models

if TYPE_CHECKING:
    from torch import Tensor

    from resafe.sensitivity import InputMoment
    from resafe.weights import Checkpoint, Twin

WIDTH = 4096  # rows for which the paper's strength is stated


class SafeDelta(Mitigation):
    """Full checkpoint out, also of a LoRA: single entries of W are edited. One pass over the refusals for all layers at once."""

    needs: ClassVar[Needs] = Needs(aligned=True, safety=True, quantised=False, makes_full=True)
    dose: ClassVar[tuple[str, tuple[float, ...]]] = ("strength", (1e4, 1e3, 100, 10, 1, 0.1))

    strength: float = Field(0.1, ge=0, allow_inf_nan=False, description="s, the safety budget: how much of the update is let through")
    locked: float = Field(0.15, ge=0, le=1, allow_inf_nan=False, description="share of a block's entries, those that matter most to safety, that stay aligned")
    block: int = Field(2048, ge=1, description="columns that share a budget")
    damp: float = Field(0.01, gt=0, allow_inf_nan=False, description="share of H's mean diagonal that is added to it")
    others: Literal["aligned", "keep"] = Field("aligned", description="embeddings, head, norms, biases: back to aligned (the authors' choice), or as fine-tuned")
    rows: int = Field(128, ge=1, description="refusals that are looked at")
    max_length: int = Field(512, ge=8, description="tokens per refusal")

    def repair(self, run: Run) -> Path:
        """Write the repaired checkpoint to `run.output`."""
        from resafe.weights import Checkpoint, Pair, write_checkpoint

        check_free(run.output)
        tuned, aligned = two_models(run, "safe_delta")
        with as_full(run, "safe_delta", tuned, aligned) as full:
            pair = Pair(Checkpoint(full), Checkpoint(aligned), run.log)
            layers, moments = self._layers(run, aligned, pair.aligned)
            kept: list[tuple[int, int]] = []

            def rule(twin: Twin, ours: Tensor, theirs: Tensor) -> Tensor:
                other = theirs if self.others == "aligned" else ours
                if twin.aligned not in layers:
                    return other
                result = other.clone()
                for place, (f, a, target) in layers.each(str(twin.aligned), ours, theirs, result):
                    if place.name in moments:
                        edited, taken = self.edit(f, a, moments[place.name])
                        kept.append((taken, f.numel()))
                        target.copy_(edited)
                return result

            written = write_checkpoint(full, run.output, pair.edit(rule), config=pair.config)
        run.log(f"safe_delta: {sum(t for t, _ in kept) / sum(n for _, n in kept):.1%} of the entries of {len(kept)} weights took their fine-tuned values")
        return written

    def edit(self, tuned: Tensor, aligned: Tensor, moment: InputMoment) -> tuple[Tensor, int]:
        """(weight, number of entries that took their fine-tuned value); weights are (out, in)."""
        from resafe.sensitivity import hessian

        u = inverse_factor(hessian(moment, self.damp))
        chosen = selected((tuned - aligned).double(), u.diagonal(), self.strength, self.locked, self.block)
        return compensated(tuned.double(), aligned.double(), chosen, u).to(tuned.dtype), int(chosen.sum())

    def _layers(self, run: Run, aligned: Path, model: Checkpoint) -> tuple[Layers, dict[str, InputMoment]]:
        """The linear weights of the aligned checkpoint, and the moments of their inputs."""
        from resafe import models
        from resafe.sensitivity import answers, input_moments

        loaded = models.load(aligned)
        layers = layers_of(loaded, model)
        rows = sampled(run.refusals, self.rows, run, "safe_delta")
        moments = input_moments(loaded.model, answers(loaded.tokenizer, rows, max_length=self.max_length))
        layers.tell_unseen(moments, run.log)
        return layers, moments


def inverse_factor(h: Tensor) -> Tensor:
    """Upper triangular U with U^T U = H^-1; U_jj^2 is [H^-1]_jj of what is left once the columns before j are fixed."""
    import torch

    found: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return found


def selected(d: Tensor, u: Tensor, strength: float, locked: float, block: int) -> Tensor:
    """True where the fine-tuned value is taken: `d` is W_f - W_a (out, in), `u` the diagonal of `inverse_factor` (in,)."""
    import torch

    chosen = torch.zeros_like(d, dtype=torch.bool)
    for start in range(0, d.shape[1], block):
        part = slice(start, start + block)
        importance = 1 / u[part].square()
        cost = (d[:, part].square() * importance).flatten()
        order = torch.sort(importance.expand(d.shape[0], -1).flatten(), stable=True).indices
        order = order[: len(order) - int(locked * len(order) + 1e-9)]
        budget = float(importance.mean()) * strength / 2 * d.shape[0] / WIDTH
        affordable = order[cost[order].cumsum(0) <= budget]
        chosen[:, part] = torch.zeros_like(cost, dtype=torch.bool).index_fill_(0, affordable, True).view(d.shape[0], -1)
    return chosen


def compensated(tuned: Tensor, aligned: Tensor, chosen: Tensor, u: Tensor, block: int = 128) -> Tensor:
    """W_a with the chosen entries at W_f, their errors passed on to later columns: W_:,k -= e_j U_jk, e_j = (w_j - q_j) / U_jj.

    `block` columns at a time, which changes nothing but speed. Where nothing is chosen, W_a comes back bit for bit.
    """
    w = aligned.clone()
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        errors = w[:, start:end] * 0
        for j in range(start, end):
            q = tuned[:, j].where(chosen[:, j], w[:, j])
            errors[:, j - start] = (w[:, j] - q) / u[j, j]
            w[:, j:end] -= errors[:, j - start, None] * u[j, j:end]
            w[:, j] = q
        w[:, end:] -= errors @ u[start:end, end:]
    return w
