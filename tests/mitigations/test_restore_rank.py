"""Restoring along the aligned model's output directions: equal to the singular vectors of W X, for full checkpoints and LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resafe.errors import ResafeError
from resafe.mitigations import make
from resafe.weights import merge_into
from tests.mitigations.twins import BENIGN, KINDS, SAFE, inputs, maps, pair, repaired
from tests.weights.models import logits, tensors


def directions(weight: torch.Tensor, x: torch.Tensor, k: int) -> torch.Tensor:
    """Top-k left singular vectors of W X, from X itself."""
    return torch.linalg.svd(weight.double() @ x.T, full_matrices=False).U[:, :k]


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_goes_back_along_the_main_output_directions(kind: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair(kind, tmp_path, aligned)
    out = maps(tensors(repaired("restore_rank:rank=3,strength=0.5", before, tuned, tmp_path / "out")))
    a, f, x = maps(tensors(before)), maps(tensors(tuned)), inputs(before, SAFE)
    assert len(x) >= 8 and x.keys() <= f.keys()
    for name in f:
        if name not in x:
            assert torch.equal(out[name], f[name]), name
            continue
        u = directions(a[name], x[name], 3)
        wanted = f[name].double() + 0.5 * u @ (u.T @ (a[name] - f[name]).double())
        assert torch.allclose(out[name].double(), wanted, atol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_all_directions_are_the_aligned_model_and_strength_0_is_nothing(kind: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair(kind, tmp_path, aligned)
    a, f = maps(tensors(before)), maps(tensors(tuned))
    back = maps(tensors(repaired("restore_rank:rank=9999", before, tuned, tmp_path / "back")))
    same = maps(tensors(repaired("restore_rank:strength=0", before, tuned, tmp_path / "same")))
    linear = inputs(before, SAFE)
    assert all(torch.allclose(back[n], a[n] if n in linear else f[n], atol=1e-6) for n in f)
    assert all(torch.equal(same[n], f[n]) for n in f)


def test_directions_of_benign_answers_are_left_as_fine_tuned(aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned)
    out = tensors(repaired("restore_rank:rank=4,utility_rank=3", before, tuned, tmp_path / "out", task=BENIGN))
    a, f, safe, benign = tensors(before), tensors(tuned), inputs(before, SAFE), inputs(before, BENIGN)
    for name in safe:
        u, v = directions(a[name], safe[name], 4), directions(a[name], benign[name], 3)
        p = (torch.eye(len(u)) - v @ v.T) @ u @ u.T
        assert torch.allclose(out[name].double(), f[name] + p @ (a[name] - f[name]).double(), atol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_stays_one_and_does_what_its_merge_does(kind: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair(kind, tmp_path, aligned, lora=True)
    out = repaired("restore_rank:rank=3,strength=0.7", before, tuned, tmp_path / "out")
    merged = merge_into(before, tuned, tmp_path / "merged")
    full = repaired("restore_rank:rank=3,strength=0.7", before, merged, tmp_path / "full")
    assert torch.allclose(logits(out, before), logits(full), atol=1e-5)
    assert not torch.allclose(logits(out, before), logits(merged), atol=1e-3)
    ours, theirs = tensors(out), tensors(tuned)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs if "lora_A" in n)


def test_utility_directions_without_benign_rows_are_refused(aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned)
    with pytest.raises(ResafeError, match="utility_rank needs benign rows"):
        repaired("restore_rank:utility_rank=2", before, tuned, tmp_path / "out")
    with pytest.raises(ResafeError, match="strength"):
        make("restore_rank:strength=1.5")
