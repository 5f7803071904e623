"""Mixtures of experts, stored one by one and stacked: every method that edits weights against the formula on each expert's matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.weights import merge_into
from tests.weights.models import EXPERTS, IDS, adapt, build, loaded_with, logits, rewrite, tensors

LAYOUTS = [(kind, stacked) for kind in EXPERTS for stacked in (False, True)]
IN_OUT = ("gpt_oss",)  # whose stacked experts are (expert, in, out)


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda p: f"{p[0]}-{'stacked' if p[1] else 'as saved'}")
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path, Path]:
    """(architecture, base, aligned, tuned)."""
    kind, stacked = request.param
    home = tmp_path_factory.mktemp("trio")
    base, aligned, tuned = (build(kind, home / n, i, stacked=stacked) for i, n in enumerate(("base", "aligned", "tuned")))
    return kind, base, aligned, tuned


def run(spec: dict[str, Any], trio: tuple[str, Path, Path, Path], out: Path) -> dict[str, torch.Tensor]:
    _, base, aligned, tuned = trio
    mitigation, where = make(spec).mitigation, Run(output=out, tuned=tuned, aligned=aligned, base=base)
    mitigation.check(next(iter(spec)), where)
    assert mitigation.repair(where) == out
    found = logits(out)
    assert bool(found.isfinite().all()) and loaded_with(tuned, tensors(out))(IDS).logits.equal(found), "saved and loaded again"
    return tensors(out)


def matrices(kind: str, name: str, value: torch.Tensor) -> list[torch.Tensor] | None:
    """The linear maps (out, in) in a stored tensor, as views; None if it holds none."""
    if value.ndim == 3:
        return [m.T if kind in IN_OUT else m for m in value]
    return [value] if value.ndim == 2 and not name.endswith("bias") and "embed" not in name and "lm_head" not in name else None


def test_the_models_have_experts_and_fewer_keys_than_queries(trio: tuple[str, Path, Path, Path]) -> None:
    kind, _, _, tuned = trio
    shapes = {n: tuple(t.shape) for n, t in tensors(tuned).items()}
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (8, 16) and shapes["model.layers.0.self_attn.q_proj.weight"] == (16, 16)
    assert any(".experts." in n or ".input_linear." in n for n in shapes) and (kind not in IN_OUT or any(n.endswith("gate_up_proj_bias") for n in shapes))


def test_interpolation_and_the_safety_vector_reach_every_tensor(trio: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    _, base, aligned, tuned = trio
    b, a, f = (tensors(x) for x in (base, aligned, tuned))
    half = run({"restore_weights": {"strength": 0.25}}, trio, tmp_path / "half")
    moved = run({"resta": {"unaligned": "base", "strength": 0.5}}, trio, tmp_path / "moved")
    assert half.keys() == moved.keys() == f.keys()
    for name in f:
        torch.testing.assert_close(half[name], 0.75 * f[name] + 0.25 * a[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(moved[name], f[name] + 0.5 * (a[name] - b[name]), atol=1e-6, rtol=0)


def test_extrapolation_takes_the_main_directions_of_each_expert(trio: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    kind, base, aligned, tuned = trio
    b, a, f = (tensors(x) for x in (base, aligned, tuned))
    out = run({"lox": {"rank": 2, "strength": 1.5}}, trio, tmp_path / "out")
    for name in f:
        found = matrices(kind, name, out[name])
        if found is None:
            assert out[name].equal(f[name]), name
            continue
        for w, old, ours, theirs in zip(found, *(matrices(kind, name, x[name]) or [] for x in (f, a, b))):
            u, s, vh = torch.linalg.svd((ours - theirs).double(), full_matrices=False)
            torch.testing.assert_close(w.double(), old + 1.5 * (u[:, :2] * s[:2]) @ vh[:2], atol=1e-4, rtol=0)


def test_projection_judges_and_projects_each_expert_by_itself(trio: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    kind, base, aligned, tuned = trio
    b, a, f = (tensors(x) for x in (base, aligned, tuned))
    total = sum(len(matrices(kind, n, t) or []) for n, t in f.items())
    out = run({"safe_lora": {"rank": 2, "number": total // 2}}, trio, tmp_path / "out")
    scores = {r["weight"]: r for r in json.loads((tmp_path / "out" / "safe_lora.json").read_text())["scores"]}
    assert len(scores) == total and sum(r["changed"] for r in scores.values()) == total // 2
    for name in f:
        old = matrices(kind, name, f[name])
        if old is None:
            assert out[name].equal(f[name]), name
            continue
        for i, (w, tuned_w, a_w, b_w) in enumerate(zip(matrices(kind, name, out[name]) or [], old, *(matrices(kind, name, x[name]) or [] for x in (a, b)))):
            u = torch.linalg.svd((a_w - b_w).double(), full_matrices=False).U[:, : min(2, *(max(1, n // 2) for n in a_w.shape))]
            kept = u @ u.T @ (tuned_w - a_w).double()
            row = scores[f"{name}[{i}]" if f[name].ndim == 3 else name]
            assert row["cosine"] == pytest.approx(float(torch.nn.functional.cosine_similarity(kept.flatten(), (tuned_w - a_w).double().flatten(), dim=0)), abs=1e-4)
            assert w.equal(tuned_w) if not row["changed"] else torch.allclose(w.double(), a_w + kept, atol=1e-4), name


def test_a_lora_of_its_attention_is_scaled_projected_and_merged(trio: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    _, base, aligned, _ = trio
    adapter = adapt(aligned, tmp_path / "adapter", 3, target_modules=["q_proj", "k_proj"])
    merged = merge_into(aligned, adapter, tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapter, aligned), atol=1e-4, rtol=1e-4)
    for spec in ({"restore_weights": {"strength": 0.5}}, {"safe_lora": {"threshold": 9.0, "rank": 2}}):
        name = next(iter(spec))
        thin = make(spec).mitigation.repair(Run(output=tmp_path / name, tuned=adapter, aligned=aligned, base=base))
        full = make(spec).mitigation.repair(Run(output=tmp_path / f"{name}-full", tuned=merged, aligned=aligned, base=base))
        torch.testing.assert_close(logits(thin, aligned), logits(full), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stacked_side", ["tuned", "aligned"])
def test_two_layouts_of_the_same_experts_are_refused_with_a_reason(tmp_path: Path, stacked_side: str) -> None:
    folders = [build("qwen3_moe", tmp_path / name, i, stacked=name == stacked_side) for i, name in enumerate(("tuned", "aligned"))]
    with pytest.raises(ResafeError, match=rf"{stacked_side} stores its experts stacked and .* one by one"):
        make("restore_weights").mitigation.repair(Run(output=tmp_path / "out", tuned=folders[0], aligned=folders[1]))
    assert not (tmp_path / "out").exists()


def test_packed_experts_are_refused(tmp_path: Path) -> None:
    aligned, tuned = (build("gpt_oss", tmp_path / n, i) for i, n in enumerate(("aligned", "tuned")))
    name = "model.layers.0.mlp.experts.down_proj"
    values = {n: t for n, t in tensors(tuned).items() if n != name}
    rewrite(tuned, {**values, f"{name}_blocks": torch.zeros(3, 16, 2, 16, dtype=torch.uint8), f"{name}_scales": torch.zeros(3, 16, 2, dtype=torch.uint8)})
    with pytest.raises(ResafeError, match="is quantised .*down_proj_blocks"):
        make("restore_weights").mitigation.repair(Run(output=tmp_path / "out", tuned=tuned, aligned=aligned))
