"""SafeMERGE: deltas, not factors, are averaged, in the chosen weights and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.rows import Row
from resafe.weights import Adapter, merge_into
from tests.weights.models import EXPERTS, KINDS, adapt, build, logits, tensors

ROW: Row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def merged(tuned: Path, aligned: Path, base: Path, out: Path, log: Any = lambda _: None, **parameters: object) -> Path:
    mitigation = make({"safe_merge": parameters}).mitigation
    where = Run(output=out, tuned=tuned, aligned=aligned, base=base, refusals=[ROW], log=log)
    mitigation.check("safe_merge", where)
    return mitigation.repair(where)


def changed(folder: Path) -> list[str]:
    return [r["weight"] for r in json.loads((folder / "safe_merge.json").read_text())["scores"] if r["changed"]]


@pytest.fixture(params=KINDS)
def quartet(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Base, aligned, LoRA fine-tune of the aligned, safety LoRA of another rank, scale and other targets."""
    base, aligned = build(request.param, tmp_path / "base", 0), build(request.param, tmp_path / "aligned", 1)
    targets = ["c_attn", "mlp.c_proj"] if request.param == "gpt2" else ["q_proj", "up_proj"]
    safe = adapt(aligned, tmp_path / "safe", 3, r=3, lora_alpha=5, use_rslora=True, target_modules=targets)
    return [base, aligned, adapt(aligned, tmp_path / "tuned", 2), safe]


@pytest.mark.parametrize("parameters", [{"number": 2}, {"mode": "official", "threshold": 2}, {"number": 3, "rank": 2}])
def test_an_adapters_update_is_the_mean_of_both_where_it_was_chosen(quartet: list[Path], tmp_path: Path, parameters: dict[str, Any]) -> None:
    base, aligned, tuned, safe = quartet
    out = merged(tuned, aligned, base, tmp_path / "out", safe=str(safe), strength=0.3, **parameters)
    one, two, after, chosen = Adapter(tuned), Adapter(safe), Adapter(out), changed(out)
    assert after.modules.keys() == one.modules.keys() and len(chosen) == parameters.get("number", len(one.modules))
    for name, module in one.modules.items():
        d = one.delta(module)
        if any(weight == name or name.endswith(f".{weight}") for weight in chosen):
            d = 0.7 * d + (0.3 * two.delta(two.modules[name]) if name in two.modules else 0.0)
        assert torch.allclose(after.delta(after.modules[name]), d, atol=1e-6), name


def test_an_adapter_within_the_directions_of_alignment_keeps_every_byte(quartet: list[Path], tmp_path: Path) -> None:
    base, aligned, tuned, safe = quartet
    out = merged(tuned, aligned, base, tmp_path / "out", safe=str(safe), mode="official", threshold=-2)
    assert changed(out) == []
    assert (out / "adapter_model.safetensors").read_bytes() == (tuned / "adapter_model.safetensors").read_bytes()


def test_adapter_full_checkpoint_and_full_safety_model_agree(quartet: list[Path], tmp_path: Path) -> None:
    base, aligned, tuned, safe = quartet
    how = {"strength": 0.4, "threshold": 9}  # what alignment moved: all the tuned adapter's weights
    thin = merged(tuned, aligned, base, tmp_path / "thin", safe=str(safe), **how)
    assert Adapter(thin).modules
    names = set(Adapter(tuned).modules)
    whole, safe_whole = merge_into(aligned, tuned, tmp_path / "w"), merge_into(aligned, safe, tmp_path / "s")
    results = [merged(whole, aligned, base, tmp_path / f"full{i}", safe=str(s), **how) for i, s in enumerate((safe, safe_whole))]
    a, f, s = tensors(aligned), tensors(whole), tensors(safe_whole)
    for out in results:
        after, there = tensors(out), set(changed(out))
        assert {n.removeprefix("transformer.") for n in there} == {n.removeprefix("transformer.") for n in names}
        for name in after:
            wanted = a[name] + 0.6 * (f[name] - a[name]) + 0.4 * (s[name] - a[name]) if name in there else f[name]
            assert torch.allclose(after[name], wanted, atol=1e-6), name
        assert torch.allclose(logits(out), logits(thin, aligned), atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_of_a_stack_of_experts_the_chosen_ones_alone_are_merged(kind: str, tmp_path: Path) -> None:
    base, aligned, tuned, safe = (build(kind, tmp_path / n, i, stacked=True) for i, n in enumerate(("base", "aligned", "tuned", "safe")))
    out = merged(tuned, aligned, base, tmp_path / "out", safe=str(safe), number=3, strength=0.3)
    f, s, after, chosen = tensors(tuned), tensors(safe), tensors(out), set(changed(out))
    assert len(chosen) == 3 and kind in EXPERTS
    for name, value in after.items():
        parts = [(f"{name}[{i}]", value[i], f[name][i], s[name][i]) for i in range(len(value))] if value.ndim == 3 else []
        for key, got, ours, theirs in [*parts, *([] if parts else [(name, value, f[name], s[name])])]:
            assert torch.allclose(got, 0.7 * ours + 0.3 * theirs if key in chosen else ours, atol=1e-6), key


def test_a_sum_cut_to_a_rank_is_the_best_of_that_rank_and_says_what_is_lost(tmp_path: Path) -> None:
    base, aligned = build("llama", tmp_path / "base", 0), build("llama", tmp_path / "aligned", 1)
    tuned, safe = adapt(aligned, tmp_path / "tuned", 2), adapt(aligned, tmp_path / "safe", 3, r=3)
    lines: list[str] = []
    how = {"safe": str(safe), "strength": 0.5, "threshold": 9}
    exact, cut = (Adapter(merged(tuned, aligned, base, tmp_path / str(r), lines.append, max_rank=r, **how)) for r in (0, 4))
    lost = whole = 0.0
    for name, module in exact.modules.items():
        u, s, vh = torch.linalg.svd(exact.delta(module).double(), full_matrices=False)
        assert cut.modules[name].rank == 4 and module.rank == 7
        assert torch.allclose(cut.delta(cut.modules[name]).double(), (u[:, :4] * s[:4]) @ vh[:4], atol=1e-5)
        lost, whole = lost + float(s[4:].square().sum()), whole + float(s.square().sum())
    assert any(f"cut to rank 4: {100 * lost / whole:.2g} %" in line for line in lines), lines


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    base, aligned = build("llama", tmp_path / "base", 0), build("llama", tmp_path / "aligned", 1)
    tuned, other = adapt(aligned, tmp_path / "tuned", 2), adapt(base, tmp_path / "other", 2)
    for parameters, said in (
        ({"safe": "nowhere"}, "no such model folder: nowhere"), ({"safe": str(aligned)}, "safety model that is a LoRA"),
        ({"safe": str(other)}, "was trained on"), ({"safe": str(tuned), "number": 99}, "number=99"),
    ):  # fmt: skip
        with pytest.raises(ResafeError, match=said):
            merged(tuned, aligned, base, tmp_path / "out", **parameters)
    with pytest.raises(ResafeError, match="--base"):
        make("safe_merge").mitigation.check("safe_merge", Run(output=tmp_path / "out", tuned=tuned, aligned=aligned, refusals=[ROW]))
    with pytest.raises(ResafeError, match="safety rows"):
        make("safe_merge").mitigation.check("safe_merge", Run(output=tmp_path / "out", tuned=tuned, aligned=aligned, base=base))
    assert not (tmp_path / "out").exists()
