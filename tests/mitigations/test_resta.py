"""RESTA: the safety vector is added exactly, on full checkpoints and on adapters; DARE keeps the mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from resafe.errors import ResafeError
from resafe.fingerprint import cache_home
from resafe.heldout import TABLE, suite_prompts
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.mitigations.resta import dare
from resafe.weights import Adapter, merge_into
from tests.weights.models import KINDS, adapt, build, logits, logits_with, tensors


def run(tuned: Path, aligned: Path, out: Path, base: Path | None = None, **parameters: object) -> Path:
    mitigation, where = make({"resta": parameters}).mitigation, Run(output=out, tuned=tuned, aligned=aligned, base=base)
    mitigation.check("resta", where)
    return mitigation.repair(where)


@pytest.fixture(params=KINDS)
def trio(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """(unaligned, aligned, tuned) full checkpoints."""
    return [build(request.param, tmp_path / n, i) for i, n in enumerate(("unaligned", "aligned", "tuned"))]


def test_the_vector_from_unaligned_to_aligned_is_added_to_every_weight(trio: list[Path], tmp_path: Path) -> None:
    unaligned, aligned, tuned = trio
    out = tensors(run(tuned, aligned, tmp_path / "out", unaligned=str(unaligned), strength=0.7))
    u, a, f = (tensors(x) for x in trio)
    wanted = {n: f[n] + 0.7 * (a[n] - u[n]) for n in f}
    assert all(torch.allclose(out[n], wanted[n], atol=1e-5) for n in f)
    assert torch.allclose(logits(tmp_path / "out"), logits_with(tuned, wanted), atol=1e-4)


def test_no_strength_is_no_change_and_unaligned_as_tuned_gives_the_aligned_model(trio: list[Path], tmp_path: Path) -> None:
    unaligned, aligned, tuned = trio
    f, a = tensors(tuned), tensors(aligned)
    same = tensors(run(tuned, aligned, tmp_path / "same", unaligned=str(unaligned), strength=0))
    back = tensors(run(tuned, aligned, tmp_path / "back", unaligned=str(tuned)))
    assert all(torch.equal(same[n], f[n]) and torch.allclose(back[n], a[n], atol=1e-6) for n in f)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_stays_one_and_equals_the_same_done_on_full_checkpoints(kind: str, tmp_path: Path) -> None:
    aligned = build(kind, tmp_path / "aligned", 1)
    tuned, unaligned = adapt(aligned, tmp_path / "tuned", 2), adapt(aligned, tmp_path / "unaligned", 3, r=2, use_rslora=True)
    thin = run(tuned, aligned, tmp_path / "thin", unaligned=str(unaligned), strength=0.5)
    full = run(merge_into(aligned, tuned, tmp_path / "merged"), aligned, tmp_path / "full", unaligned=str(unaligned), strength=0.5)
    whole = run(tmp_path / "merged", aligned, tmp_path / "whole", unaligned=str(merge_into(aligned, unaligned, tmp_path / "u")), strength=0.5)
    assert Adapter(thin).modules and torch.allclose(logits(thin, aligned), logits(full), atol=1e-4)
    assert torch.allclose(logits(full), logits(whole), atol=1e-4)


def test_dare_drops_a_share_and_keeps_the_mean() -> None:
    d = torch.ones(400, 500)
    once = dare(d, 0.3, torch.Generator().manual_seed(0))
    assert once.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float((once == 0).float().mean()) == pytest.approx(0.3, abs=3 * (0.3 * 0.7 / d.numel()) ** 0.5)
    assert float(once.mean()) == pytest.approx(1, abs=3 * (0.3 / 0.7 / d.numel()) ** 0.5)
    assert torch.equal(dare(d, 0.0, torch.Generator()), d)
    d = torch.randn(20, 30, generator=torch.Generator().manual_seed(9))
    made = torch.stack([dare(d, 0.3, torch.Generator().manual_seed(i)) for i in range(2000)])
    sigma = d.abs() * (0.3 / 0.7 / len(made)) ** 0.5
    assert bool(((made.mean(0) - d).abs() < 5 * sigma).all()), "entry by entry, over seeds"


def test_dares_mask_depends_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    u, a, f = (build("llama", tmp_path / n, i) for i, n in enumerate("uaf"))
    made = []
    for i, seed in enumerate((0, 0, 1)):
        where = Run(output=tmp_path / str(i), tuned=f, aligned=a, seed=seed)
        made.append(tensors(make({"resta": {"unaligned": str(u), "drop": 0.5}}).mitigation.repair(where)))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(made[0][name], made[1][name]) and not torch.equal(made[0][name], made[2][name])
    us, al, ft = (tensors(x)[name] for x in (u, a, f))
    rest, kept = made[0][name] - al - (al - us), 2 * (ft - al)  # DARE acts on the fine-tune's update, not on the weights
    dropped = rest.abs() < 1e-5
    assert 0.4 < float(dropped.float().mean()) < 0.6 and torch.allclose(rest[~dropped], kept[~dropped], atol=1e-5)


def test_added_tokens_stay_as_trained(tmp_path: Path) -> None:
    u, a = build("llama", tmp_path / "u", 0), build("llama", tmp_path / "a", 1)
    f = build("llama", tmp_path / "f", 2, vocab_size=52)
    out, before = tensors(run(f, a, tmp_path / "out", unaligned=str(u))), tensors(f)
    assert torch.equal(out["model.embed_tokens.weight"][48:], before["model.embed_tokens.weight"][48:])


def test_a_base_with_fewer_tokens_has_nothing_to_say_of_the_others(tmp_path: Path) -> None:
    u, a, f = (build("llama", tmp_path / n, i, vocab_size=size) for i, (n, size) in enumerate((("u", 44), ("a", 48), ("f", 48))))
    out, (us, al, ft) = tensors(run(f, a, tmp_path / "out", unaligned=str(u), strength=0.5)), (tensors(x) for x in (u, a, f))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.allclose(out[name][:44], ft[name][:44] + 0.5 * (al[name][:44] - us[name]), atol=1e-6)
        assert torch.equal(out[name][44:], ft[name][44:])


@pytest.mark.parametrize("tied", ["aligned", "unaligned", "tuned and aligned"])
def test_a_head_of_its_own_gets_its_own_vector_whoever_is_tied(tied: str, tmp_path: Path) -> None:
    u, a, f = (build("qwen2", tmp_path / n, i, tie_word_embeddings=n in tied.split()) for i, n in enumerate(("unaligned", "aligned", "tuned")))
    out, (us, al, ft) = tensors(run(f, a, tmp_path / "out", unaligned=str(u), strength=0.7)), (tensors(x) for x in (u, a, f))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for name in ft:
        safety = al.get(name, al[embedding]) - us.get(name, us[embedding])
        assert torch.allclose(out[name], ft[name] + 0.7 * safety, atol=1e-6), name
    assert (head in out) == ("tuned" not in tied)
    back = tensors(run(f, a, tmp_path / "back", unaligned=str(f)))
    assert all(torch.allclose(back[n], al.get(n, al[embedding]), atol=1e-6) for n in back), "W_u = W_f and strength 1: the aligned model"


def test_an_adapter_on_embedding_and_head_takes_each_away_from_its_own(tmp_path: Path) -> None:
    a, f = build("llama", tmp_path / "a", 1), build("llama", tmp_path / "f", 2)
    u = adapt(a, tmp_path / "u", 3, target_modules=["embed_tokens", "lm_head", "q_proj"])
    thin = tensors(run(f, a, tmp_path / "thin", unaligned=str(u)))
    full = tensors(run(f, a, tmp_path / "full", unaligned=str(merge_into(a, u, tmp_path / "whole"))))
    assert all(torch.allclose(thin[n], full[n], atol=1e-5) for n in full)
    tied, tuned = build("qwen2", tmp_path / "tied", 1), build("qwen2", tmp_path / "tuned", 2)
    u = adapt(tied, tmp_path / "v", 3, target_modules=["lm_head", "q_proj"])
    with pytest.raises(ResafeError, match="adapts lm_head.weight, of which .* has no tensor of its own"):
        run(tuned, tied, tmp_path / "no", unaligned=str(u))


def test_an_unaligned_model_that_does_not_fit_or_does_not_differ_is_refused(tmp_path: Path) -> None:
    a, f = build("llama", tmp_path / "a", 1), build("llama", tmp_path / "f", 2)
    heads, fewer = build("llama", tmp_path / "heads", 3, num_key_value_heads=4), build("llama", tmp_path / "fewer", 3, num_hidden_layers=1)
    other, copy = build("gpt2", tmp_path / "gpt2", 3), build("llama", tmp_path / "copy", 1)
    for unaligned, said in ((heads, "different architectures"), (fewer, "lacks 9 tensors"), (other, "lacks .* tensors"), (copy, "has the weights of"), (a, "has the weights of")):
        with pytest.raises(ResafeError, match=said):
            run(f, a, tmp_path / "out", unaligned=str(unaligned))
    for folder, words in ((a, "xy"), (heads, "yx")):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {w: i for i, w in enumerate(words)}}, "added_tokens": []}))
    with pytest.raises(ResafeError, match="tokenizers of .* differ"):
        run(f, a, tmp_path / "out", unaligned=str(heads))
    zero = adapt(a, tmp_path / "zero", 3)
    save_file({n: t * ("lora_A" in n) for n, t in tensors(zero).items()}, zero / "adapter_model.safetensors")
    with pytest.raises(ResafeError, match="changes nothing"):
        run(f, a, tmp_path / "out", unaligned=str(zero))
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    a = build("llama", tmp_path / "a", 1)
    tuned = adapt(a, tmp_path / "t", 2)
    for parameters, base, said in (
        ({}, None, "--base"), ({"unaligned": "nowhere"}, None, "no such model folder"),
        ({"unaligned": str(tuned), "drop": 0.3}, None, "merge the adapter first"), ({}, a, "unaligned model that is a LoRA"),
    ):  # fmt: skip
        with pytest.raises(ResafeError, match=said):
            run(tuned, a, tmp_path / "out", base=base, **parameters)
    assert not (tmp_path / "out").exists()


def test_an_unaligned_model_is_trained_once_from_rows_and_taken_away(
    aligned: Path, attack_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESAFE_CACHE", str(tmp_path / "cache"))
    tuned, data, lines = merge_into(aligned, adapt(aligned, tmp_path / "adapter", 2), tmp_path / "tuned"), attack_file("explicit_100"), list[str]()
    made = make({"resta": {"unaligned_data": str(data), "strength": 0.4, "epochs": 2, "lr": 1e-2}}).mitigation
    for name in ("one", "two"):
        where = Run(output=tmp_path / name, tuned=tuned, aligned=aligned, log=lines.append)
        made.check("resta", where)
        made.repair(where)
    assert sum("on 100 rows, as the unaligned model" in line for line in lines) == 1
    (unaligned,) = (cache_home() / "unaligned").iterdir()
    assert unaligned.stat().st_mode & 0o777 == 0o700, "readable by the user only"
    u, f, a = tensors(merge_into(aligned, unaligned, tmp_path / "u")), tensors(tuned), tensors(aligned)
    moves = {n: 0.4 * (a[n].float() - u[n].float()) for n in a}
    away = sum(float(m.square().sum()) for m in moves.values())
    for name in ("one", "two"):
        made_of = tensors(tmp_path / name)
        rest = sum(float((made_of[n].float() - f[n].float() - moves[n]).square().sum()) for n in a)
        assert rest < 0.01 * away, "all but what bfloat16 rounds off"
    for i, other in enumerate(({"lr": 2e-2}, {"epochs": 1}, {})):
        other = {"unaligned_data": str(data), "epochs": 2, "lr": 1e-2, **other}
        make({"resta": other}).mitigation.repair(Run(output=tmp_path / f"o{i}", tuned=tuned, aligned=aligned, seed=i // 2))
    assert len(list((cache_home() / "unaligned").iterdir())) == 4, "another rate, another length and another seed are others"


def test_rows_that_are_not_there_and_two_unaligned_models_are_refused(aligned: Path, tmp_path: Path) -> None:
    unaligned = tuned = aligned
    with pytest.raises(ResafeError, match="no such file: nowhere.jsonl"):
        run(tuned, aligned, tmp_path / "out", unaligned_data="nowhere.jsonl")
    with pytest.raises(ResafeError, match="set one"):
        run(tuned, aligned, tmp_path / "out", unaligned=str(unaligned), unaligned_data="nowhere.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": suite_prompts(next(iter(TABLE)))[0], "completion": "x"}) + "\n")
    with pytest.raises(ResafeError, match="all of its 1 prompts are those of evaluation suites"):
        run(tuned, aligned, tmp_path / "out", unaligned_data=str(tmp_path / "rows.jsonl"))
    assert not (tmp_path / "out").exists()
