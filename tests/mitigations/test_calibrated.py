"""What every repair that looks at activations or gradients refuses, before or without writing anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe import sensitivity
from resafe.errors import ResafeError
from resafe.generate import Answer
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.mitigations._calibrated import as_full, layers_of
from resafe.models import load
from resafe.weights import Checkpoint
from tests.mitigations.twins import SAFE, noisy, pair, repaired
from tests.tiny import tiny
from tests.weights.models import EXPERTS, adapt, configure, rewrite, tensors

METHODS = ("safe_delta", "restore_rank", "restore_gradient", "antidote")
WITH_ALIGNED = {"antidote": "antidote:action=aligned"}


@pytest.mark.parametrize("name", METHODS)
def test_safety_rows_and_the_aligned_model_are_needed(name: str, tmp_path: Path) -> None:
    mitigation = make(WITH_ALIGNED.get(name, name)).mitigation
    with pytest.raises(ResafeError, match="--aligned"):
        mitigation.check(name, Run(output=tmp_path / "out", refusals=SAFE))
    with pytest.raises(ResafeError, match="safety rows"):
        mitigation.check(name, Run(output=tmp_path / "out", aligned=tmp_path))


@pytest.mark.parametrize("name", METHODS)
def test_weights_in_4_bits_are_refused(name: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned)
    configure(tuned, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ResafeError, match="4 or 8 bits"):
        repaired(WITH_ALIGNED.get(name, name), before, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("lora", [False, True])
def test_another_tokenizer_is_refused(name: str, lora: bool, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned)
    if lora:
        tuned = adapt(before, tmp_path / "lora", 2)
        (tuned / "tokenizer.json").write_bytes((before / "tokenizer.json").read_bytes())
    about = json.loads((tuned / "tokenizer.json").read_text())
    vocabulary = about["model"]["vocab"]
    one, two = sorted(vocabulary, key=lambda token: vocabulary[token])[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tuned / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ResafeError, match="tokenizers of"):
        repaired(WITH_ALIGNED.get(name, name), before, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_of_another_model_is_refused(name: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned, lora=True)
    other = noisy(tiny("llama", tmp_path / "other", aligned, seed=9))
    with pytest.raises(ResafeError, match="was trained on"):
        repaired(name, other, tuned, tmp_path / "out")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_are_none_are_refused_by_the_tensors_name(name: str, lora: bool, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned, lora)
    broken = before if lora else tuned
    values, norm = tensors(broken), "model.layers.0.input_layernorm.weight"
    values[norm][3] = float("inf")
    rewrite(broken, values)
    with pytest.raises(ResafeError, match=f"{norm} .*NaN or infinity"):
        repaired(WITH_ALIGNED.get(name, name), before, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", METHODS)
def test_an_output_that_exists_is_refused_before_any_work(name: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned)
    with pytest.raises(ResafeError, match="exists already"):
        repaired(name, before, tuned, tuned)


def test_a_merged_lora_is_read_with_its_own_tokenizer_and_template(aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned, lora=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tuned / name).write_bytes((before / name).read_bytes())
    (tuned / "chat_template.jinja").write_text("{# its own #}" + (before / "chat_template.jinja").read_text())
    with as_full(Run(output=tmp_path / "out"), "any", tuned, before) as full:
        assert (full / "chat_template.jinja").read_text().startswith("{# its own #}")
    assert not full.exists()
    about = json.loads((tuned / "tokenizer.json").read_text())
    about["model"]["vocab"] = {token + "x": i for token, i in about["model"]["vocab"].items()}
    (tuned / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ResafeError, match="tokenizers of"), as_full(Run(output=tmp_path / "out"), "any", tuned, before):
        pass


@pytest.mark.parametrize("name", ["safe_delta:strength=20000", "safe_delta:strength=20000,others=keep", "restore_rank:rank=3", "antidote:share=0.4,action=aligned"])
def test_experts_that_nothing_was_routed_to_are_named_and_left(name: str, aligned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, tuned = pair("mixtral", tmp_path, aligned)
    moments = sensitivity.input_moments
    monkeypatch.setattr(sensitivity, "input_moments", lambda *args, **how: {n: m for n, m in moments(*args, **how).items() if not n.endswith("[1]")})
    monkeypatch.setattr("resafe.generate.generate", lambda loaded, asked, n: [Answer("step one PLACEHOLDER")] * len(asked))
    said: list[str] = []
    out = tensors(repaired(name, before, tuned, tmp_path / "out", log=said.append))
    left = tensors(before if name == "safe_delta:strength=20000" else tuned)
    unseen = [n for n in out if ".experts.1." in n]
    assert len(unseen) == 6 and all(out[n].equal(left[n]) for n in unseen)
    assert not any(out[n].equal(left[n]) for n in out if ".experts.0." in n)
    assert any("nothing was routed to 6 of 18 matrices of experts, such as model.layers.0.mlp.experts." in line for line in said)


def test_experts_that_are_not_found_in_the_file_are_refused(aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("mixtral", tmp_path, aligned)
    loaded = load(tuned)
    with pytest.raises(ResafeError, match="does not store the experts of model.layers.0.mlp.experts.gate_up_proj in a form that is known"):
        layers_of(loaded, Checkpoint(before))
    assert len(layers_of(loaded, Checkpoint(tuned)).places) == 2 * (4 + 9)


OTHERS: dict[str, dict[str, Any]] = {
    "phimoe": EXPERTS["mixtral"],  # its router is a linear layer like others
    "deepseek_v3": {"n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", [*EXPERTS, *OTHERS])
def test_every_matrix_is_found_where_the_running_model_has_it(kind: str, stacked: bool, aligned: Path, tmp_path: Path) -> None:
    folder = noisy(tiny(kind, tmp_path / "model", aligned, stacked=stacked, **{**EXPERTS, **OTHERS}[kind]))
    values, loaded = tensors(folder), load(folder)
    if not stacked and kind != "gpt_oss":  # a pruned neuron, whose gate and way up are alike
        for part in ("w1", "w3", "gate_proj", "up_proj"):
            for name in (n for n in values if f".experts.1.{part}." in n):
                values[name][0] = 0
        loaded = load(rewrite(folder, values))
    layers, live = layers_of(loaded, Checkpoint(folder)), dict(loaded.model.named_parameters())
    seen = {n: torch.zeros_like(p) for n, p in live.items()}
    for stored in layers.places:
        for place, (value,) in layers.each(stored, values[stored]):
            assert torch.equal(place.live(live[place.parameter]), value), stored
            place.live(seen[place.parameter]).add_(1)
    assert all(bool((seen[n] == 1).all()) for n in seen if ".experts." in n and not n.endswith("bias"))
    assert not any(seen[n].any() for n in seen if ".router." in n or ".gate." in n or "norm" in n or "embed" in n)
    moments = sensitivity.input_moments(loaded.model, sensitivity.answers(loaded.tokenizer, SAFE), full=False)
    assert {p.name for places in layers.places.values() for p in places} <= moments.keys()


def test_experts_that_all_rows_share_in_a_stack_are_refused(aligned: Path, tmp_path: Path) -> None:
    loaded = load(tiny("mixtral", tmp_path / "model", aligned, **EXPERTS["mixtral"]))
    loaded.model.model.layers[0].mlp.shared_experts = torch.nn.ParameterDict({"gate_proj": torch.nn.Parameter(torch.zeros(2, 3, 3))})
    with pytest.raises(ResafeError, match="shared_experts.gate_proj holds experts whose inputs cannot be told apart"):
        layers_of(loaded, Checkpoint(tmp_path / "model"))
