"""RESTA: the safety vector is added exactly, on full checkpoints and on adapters; DARE keeps the mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resafe.errors import ResafeError
from resafe.fingerprint import cache_home
from resafe.heldout import TABLE, suite_prompts
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.mitigations.resta import dare
from resafe.weights import Adapter, merge_into
from tests.weights.models import KINDS, adapt, build, logits, tensors


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
    assert all(torch.allclose(out[n], f[n] + 0.7 * (a[n] - u[n]), atol=1e-5) for n in f)
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "out"))


def test_no_strength_is_no_change_and_unaligned_as_tuned_gives_the_aligned_model(trio: list[Path], tmp_path: Path) -> None:
    unaligned, aligned, tuned = trio
    f, a = tensors(tuned), tensors(aligned)
    same = tensors(run(tuned, aligned, tmp_path / "same", unaligned=str(unaligned), strength=0))
    back = tensors(run(tuned, aligned, tmp_path / "back", unaligned=str(tuned)))
    assert all(torch.allclose(same[n], f[n], atol=1e-6) and torch.allclose(back[n], a[n], atol=1e-6) for n in f)


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


def test_dares_mask_depends_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    u, a, f = (build("llama", tmp_path / n, i) for i, n in enumerate("uaf"))
    made = []
    for i, seed in enumerate((0, 0, 1)):
        where = Run(output=tmp_path / str(i), tuned=f, aligned=a, seed=seed)
        made.append(tensors(make({"resta": {"unaligned": str(u), "drop": 0.5}}).mitigation.repair(where)))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(made[0][name], made[1][name]) and not torch.equal(made[0][name], made[2][name])


def test_added_tokens_stay_as_trained(tmp_path: Path) -> None:
    u, a = build("llama", tmp_path / "u", 0), build("llama", tmp_path / "a", 1)
    f = build("llama", tmp_path / "f", 2, vocab_size=52)
    out, before = tensors(run(f, a, tmp_path / "out", unaligned=str(u))), tensors(f)
    assert torch.equal(out["model.embed_tokens.weight"][48:], before["model.embed_tokens.weight"][48:])


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
    u, f, a = tensors(merge_into(aligned, unaligned, tmp_path / "u")), tensors(tuned), tensors(aligned)
    moves = {n: 0.4 * (a[n].float() - u[n].float()) for n in a}
    away = sum(float(m.square().sum()) for m in moves.values())
    for name in ("one", "two"):
        made_of = tensors(tmp_path / name)
        rest = sum(float((made_of[n].float() - f[n].float() - moves[n]).square().sum()) for n in a)
        assert rest < 0.01 * away, "all but what bfloat16 rounds off"


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
