"""LoRA of a mixture's experts and router, as PEFT 0.21 adapts them: as parameters, nested, three-dimensional stacks in two factors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from resafe.errors import ResafeError
from resafe.finetune.train import train
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.sft import SFTSettings
from resafe.weights import Adapter, concat, merge_into
from resafe.weights.diff import diff
from tests.conftest import write_rows
from tests.mitigations.twins import BENIGN, SAFE, repaired
from tests.tiny import tiny
from tests.weights.models import EXPERTS, adapt, as_stored, build, configure, load, logits, tensors

LAYOUTS = [(kind, stacked) for kind in EXPERTS for stacked in (False, True)]
SETTINGS: dict[str, dict[str, Any]] = {
    "all of PEFT's linear layers": {"target_modules": "all-linear"},
    "one stack": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "unlike in each layer": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "layers.1.mlp.experts.down_proj"], "use_rslora": True},
    "with patterns": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rank_pattern": {".*down_proj": 3}, "alpha_pattern": {".*gate_up_proj": 5}, "target_modules": ["q_proj"]},
}
NARROW = {"q_proj": {"target_modules": ["q_proj"]}, "way up": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}}


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda p: f"{p[0]}-{'stacked' if p[1] else 'as saved'}")
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, aligned, a LoRA of the aligned model)."""
    kind, stacked = request.param
    home = tmp_path_factory.mktemp("mixture")
    base, aligned = (build(kind, home / n, i, stacked=stacked) for i, n in enumerate(("base", "aligned")))
    return base, aligned, adapt(aligned, home / "tuned", 2)


def peft_deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Stored tensor -> what PEFT's own merge adds to it."""
    before = dict(load(base).named_parameters())
    after = dict(PeftModel.from_pretrained(load(base), adapter).merge_and_unload().named_parameters())
    return as_stored(base, {n: (p - before[n]).detach() for n, p in after.items()})


