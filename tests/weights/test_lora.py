"""Adapters: what PEFT computes with them is what the formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations.restore_weights import RestoreWeights
from resafe.weights import Adapter, concat, merge_into, rescale
from tests.weights.models import KINDS, adapt, build, configure, load, logits, tensors

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "c_attn": 2}, "alpha_pattern": {r"layers\.1\..*": 3, r"h\.1\..*": 3}},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {kind: build(kind, home / kind, seed=1) for kind in KINDS}


def peft_deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's own update of every module, as laid out in the base."""
    model = PeftModel.from_pretrained(load(base), adapter)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach()
    assert found
    return found


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_delta_is_what_peft_adds(bases: dict[str, Path], tmp_path: Path, kind: str, settings: str) -> None:
    adapter = Adapter(adapt(bases[kind], tmp_path / "a", seed=2, **SETTINGS[settings]))
    for name, expected in peft_deltas(bases[kind], adapter.folder).items():
        delta = adapter.delta(adapter.modules[f"{name}.weight"])
        torch.testing.assert_close(delta.T if kind == "gpt2" else delta, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_equals_running_the_adapter(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    adapter = adapt(bases[kind], tmp_path / "a", seed=2, use_rslora=True)
    merged = merge_into(bases[kind], adapter, tmp_path / "m", max_shard_bytes=4000)
    torch.testing.assert_close(logits(merged), logits(adapter, bases[kind]), atol=1e-4, rtol=1e-4)
    assert tensors(merged).keys() == tensors(bases[kind]).keys()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "q_proj", "lm_head"]])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_an_adapter_on_one_of_two_tied_matrices_unties_them(
    bases: dict[str, Path], tmp_path: Path, kind: str, targets: list[str]
) -> None:
    adapter = adapt(bases[kind], tmp_path / "a", seed=2, target_modules=targets)
    merged = merge_into(bases[kind], adapter, tmp_path / "m")
    torch.testing.assert_close(logits(merged), logits(adapter, bases[kind]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("factor", [0.3, 0.0, -2.0])
def test_rescaling_scales_the_update(bases: dict[str, Path], tmp_path: Path, kind: str, factor: float) -> None:
    adapter = adapt(bases[kind], tmp_path / "a", seed=2)
    scaled = peft_deltas(bases[kind], rescale(adapter, factor, tmp_path / "b"))
    for name, delta in peft_deltas(bases[kind], adapter).items():
        torch.testing.assert_close(scaled[name], factor * delta, atol=1e-6, rtol=1e-6)


def test_rescaling_keeps_the_configuration_and_the_dtype(bases: dict[str, Path], tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", seed=1, dtype=torch.bfloat16)
    adapter = adapt(base, tmp_path / "a", seed=2, use_rslora=True)
    out = rescale(adapter, lambda module: 0.5 if "q_proj" in module.weight else 1.0, tmp_path / "b")
    assert Adapter(out).config == Adapter(adapter).config
    before, after = Adapter(adapter), Adapter(out)
    for name in before.names():
        halved = name.endswith("q_proj.lora_B.weight")
        assert after.tensor(name).equal(before.tensor(name) * (0.5 if halved else 1))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_concat_is_the_sum_of_both_updates(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    first_targets = ["c_attn", "wte"] if kind == "gpt2" else ["q_proj", "v_proj", "embed_tokens"]
    second_targets = ["c_attn", "mlp.c_proj"] if kind == "gpt2" else ["q_proj", "up_proj"]
    first = adapt(bases[kind], tmp_path / "a", seed=2, r=4, target_modules=first_targets, use_rslora=True)
    second = adapt(
        *(bases[kind], tmp_path / "b", 3), r=3, lora_alpha=5, target_modules=second_targets, rank_pattern={r"(layers|h)\.0\..*": 5}
    )
    both = peft_deltas(bases[kind], concat(first, second, tmp_path / "c"))
    one, two = peft_deltas(bases[kind], first), peft_deltas(bases[kind], second)
    assert both.keys() == one.keys() | two.keys()
    for name, delta in both.items():
        parts = [part[name] for part in (one, two) if name in part]
        torch.testing.assert_close(delta, torch.stack(parts).sum(0), atol=1e-6, rtol=1e-6)


def test_concat_loads_into_transformers_again(bases: dict[str, Path], tmp_path: Path) -> None:
    first = adapt(bases["mistral"], tmp_path / "a", seed=2, layers_to_transform=[0])
    second = adapt(bases["mistral"], tmp_path / "b", seed=3, r=2)
    summed = concat(first, second, tmp_path / "c")
    step = merge_into(merge_into(bases["mistral"], first, tmp_path / "m1"), second, tmp_path / "m2")
    torch.testing.assert_close(logits(summed, bases["mistral"]), logits(step), atol=1e-4, rtol=1e-4)


def test_adapters_of_different_bases_are_not_summed(bases: dict[str, Path], tmp_path: Path) -> None:
    first, second = adapt(bases["llama"], tmp_path / "a", seed=2), adapt(bases["mistral"], tmp_path / "b", seed=3)
    with pytest.raises(ResafeError, match="different bases"):
        concat(first, second, tmp_path / "c")


def test_adapters_of_gpt2_are_summed_whichever_module_peft_looked_at_last(bases: dict[str, Path], tmp_path: Path) -> None:
    first = adapt(bases["gpt2"], tmp_path / "a", seed=2, target_modules=["c_attn", "lm_head"])
    second = adapt(bases["gpt2"], tmp_path / "b", seed=3, target_modules=["c_attn", "attn.c_proj"])
    assert Adapter(first).config["fan_in_fan_out"] != Adapter(second).config["fan_in_fan_out"]
    step = merge_into(merge_into(bases["gpt2"], first, tmp_path / "m1"), second, tmp_path / "m2")
    for i, (one, two) in enumerate(((first, second), (second, first))):
        summed = concat(one, two, tmp_path / f"c{i}")
        torch.testing.assert_close(logits(summed, bases["gpt2"]), logits(step), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits(merge_into(bases["gpt2"], summed, tmp_path / f"m{i + 3}")), logits(step), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"peft_type": "IA3"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_is_more_than_lora_is_refused(bases: dict[str, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = configure(adapt(bases["llama"], tmp_path / "a", seed=2), "adapter_config.json", **changes)
    with pytest.raises(ResafeError, match="with PEFT first"):
        Adapter(adapter)


def test_modules_saved_in_full_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapt(bases["llama"], tmp_path / "a", seed=2, modules_to_save=["norm"])
    configure(adapter, "adapter_config.json", modules_to_save=None)  # even when the configuration hides them
    with pytest.raises(ResafeError, match="norm.weight, which is no part of a LoRA update"):
        Adapter(adapter)


def test_a_rank_that_contradicts_the_configuration_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = configure(adapt(bases["llama"], tmp_path / "a", seed=2), "adapter_config.json", r=16)
    with pytest.raises(ResafeError, match="do not fit rank 16"):
        Adapter(adapter)


def test_an_adapter_of_another_model_is_not_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapt(bases["gpt2"], tmp_path / "a", seed=2)
    with pytest.raises(ResafeError, match="is this its base"):
        merge_into(bases["llama"], adapter, tmp_path / "m")
    wide = adapt(build("llama", tmp_path / "wide", seed=0, intermediate_size=44), tmp_path / "b", seed=2)
    with pytest.raises(ResafeError, match="of another model"):
        merge_into(bases["llama"], wide, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_adapter_that_carries_a_changed_embedding_is_not_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapt(bases["llama"], tmp_path / "a", seed=2, target_modules=["embed_tokens", "q_proj"])
    values = tensors(adapter)
    name = next(n for n in values if n.endswith("embed_tokens.base_layer.weight"))
    values[name][5] += 1
    save_file(values, adapter / "adapter_model.safetensors")
    with pytest.raises(ResafeError, match="carries its own model.embed_tokens.weight"):
        merge_into(bases["llama"], adapter, tmp_path / "m")
    with pytest.raises(ResafeError, match="carries its own model.embed_tokens.weight"):
        RestoreWeights().repair(Run(output=tmp_path / "m", aligned=bases["llama"], tuned=adapter))
    other = adapt(bases["llama"], tmp_path / "b", seed=2, target_modules=["embed_tokens"])
    with pytest.raises(ResafeError, match="carry different"):
        concat(adapter, other, tmp_path / "c")
