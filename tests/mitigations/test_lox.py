"""LoX: full rank is full extrapolation, strength 0 is nothing, 1-D tensors and embeddings stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.weights import merge_into
from tests.weights.models import KINDS, adapt, build, logits, logits_with, tensors


@pytest.fixture(params=KINDS)
def trio(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    return [build(request.param, tmp_path / name, seed) for seed, name in enumerate(("base", "aligned", "tuned"))]


def run(spec: str, trio: list[Path], out: Path) -> Path:
    base, aligned, tuned = trio
    return make(spec).mitigation.repair(Run(output=out, tuned=tuned, aligned=aligned, base=base))


def test_the_best_approximation_of_rank_k_is_added_to_every_linear_weight(trio: list[Path], tmp_path: Path) -> None:
    out = run("lox:rank=2,strength=1.5", trio, tmp_path / "out")
    b, a, f, w = (tensors(x) for x in (*trio, out))
    moved, wanted = 0, dict(f)
    for name in f:
        v = (a[name] - b[name]).double()
        linear = v.ndim == 2 and not any(e in name for e in ("embed", "wte", "wpe", "lm_head"))
        if not linear:
            assert torch.equal(w[name], f[name]), name
        if linear:
            u, s, vh = torch.linalg.svd(v, full_matrices=False)
            wanted[name] = (f[name] + 1.5 * (u[:, :2] * s[:2]) @ vh[:2]).float()
            assert torch.allclose(w[name], wanted[name], atol=1e-5), name
            moved += 1
    assert moved >= 6 and torch.allclose(logits(out), logits_with(trio[2], wanted), atol=1e-3)
    assert not torch.allclose(logits(out), logits(trio[2]), atol=1e-2)


def test_all_ranks_are_the_whole_direction_and_strength_0_is_nothing(trio: list[Path], tmp_path: Path) -> None:
    whole, many = (tensors(run(f"lox:rank={k},strength=0.5", trio, tmp_path / f"k{k}")) for k in (0, 999))
    b, a, f = (tensors(x) for x in trio)
    name = next(n for n in f if "mlp" in n and f[n].ndim == 2)
    assert torch.allclose(whole[name], f[name] + 0.5 * (a[name] - b[name]), atol=1e-6)
    assert all(torch.allclose(whole[n], many[n], atol=1e-6) for n in whole)
    same = tensors(run("lox:strength=0", trio, tmp_path / "same"))
    assert all(torch.equal(same[n], f[n]) for n in f)


def test_the_aligned_model_itself_is_what_the_paper_extrapolates(trio: list[Path], tmp_path: Path) -> None:
    base, aligned, _ = trio
    out = tensors(run("lox:rank=0,strength=1", [base, aligned, aligned], tmp_path / "out"))
    a, b = tensors(aligned), tensors(base)
    name = next(n for n in a if "mlp" in n and a[n].ndim == 2)
    assert torch.allclose(out[name], 2 * a[name] - b[name], atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "mixtral", "gpt_oss"])
def test_a_lora_is_merged_first(kind: str, tmp_path: Path) -> None:
    base, aligned = (build(kind, tmp_path / name, seed) for seed, name in enumerate(("base", "aligned")))
    tuned = adapt(aligned, tmp_path / "tuned", 2)
    merged = merge_into(aligned, tuned, tmp_path / "merged")
    out, full = (run("lox:rank=2,strength=0.5", [base, aligned, t], tmp_path / t.name / "out") for t in (tuned, merged))
    assert torch.equal(logits(out), logits(full)) and not torch.allclose(logits(out), logits(merged), atol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "base", "merged", "tuned"], "nothing is left over"


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    aligned = build("llama", tmp_path / "aligned", 1)
    with pytest.raises(ResafeError, match="--base"):
        make("lox").mitigation.check("lox", Run(output=tmp_path / "out", tuned=aligned, aligned=aligned))
