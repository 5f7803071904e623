"""The direction of alignment: only of two models that fit, in the layout that each weight is stored in, and of as many ranks as it has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.weights import merge_into
from resafe.weights.alignment import Alignment
from resafe.weights.subspace import Orthogonal, top_left
from tests.weights.models import adapt, build, logits, rewrite, tensors


@pytest.mark.parametrize("spec", ["lox", "safe_lora", "safe_merge"])
def test_a_base_that_does_not_fit_or_does_not_differ_is_refused(spec: str, tmp_path: Path) -> None:
    aligned, tuned, copy = (build("llama", tmp_path / n, i) for n, i in (("aligned", 1), ("tuned", 2), ("copy", 1)))
    fewer, other = build("llama", tmp_path / "fewer", 0, num_hidden_layers=1), build("gpt2", tmp_path / "gpt2", 0)
    words = build("llama", tmp_path / "words", 0)
    for folder, vocabulary in ((aligned, "xy"), (words, "yx")):
        content = {"model": {"vocab": {w: i for i, w in enumerate(vocabulary)}}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    for base, said in (
        (other, "lacks .* tensors"), (fewer, "lacks 9 tensors"), (copy, "same linear weights"), (words, "tokenizers of .* differ"),
    ):  # fmt: skip
        with pytest.raises(ResafeError, match=said):
            make(spec).mitigation.repair(Run(output=tmp_path / "out", tuned=tuned, aligned=aligned, base=base))
    assert not (tmp_path / "out").exists()


def test_what_is_a_vocabulary_is_no_linear_weight(tmp_path: Path) -> None:
    sizes = {"state_size": 4, "conv_kernel": 4, "expand": 2, "time_step_rank": 2, "tie_word_embeddings": True}
    base, aligned = (build("mamba", tmp_path / n, i, **sizes) for i, n in enumerate(("base", "aligned")))
    names = Alignment(aligned, base).matrices()
    assert names and not any("embeddings" in n or "A_log" in n for n in names)
    assert Alignment(aligned, base).aligned.tied


def test_stacked_experts_are_read_in_the_layout_that_their_shape_tells(tmp_path: Path) -> None:
    base, aligned = (build("qwen3_moe", tmp_path / n, i, stacked=True) for i, n in enumerate(("base", "aligned")))
    straight = Alignment(aligned, base)
    names = [n for n in straight.matrices() if straight.stacked(n)]
    wanted = {n: straight.directions(n) for n in names}
    assert {m.shape for n in names for m in wanted[n].values()} == {(24, 16), (16, 12)}
    for folder in (base, aligned):  # as other versions save them: (expert, in, out)
        rewrite(folder, {n: t.transpose(1, 2).contiguous() if n in names else t for n, t in tensors(folder).items()})
    turned = Alignment(aligned, base)
    for name in names:
        found = turned.directions(name)
        assert found.keys() == wanted[name].keys() and all(torch.equal(found[k], wanted[name][k]) for k in found)


def test_beyond_its_rank_an_alignment_has_no_directions() -> None:
    torch.manual_seed(0)
    v = torch.randn(64, 1) @ torch.randn(1, 40)
    basis = top_left(v, 32)
    assert basis.shape == (64, 1) and Orthogonal(basis).null == pytest.approx(0.125)
    assert torch.allclose(Orthogonal(basis).apply(v), v, atol=1e-4)
    assert top_left(torch.zeros(8, 8), 4).shape == (8, 0)


def test_a_lora_of_alignment_leaves_a_random_update_little(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", 0, hidden_size=64, head_dim=16)
    aligned = merge_into(base, adapt(base, tmp_path / "adapter", 1, r=1, target_modules=["o_proj"]), tmp_path / "aligned")
    tuned = adapt(aligned, tmp_path / "tuned", 2, r=8, target_modules=["o_proj"])
    make("safe_lora:threshold=1").mitigation.repair(Run(output=tmp_path / "out", tuned=tuned, aligned=aligned, base=base))
    before, after = (merge_into(aligned, t, tmp_path / f"m{i}") for i, t in enumerate((tuned, tmp_path / "out")))
    a = tensors(aligned)
    for name in (n for n in a if "o_proj" in n):
        kept = float((tensors(after)[name] - a[name]).norm() / (tensors(before)[name] - a[name]).norm())
        assert 0.02 < kept < 0.3, "one direction of 64: an eighth of the norm, not the half that 32 directions would keep"


def test_a_lora_of_square_position_embeddings_is_not_turned(tmp_path: Path) -> None:
    base = build("gpt2", tmp_path / "base", 1, n_positions=16)
    adapter = adapt(base, tmp_path / "adapter", 2, target_modules=["wpe", "c_attn"])
    assert torch.allclose(logits(merge_into(base, adapter, tmp_path / "merged")), logits(adapter, base), atol=1e-5)
