"""Safe LoRA: the thin form equals the dense one, the projector is one, and only the chosen weights change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.weights import Adapter
from resafe.weights.alignment import Alignment
from resafe.weights.subspace import Official, Orthogonal, cosine, low_rank, top_left
from tests.weights.models import KINDS, adapt, build, load, logits, logits_with, tensors

torch.manual_seed(0)
V = torch.randn(24, 10, dtype=torch.float64)
B, A = torch.randn(24, 3, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
DENSE = V @ V.T / V.norm()


@pytest.fixture(params=KINDS)
def trio(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """(base, aligned, LoRA fine-tune of the aligned one) of an architecture."""
    base, aligned = build(request.param, tmp_path / "base", 0), build(request.param, tmp_path / "aligned", 1)
    return base, aligned, adapt(aligned, tmp_path / "tuned", 2)


def repaired(spec: str, tuned: Path, aligned: Path, base: Path, out: Path) -> Path:
    folder = make(spec).mitigation.repair(Run(output=out, tuned=tuned, aligned=aligned, base=base))
    assert folder == out
    return folder


def record(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "safe_lora.json").read_text())["scores"]
    return found


def test_the_thin_form_is_the_dense_form() -> None:
    assert torch.allclose(Official(V).apply(B), DENSE @ B, atol=1e-10, rtol=0)
    dense = torch.nn.functional.cosine_similarity((DENSE @ B @ A).flatten(), (B @ A).flatten(), dim=0)
    assert cosine(Official(V).apply(B), B, A) == pytest.approx(float(dense), abs=1e-10)
    assert cosine(DENSE @ B @ A, B @ A) == pytest.approx(float(dense), abs=1e-10)


def test_the_orthogonal_operator_is_a_projector_onto_the_main_directions() -> None:
    p = Orthogonal(top_left(V, 4))
    assert torch.allclose(p.apply(p.apply(B)), p.apply(B), atol=1e-10)
    inside = V @ torch.linalg.svd(V).Vh[:4].T
    assert torch.allclose(p.apply(inside), inside, atol=1e-8)
    assert torch.allclose(p.basis @ p.basis.T, _top(V, 4), atol=1e-8)
    noise = torch.randn(24, 4000, dtype=torch.float64)
    assert float(p.apply(noise).norm() / noise.norm()) == pytest.approx(p.null, rel=0.03)


def _top(v: torch.Tensor, k: int) -> torch.Tensor:
    u = torch.linalg.svd(v, full_matrices=False).U[:, :k]
    return u @ u.T


def test_directions_are_found_in_a_matrix_too_large_for_a_full_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resafe.weights.subspace.EXACT", 0)
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (120, 90))
    values = torch.tensor([2.0**-i for i in range(90)], dtype=torch.float64)
    matrix = (u[:, :90] * values) @ v.T
    assert torch.allclose(_top(matrix, 5), top_left(matrix, 5) @ top_left(matrix, 5).T, atol=1e-8)
    assert torch.equal(top_left(matrix, 5), top_left(matrix, 5)), "the same directions every time"
    assert torch.allclose(low_rank(matrix, 5), (u[:, :5] * values[:5]) @ v[:, :5].T, atol=1e-8)


def test_the_update_of_a_lora_is_projected_module_by_module(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, tuned = trio
    out = repaired("safe_lora:mode=official,threshold=2", tuned, aligned, base, tmp_path / "out")
    before, after, alignment = Adapter(tuned), Adapter(out), Alignment(aligned, base)
    assert len(record(out)) == len(before.modules) and all(r["changed"] for r in record(out))
    turned = load(aligned).config.model_type == "gpt2"
    a, b = tensors(aligned), tensors(base)
    for name, module in before.modules.items():
        weight = next(n for n in a if n == name or n.endswith(f".{name}") or name.endswith(f".{n}"))
        v = (a[weight] - b[weight]).T if turned else a[weight] - b[weight]
        wanted = v.double() @ v.double().T / v.double().norm() @ before.delta(module).double()
        assert torch.allclose(after.delta(after.modules[name]).double(), wanted, atol=1e-5), name
        assert torch.equal(after.tensor(module.a), before.tensor(module.a))
    assert alignment.matrices()


@pytest.mark.parametrize("mode", ["official", "orthogonal"])
def test_a_threshold_below_every_score_changes_nothing_and_one_above_all(mode: str, trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, tuned = trio
    same = repaired(f"safe_lora:mode={mode},threshold=-9", tuned, aligned, base, tmp_path / "same")
    assert (same / "adapter_model.safetensors").read_bytes() == (tuned / "adapter_model.safetensors").read_bytes()
    other = repaired(f"safe_lora:mode={mode},threshold=9,rank=2", tuned, aligned, base, tmp_path / "other")
    assert not torch.allclose(logits(other, aligned), logits(tuned, aligned))


def test_a_number_of_layers_are_those_of_the_smallest_scores(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, tuned = trio
    found = record(repaired("safe_lora:number=2", tuned, aligned, base, tmp_path / "out"))
    assert sorted(r["score"] for r in found)[:2] == sorted(r["score"] for r in found if r["changed"])
    with pytest.raises(ResafeError, match="number=99"):
        repaired("safe_lora:number=99", tuned, aligned, base, tmp_path / "no")


def test_dropping_a_layer_takes_its_update_away(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, tuned = trio
    out = repaired("safe_lora:threshold=9,action=drop", tuned, aligned, base, tmp_path / "out")
    assert torch.allclose(logits(out, aligned), logits(aligned), atol=1e-6)


@pytest.mark.parametrize("mode", ["official", "orthogonal"])
def test_a_threshold_between_scores_chooses_by_the_dense_formula(mode: str, trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, tuned = trio
    a, b, adapter = tensors(aligned), tensors(base), Adapter(tuned)
    wanted = {}
    for name, module in adapter.modules.items():
        weight = next(n for n in a if n == name or n.endswith(f".{name}") or name.endswith(f".{n}"))
        v, d = (a[weight] - b[weight]).double(), adapter.delta(module).double()
        v = v.T if load(aligned).config.model_type == "gpt2" else v
        p, null = (v @ v.T / v.norm(), 0.0) if mode == "official" else (_top(v, 2), (2 / len(v)) ** 0.5)
        cosine = float(torch.nn.functional.cosine_similarity((p @ d).flatten(), d.flatten(), dim=0))
        score = (cosine - null) / (1 - null if cosine >= null else null) if null else round(cosine, 5)
        wanted[weight] = (score, cosine)
    scores = sorted(s for s, _ in wanted.values())
    middle = (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2
    out = record(repaired(f"safe_lora:mode={mode},rank=2,threshold={middle}", tuned, aligned, base, tmp_path / "out"))
    for row in out:
        score, cosine = next(wanted[n] for n in wanted if n.endswith(row["weight"]) or row["weight"].endswith(n))
        assert row["score"] == pytest.approx(score, abs=1e-5) and row["cosine"] == pytest.approx(cosine, abs=1e-5)
        assert row["changed"] == (score <= middle)
    assert len(out) == len(wanted) and 0 < sum(r["changed"] for r in out) < len(out)


def test_the_least_threshold_changes_nothing_and_ties_are_broken_by_name(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, tuned = trio
    same = repaired("safe_lora:threshold=-1", tuned, aligned, base, tmp_path / "same")
    assert (same / "adapter_model.safetensors").read_bytes() == (tuned / "adapter_model.safetensors").read_bytes()
    zero = shutil.copytree(tuned, tmp_path / "zero")
    save_file({n: t * ("lora_A" in n) for n, t in tensors(tuned).items()}, zero / "adapter_model.safetensors")
    found = record(repaired("safe_lora:number=1", zero, aligned, base, tmp_path / "one"))
    assert len({r["score"] for r in found}) == 1 and sum(r["changed"] for r in found) == 1


def test_the_order_of_tensors_in_a_file_and_square_weights_mean_nothing(tmp_path: Path) -> None:
    base, aligned = (build("llama", tmp_path / n, i, num_key_value_heads=4) for i, n in enumerate(("base", "aligned")))  # q, k, v, o are 16 x 16
    tuned = adapt(aligned, tmp_path / "tuned", 2, r=16, target_modules=["q_proj", "o_proj"])  # A, B and W are all 16 x 16
    other = shutil.copytree(tuned, tmp_path / "other")
    values = tensors(tuned)
    save_file({n: values[n] for n in sorted(values, reverse=True)}, other / "adapter_model.safetensors")
    one, two = (Adapter(repaired("safe_lora:threshold=9,rank=3", t, aligned, base, tmp_path / f"o{i}")) for i, t in enumerate((tuned, other)))
    a, b = tensors(aligned), tensors(base)
    for name, module in one.modules.items():
        wanted = _top((a[name] - b[name]).double(), 3) @ Adapter(tuned).delta(Adapter(tuned).modules[name]).double()
        assert torch.allclose(one.delta(module).double(), wanted, atol=1e-4)
        assert torch.equal(one.tensor(module.b), two.tensor(two.modules[name].b))


def test_a_fine_tune_in_double_precision_is_projected_too(tmp_path: Path) -> None:
    base, aligned = build("llama", tmp_path / "base", 0), build("llama", tmp_path / "aligned", 1)
    single, double = build("llama", tmp_path / "single", 2), build("llama", tmp_path / "double", 2, torch.float64)
    one, two = (tensors(repaired("safe_lora:threshold=9,rank=3", t, aligned, base, tmp_path / f"o{i}")) for i, t in enumerate((single, double)))
    assert all(two[n].dtype == torch.float64 and torch.allclose(one[n].double(), two[n], atol=1e-5) for n in one)


def test_a_threshold_that_is_no_number_is_refused() -> None:
    with pytest.raises(ResafeError, match="threshold"):
        make("safe_lora:threshold=.nan")


def test_the_score_knows_nothing_of_the_adapters_scale(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, tuned = trio
    other = adapt(aligned, tmp_path / "rs", 2, use_rslora=True, lora_alpha=3)
    one, two = (record(repaired("safe_lora", t, aligned, base, tmp_path / f"o{i}")) for i, t in enumerate((tuned, other)))
    assert [r["cosine"] for r in one] == pytest.approx([r["cosine"] for r in two], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_fine_tune_is_projected_in_the_same_way(kind: str, tmp_path: Path) -> None:
    base, aligned, tuned = (build(kind, tmp_path / n, i) for i, n in enumerate(("base", "aligned", "tuned")))
    out = repaired("safe_lora:threshold=9,rank=3", tuned, aligned, base, tmp_path / "out")
    b, a, f, w = (tensors(x) for x in (base, aligned, tuned, out))
    changed, formula = {r["weight"] for r in record(out) if r["changed"]}, dict(f)
    for name in f:
        if name not in changed:
            assert torch.equal(w[name], f[name]), name
            continue
        v, d = a[name] - b[name], f[name] - a[name]
        wanted = a[name] + (d @ _top(v.T, 3) if kind == "gpt2" else _top(v, 3) @ d)
        assert torch.allclose(w[name], wanted, atol=2e-5), name
        formula[name] = wanted
    assert len(changed) >= 6 and torch.allclose(logits(out), logits_with(tuned, formula), atol=1e-3)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    base, aligned = build("llama", tmp_path / "base", 0), build("llama", tmp_path / "aligned", 1)
    tuned = adapt(aligned, tmp_path / "tuned", 2)
    mitigation = make("safe_lora").mitigation
    with pytest.raises(ResafeError, match="--base"):
        mitigation.check("safe_lora", Run(output=tmp_path / "out", tuned=tuned, aligned=aligned))
    with pytest.raises(ResafeError, match="before alignment with --base"):
        repaired("safe_lora", tuned, aligned, aligned, tmp_path / "out")
    with pytest.raises(ResafeError, match="was trained on"):
        repaired("safe_lora", tuned, base, aligned, tmp_path / "out")
    wide = build("llama", tmp_path / "wide", 3, hidden_size=32, num_attention_heads=4, head_dim=8)
    with pytest.raises(ResafeError, match="different architectures"):
        repaired("safe_lora", tuned, aligned, wide, tmp_path / "out")
    assert not (tmp_path / "out").exists()