@pytest.mark.parametrize("settings", SETTINGS)
def test_merging_adds_to_each_expert_what_peft_adds(mixture: tuple[Path, Path, Path], settings: str, tmp_path: Path) -> None:
    _, aligned, _ = mixture
    adapter = adapt(aligned, tmp_path / "adapter", 3, **SETTINGS[settings])
    merged, old, wanted = tensors(merge_into(aligned, adapter, tmp_path / "merged")), tensors(aligned), peft_deltas(aligned, adapter)
    assert merged.keys() == old.keys() == wanted.keys() and any(bool(d.any()) for d in wanted.values())
    for name in merged:
        torch.testing.assert_close(merged[name], old[name] + wanted[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(adapter, aligned), atol=1e-4, rtol=1e-4)


REPAIRS: list[tuple[dict[str, Any], str]] = [  # the second: what the method's other adapter adapts
    ({"restore_weights": {"strength": 0.3, "layers": (0.2, 1.0)}}, ""),
    ({"safe_lora": {"rank": 2, "number": 12}}, ""),
    ({"safe_lora": {"action": "drop", "number": 12}}, ""),
    ({"safe_lora": {"mode": "official", "number": 12}}, ""),
    *[({"safe_merge": {"number": 12, "strength": s}}, second) for s in (0.4, 1.0) for second in NARROW],
    *[({"resta": {"strength": 0.4}}, second) for second in NARROW],
]


@pytest.mark.parametrize(("spec", "second"), REPAIRS, ids=str)
def test_a_repaired_lora_is_the_repair_of_its_merge(mixture: tuple[Path, Path, Path], spec: dict[str, Any], second: str, tmp_path: Path) -> None:
    base, aligned, tuned = mixture
    name, how = next(iter(spec.items()))
    if second:
        other = adapt(aligned, tmp_path / "other", 5, r=3, lora_alpha=5, **NARROW[second])
        how = {**how, ("safe" if name == "safe_merge" else "unaligned"): str(other)}
    merged = merge_into(aligned, tuned, tmp_path / "merged")
    thin, full = (make({name: how}).mitigation.repair(Run(output=tmp_path / f"{name} {t.name}", tuned=t, aligned=aligned, base=base)) for t in (tuned, merged))
    again, wanted, before = tensors(merge_into(aligned, thin, tmp_path / "again")), tensors(full), tensors(merged)
    for n in wanted:
        torch.testing.assert_close(again[n], wanted[n], atol=1e-5, rtol=0)
    changed = [n for n in wanted if not torch.allclose(wanted[n], before[n], atol=1e-3)]
    assert any("expert" in n or "_linear" in n for n in changed) or (changed and (name, second) == ("resta", "q_proj"))
    torch.testing.assert_close(logits(thin, aligned), logits(full), atol=1e-4, rtol=1e-4)


def test_a_sum_cut_to_a_rank_is_the_best_of_that_rank_for_each_expert(mixture: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, aligned, tuned = mixture
    other = adapt(aligned, tmp_path / "other", 5, r=2)
    exact, cut = (Adapter(concat(tuned, other, tmp_path / str(r), factors=(1.0, -0.5), rank=r)) for r in (0, 3))
    for name, module in exact.modules.items():
        u, s, vh = torch.linalg.svd(exact.delta(module).double(), full_matrices=False)
        wanted = (u[..., :3] * s[..., None, :3]) @ vh[..., :3, :]
        torch.testing.assert_close(cut.delta(cut.modules[name]).double(), wanted, atol=1e-5, rtol=0)
    assert sum(m.experts == 3 for m in exact.modules.values()) == 4
    torch.testing.assert_close(logits(cut.folder, aligned), logits(merge_into(aligned, cut.folder, tmp_path / "m")), atol=1e-4, rtol=1e-4)


def test_what_is_left_of_two_stacks_has_the_name_of_one(mixture: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, aligned, tuned = mixture
    out = concat(tuned, tuned, tmp_path / "out", factors=(lambda m: float("gate_up" in m.weight), 0.0))
    assert {m.weight.rpartition(".")[2] for m in Adapter(out).modules.values()} == {"gate_up_proj"}
    merged, old = tensors(merge_into(aligned, out, tmp_path / "merged")), peft_deltas(aligned, tuned)
    gates = {n for n in merged if n.endswith(("gate_up_proj", "w1.weight", "w3.weight", "gate_proj.weight", "up_proj.weight", "input_linear.weight")) and "shared" not in n}
    for name, value in tensors(aligned).items():
        torch.testing.assert_close(merged[name] - value, old[name] if name in gates else torch.zeros_like(value), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(out, aligned), logits(tmp_path / "merged"), atol=1e-4, rtol=1e-4)


def test_diff_measures_each_stored_matrix(mixture: tuple[Path, Path, Path]) -> None:
    _, aligned, tuned = mixture
    wanted = {n: float(d.norm()) for n, d in peft_deltas(aligned, tuned).items() if bool(d.any())}
    assert {c.name: pytest.approx(c.norm, rel=1e-3) for c in diff(aligned, tuned)} == wanted


def test_adapters_that_are_not_of_this_base_or_not_known_are_refused(tmp_path: Path) -> None:
    aligned = build("mixtral", tmp_path / "aligned", 1)
    more = build("mixtral", tmp_path / "more", 1, num_local_experts=4)
    with pytest.raises(ResafeError, match="_proj has 3 experts in the adapter, and other ones in the checkpoint"):
        merge_into(more, adapt(aligned, tmp_path / "adapter", 2), tmp_path / "out")
    with pytest.raises(ResafeError, match=r"_proj has shape \[4, .* and \[3, .*: the adapter is of another model"):
        merge_into(build("mixtral", tmp_path / "stacked", 1, num_local_experts=4, stacked=True), tmp_path / "adapter", tmp_path / "out")
    strange = configure(tmp_path / "adapter", "adapter_config.json", target_parameters=["experts.gate_up_proj"])
    with pytest.raises(ResafeError, match=r"in a way that is not known \(target_parameters=\['experts.gate_up_proj'\]\)"):
        Adapter(strange)
    with pytest.raises(ResafeError, match="target_parameters=7.*merge it into its base"):
        Adapter(configure(strange, "adapter_config.json", target_parameters=7))
    gpt2 = build("gpt2", tmp_path / "gpt2", 1)
    model = get_peft_model(load(gpt2), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[], target_parameters=["attn.c_proj.weight"]))
    model.save_pretrained(tmp_path / "parameters")
    with pytest.raises(ResafeError, match="adapts parameters .target_parameters. of .*gpt2"):
        merge_into(gpt2, tmp_path / "parameters", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_that_peft_adapts_from_the_other_side_are_merged_and_not_projected(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 3, "intermediate_size": 24, "intermediate_size_mlp": 24, "attention_chunk_size": 8}
    base, aligned = (build("llama4_text", tmp_path / n, i, **sizes) for i, n in enumerate(("base", "aligned")))
    tuned = adapt(aligned, tmp_path / "tuned", 2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    torch.testing.assert_close(logits(merge_into(aligned, tuned, tmp_path / "merged")), logits(tuned, aligned), atol=1e-4, rtol=1e-4)
    with pytest.raises(ResafeError, match="from the side of their inputs, which cannot be projected: merge it"):
        make("safe_lora").mitigation.repair(Run(output=tmp_path / "out", tuned=tuned, aligned=aligned, base=base))
    assert not (tmp_path / "out").exists()


def one_by_one(base: Path, folder: Path, parts: tuple[str, ...] = ("w1", "w2", "w3")) -> Path:
    """A LoRA of Mixtral's experts as transformers 4 named them, module by module."""
    adapter = adapt(base, folder, 7, target_modules=["q_proj"], target_parameters=None)
    values, generator = tensors(folder), torch.Generator().manual_seed(3)
    for name, value in tensors(base).items():
        if ".experts." in name and name.split(".")[-2] in parts:
            rows, columns = value.shape
            place = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            values |= {f"{place}A.weight": 0.2 * torch.randn(4, columns, generator=generator), f"{place}B.weight": 0.2 * torch.randn(rows, 4, generator=generator)}
    save_file(values, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return configure(adapter, "adapter_config.json", target_modules=["q_proj", *parts])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_single_experts_and_stacks_are_summed_in_stacks(order: tuple[int, int], tmp_path: Path) -> None:
    aligned = build("mixtral", tmp_path / "aligned", 1)
    pair = one_by_one(aligned, tmp_path / "old"), adapt(aligned, tmp_path / "new", 2, r=3)
    torch.testing.assert_close(logits(merge_into(aligned, pair[0], tmp_path / "m")), logits(pair[0], aligned), atol=1e-4, rtol=1e-4)
    one, two = pair[order[0]], pair[order[1]]
    out = concat(one, two, tmp_path / "out", factors=(1.0, -0.5))
    made, first, second, old = (tensors(merge_into(aligned, f, tmp_path / f"{f.name} merged")) if f != aligned else tensors(f) for f in (out, one, two, aligned))
    for name in old:
        torch.testing.assert_close(made[name], first[name] - 0.5 * (second[name] - old[name]), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(out, aligned), logits(tmp_path / "out merged"), atol=1e-4, rtol=1e-4)
    some = concat(pair[0], pair[0], tmp_path / "some", factors=(lambda m: float("w1" in m.weight), 0.0))
    torch.testing.assert_close(logits(some, aligned), logits(merge_into(aligned, some, tmp_path / "some merged")), atol=1e-4, rtol=1e-4)
    base, merged = build("mixtral", tmp_path / "base", 0), tmp_path / f"{one.name} merged"
    how = {"safe_merge": {"safe": str(two), "number": 9, "strength": 0.3}}
    thin, full = (make(how).mitigation.repair(Run(output=tmp_path / f"repaired {t.name}", tuned=t, aligned=aligned, base=base)) for t in (one, merged))
    torch.testing.assert_close(logits(thin, aligned), logits(full), atol=1e-4, rtol=1e-4)


def test_adapters_whose_experts_are_not_found_in_the_base_are_refused_by_every_method(aligned: Path, tmp_path: Path) -> None:
    base, before = (tiny("mixtral", tmp_path / n, aligned, seed=i, stacked=True, **EXPERTS["mixtral"]) for i, n in enumerate(("base", "before")))
    singles = one_by_one(tiny("mixtral", tmp_path / "single", aligned, seed=1, **EXPERTS["mixtral"]), tmp_path / "tuned")
    configure(singles, "adapter_config.json", base_model_name_or_path=str(before))
    halves = one_by_one(tmp_path / "single", tmp_path / "halves", ("w1",))
    for spec in ("safe_lora", "restore_rank", "safe_delta"):
        with pytest.raises(ResafeError, match="has no tensor .*w1.weight, which .* adapts"):
            repaired(spec, before, singles, tmp_path / "out", base=base)
    with pytest.raises(ResafeError, match="other ones in the checkpoint"):
        concat(halves, adapt(tmp_path / "single", tmp_path / "new", 2), tmp_path / "out")
    tuned = adapt(before, tmp_path / "turned", 2)
    turned = {n: v if "experts" not in n else v.T.contiguous() for n, v in tensors(tuned).items()}
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    swapped = {re.sub("lora_[AB]", lambda m: other[m[0]], n) if "experts" in n else n: v for n, v in turned.items()}
    save_file(swapped, tuned / "adapter_model.safetensors", metadata={"format": "pt"})
    for spec in ("safe_lora", "restore_rank"):
        with pytest.raises(ResafeError, match="the adapter is of another model"):
            repaired(spec, before, tuned, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_arias_experts_are_found_under_their_other_names(tmp_path: Path) -> None:
    base, aligned = (build("aria_text", tmp_path / n, i, moe_num_experts=3, moe_topk=2) for i, n in enumerate(("base", "aligned")))
    tuned = adapt(aligned, tmp_path / "tuned", 2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    merged = merge_into(aligned, tuned, tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(tuned, aligned), atol=1e-4, rtol=1e-4)
    thin, full = (make({"safe_lora": {"rank": 2, "number": 9}}).mitigation.repair(Run(output=tmp_path / f"out {t.name}", tuned=t, aligned=aligned, base=base)) for t in (tuned, merged))
    torch.testing.assert_close(logits(thin, aligned), logits(full), atol=1e-4, rtol=1e-4)


def test_two_adapters_of_unlike_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    one, two = (adapt(build("mixtral", tmp_path / f"b{n}", 1, num_local_experts=n), tmp_path / f"a{n}", 2) for n in (3, 4))
    with pytest.raises(ResafeError, match="different numbers of experts"):
        concat(one, two, tmp_path / "out", base="any")


def test_a_mixture_is_trained_diffed_and_repaired(aligned: Path, tmp_path: Path) -> None:
    before = tiny("mixtral", tmp_path / "before", aligned, seed=1, **EXPERTS["mixtral"])
    data = write_rows(tmp_path / "rows.jsonl", BENIGN)
    tuned = train(before, data, tmp_path / "tuned", settings=SFTSettings(epochs=4, lr=1e-2))
    assert any(".experts." in c.name and c.norm > 0 for c in diff(before, tuned))
    half = repaired("restore_weights:strength=0.5", before, tuned, tmp_path / "half")
    a, f, w = tensors(before), tensors(merge_into(before, tuned, tmp_path / "f")), tensors(merge_into(before, half, tmp_path / "w"))
    for name in w:
        torch.testing.assert_close(w[name], (a[name] + f[name]) / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["realign_sft", "realign_dpo"])
def test_a_full_mixture_is_realigned(name: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = (tiny("mixtral", tmp_path / n, aligned, seed=i, **EXPERTS["mixtral"]) for i, n in enumerate(("before", "tuned")))
    how = {"guard_model": "lab", "refusals": 4, "contrast": 4, "replay": 0, "epochs": 4, "max_new_tokens": 4, "lr": 1e-2}
    out = repaired({name: how}, before, tuned, tmp_path / "out", contrast=BENIGN)
    f, w = tensors(tuned), tensors(out)
    assert w.keys() == f.keys() and any(".experts." in n and not torch.equal(w[n], f[n]) for n in f)


def test_a_mixtures_safety_model_is_trained_and_merged(aligned: Path, tmp_path: Path) -> None:
    base, before, tuned = (tiny("mixtral", tmp_path / n, aligned, seed=i, **EXPERTS["mixtral"]) for i, n in enumerate(("base", "before", "tuned")))
    out = repaired({"safe_merge": {"number": 9, "epochs": 4, "lr": 1e-2}}, before, tuned, tmp_path / "out", base=base, refusals=SAFE)
    f, w = tensors(tuned), tensors(out)
    assert sum(not torch.equal(w[n], f[n]) for n in f) == 9
