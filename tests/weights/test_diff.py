"""The change of every weight equals the one computed from the loaded models; adapters and full checkpoints agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from resafe.cli import cli
from resafe.errors import ResafeError
from resafe.weights import merge_into
from resafe.weights.diff import diff, stable_rank
from resafe.weights.subspace import frobenius
from tests.weights.models import KINDS, adapt, build, rewrite, tensors


@pytest.mark.parametrize("kind", KINDS)
def test_norms_ranks_and_cosines_are_those_of_the_weights(kind: str, tmp_path: Path) -> None:
    base, aligned, tuned = (build(kind, tmp_path / n, i) for i, n in enumerate(("base", "aligned", "tuned")))
    b, a, f = (tensors(x) for x in (base, aligned, tuned))
    found = {c.name: c for c in diff(aligned, tuned, base)}
    assert set(found) == set(f)
    for name, c in found.items():
        d, v = f[name] - a[name], a[name] - b[name]
        assert c.norm == pytest.approx(float(d.norm()), rel=1e-5) and c.relative == pytest.approx(float(d.norm() / a[name].norm()), rel=1e-5)
        if d.ndim == 2:
            s = torch.linalg.svdvals(d.double())
            assert c.rank == pytest.approx(float((s**2).sum() / s[0] ** 2), rel=1e-4)
            assert c.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(d.flatten(), v.flatten(), dim=0)), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_moves_what_its_merge_moves(kind: str, tmp_path: Path) -> None:
    aligned = build(kind, tmp_path / "aligned", 1)
    tuned = adapt(aligned, tmp_path / "tuned", 2)
    thin = {c.name: c for c in diff(aligned, tuned)}
    full = {c.name: c for c in diff(aligned, merge_into(aligned, tuned, tmp_path / "merged"))}
    assert {n for n, c in full.items() if c.norm > 1e-6} == set(thin)
    assert all(thin[n].norm == pytest.approx(full[n].norm, rel=1e-4) and thin[n].layer is not None for n in thin)


def test_the_norm_of_a_large_matrix_is_exact_in_single_precision() -> None:
    x = torch.randn(2048, 1500, generator=torch.Generator().manual_seed(0))
    for value in (x, x.T, x[0], x[0, 0]):
        assert frobenius(value) == pytest.approx(float(value.double().square().sum().sqrt()), rel=1e-7)


def test_the_rank_of_a_low_rank_change() -> None:
    one = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 5))
    assert stable_rank(one) == pytest.approx(1.0, abs=1e-4)
    assert stable_rank(torch.eye(6)) == pytest.approx(6.0, rel=1e-4)
    large = torch.diag(torch.tensor([2.0, *[1.0] * 599]))
    assert stable_rank(large) == pytest.approx((4 + 599) / 4, rel=1e-3)


def test_the_command_shows_a_table_a_heat_map_and_the_repairs(tmp_path: Path) -> None:
    base, aligned = build("llama", tmp_path / "base", 0), build("llama", tmp_path / "aligned", 1)
    tuned = adapt(aligned, tmp_path / "tuned", 2)
    done = CliRunner().invoke(cli, ["diff", str(aligned), str(tuned), "-o", str(tmp_path / "d.json")])
    assert done.exit_code == 0, done.output
    assert "6 of 6 weights moved" in done.output and "self_attn.q_proj" in done.output and "relative change by block" in done.output
    lines = {line.split()[0]: line for line in done.output.splitlines() if line.strip()}
    assert "can be applied" in lines["restore_weights"] and "--base" in lines["safe_lora"] and "--base" in lines["lox"]
    assert len(json.loads((tmp_path / "d.json").read_text())["weights"]) == 6
    done = CliRunner().invoke(cli, ["diff", str(aligned), str(tuned), "--base", str(base)])
    lines = {line.split()[0]: line for line in done.output.splitlines() if line.strip()}
    assert "can be applied" in lines["safe_lora"] and "can be applied" in lines["lox"]


def test_what_repairs_accept_is_compared_too(tmp_path: Path) -> None:
    aligned, base = build("llama", tmp_path / "aligned", 1), build("llama", tmp_path / "base", 0, vocab_size=47)
    rewrite(aligned, {n: t * (n != "model.norm.weight") for n, t in tensors(aligned).items()})
    found = {c.name: c for c in diff(aligned, build("llama", tmp_path / "tuned", 2), base)}
    assert found["lm_head.weight"].cosine is None and found["model.layers.0.mlp.up_proj.weight"].cosine is not None
    assert found["model.norm.weight"].relative == 1, "it was zero, and is no more"
    tied = build("qwen2", tmp_path / "tied", 1)
    names = {c.name for c in diff(tied, adapt(tied, tmp_path / "adapter", 2, target_modules=["lm_head", "q_proj"]))}
    assert {n for n in names if "head" in n or "embed" in n} == {"lm_head.weight"}


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    aligned = build("llama", tmp_path / "aligned", 1)
    other = build("llama", tmp_path / "other", 2, hidden_size=32, head_dim=8)
    with pytest.raises(ResafeError, match="different architectures"):
        diff(aligned, other)
    with pytest.raises(ResafeError, match="was trained on"):
        diff(build("gpt2", tmp_path / "gpt2", 0), adapt(aligned, tmp_path / "tuned", 2))
