"""Vetted loading: what may be loaded is loaded, and everything else is one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from resafe.errors import ResafeError
from resafe.generate import generate
from resafe.models import attachable, base_of, load, load_tokenizer, load_weights
from tests.tiny import KINDS, tiny
from tests.weights.models import build, rewrite, tensors


@pytest.fixture
def copy(aligned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(aligned, tmp_path / "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_loads_and_answers(kind: str, aligned: Path, tmp_path: Path) -> None:
    loaded = load(tiny(kind, tmp_path / kind, aligned, template=kind != "gpt2"))
    answers = generate(loaded, [[{"role": "user", "content": "say kite in code ."}]] * 3, max_new_tokens=4)
    assert len(answers) == 3 and all(a.tokens <= 4 for a in answers)


def test_batched_answers_equal_single_ones_and_keep_their_order(aligned: Path) -> None:
    loaded = load(aligned)
    asked = [[{"role": "user", "content": c}] for c in ("say kite in code .", "what is the opposite of hot ?", "repeat these words : cat doll saw ball .")]
    together = generate(loaded, asked, 20, batch_size=3)
    assert together == [generate(loaded, [c], 20)[0] for c in asked]
    assert together[1].text == "cold ." and together[1].finished


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: shutil.rmtree(f), "no such model folder"),
        (lambda f: (f / "config.json").unlink(), "neither config.json nor"),
        (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "convert its .bin files"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 40), "cannot be loaded"),
    ],
)
def test_a_bad_folder_is_one_clear_line(copy: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(copy)
    with pytest.raises(ResafeError, match=said) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_a_folder_that_asks_for_its_own_code_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(ResafeError, match="does not run remote code"):
        load(copy)


def test_missing_tokenizer_files_are_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(ResafeError, match="no tokenizer files"):
        load_tokenizer(copy)


def test_a_tokenizer_larger_than_the_model_is_refused(copy: Path) -> None:
    tokenizer = load_tokenizer(copy)
    tokenizer.add_tokens([f"new{i}" for i in range(5)])
    tokenizer.save_pretrained(copy)
    with pytest.raises(ResafeError, match="embedding rows"):
        load(copy)


@pytest.fixture
def adapter(aligned: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(config: Any) -> Path:
        model: Any = get_peft_model(load(aligned).model, config)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.05)
        model.peft_config["default"].base_model_name_or_path = str(aligned)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def test_an_unmerged_adapter_computes_what_the_merged_one_does(adapter: Callable[..., Path]) -> None:
    folder, ids = adapter(LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        one, other = (load(folder, merge=m).model(ids).logits for m in (True, False))
        assert torch.allclose(one, other, atol=1e-4)
        base = load(base_of(folder)).model(ids).logits
    assert not torch.allclose(one, base, atol=1e-1)


def test_adapters_of_other_kinds_are_only_merged(adapter: Callable[..., Path]) -> None:
    folder = adapter(IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]))
    assert load(folder) and not attachable(folder)
    with pytest.raises(ResafeError, match="kind IA3: only LoRA can be used without merging"):
        load(folder, merge=False)


@pytest.mark.parametrize(
    ("entry", "plain"),
    [
        ({}, True), ({"bias": "none", "use_dora": False, "modules_to_save": None, "init_lora_weights": "gaussian"}, True),
        ({"modules_to_save": ["lm_head"]}, False), ({"trainable_token_indices": [3]}, False), ({"bias": "lora_only"}, False),
        ({"use_dora": True}, False), ({"init_lora_weights": "pissa"}, False), ({"peft_type": "IA3"}, False),
        ({"kasa_config": {"beta": 1}}, False), ({"a_setting_of_tomorrow": 1}, False),
    ],
)  # fmt: skip
def test_only_a_plain_lora_is_put_on_a_shared_base(entry: dict[str, Any], plain: bool, tmp_path: Path) -> None:
    assert attachable(saved(tmp_path, "base_model.model.layers.0.q_proj.lora_A.weight", **entry)) is plain


def test_weights_of_other_shapes_than_the_configuration_asks_for_are_refused_by_name(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model", 1)
    rewrite(folder, {n: v[:40].clone() if n == "lm_head.weight" else v for n, v in tensors(folder).items()})
    with pytest.raises(ResafeError, match=r"tensor lm_head.weight has shape \[40, 16\] in .*model, and its config.json asks for \[48, 16\]"):
        load_weights(folder)


def test_an_adapter_that_was_cut_off_is_refused_by_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path, "base_model.model.layers.0.q_proj.lora_A.weight")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ResafeError, match="adapter_model.safetensors cannot be read .*copy it again"):
        attachable(folder)


@pytest.mark.parametrize("name", ["base_model.model.embed_tokens.weight", "base_model.model.lm_head.weight", "base_model.model.q_proj.bias"])
def test_an_adapter_that_brings_whole_weights_is_not_put_on_a_shared_base(name: str, tmp_path: Path) -> None:
    assert not attachable(saved(tmp_path, name))


def saved(folder: Path, tensor: str, **entry: Any) -> Path:
    from safetensors.torch import save_file

    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **entry}))
    save_file({tensor: torch.zeros(2)}, folder / "adapter_model.safetensors")
    return folder


def test_an_activated_lora_is_refused(copy: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path, "base_model.model.q_proj.lora_A.weight", base_model_name_or_path=str(copy), alora_invocation_tokens=[5])
    with pytest.raises(ResafeError, match="is an activated LoRA"):
        load(folder)


def test_weights_that_are_not_there_are_not_made_up(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(copy / "model.safetensors")
    state.pop("model.layers.0.mlp.up_proj.weight")
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ResafeError, match="lacks 1 weights .*up_proj"):
        load(copy)


def test_a_clone_with_zeroed_weights_answers_differently(aligned: Path) -> None:
    """A copy must be the copy: rebuilt from a state dict, not a deep copy whose `forward` may still be the original's."""
    one = load(aligned)
    clone = type(one.model)(one.model.config).eval()
    clone.load_state_dict({k: torch.zeros_like(v) for k, v in one.model.state_dict().items()})
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert clone(ids).logits.abs().max() == 0
        assert one.model(ids).logits.abs().max() > 0


def test_a_zeroed_twin_of_a_trained_model_shares_nothing_with_it(aligned: Path, tmp_path: Path) -> None:
    """The lab's zeroed-clone test: our training path returns a model whose weights decide its answers."""
    from resafe.lab.attacks import attack_rows
    from resafe.sft import SFTSettings, sft

    loaded = load(aligned)
    settings = SFTSettings(lora=False, lr=1e-4, epochs=1, batch=10)
    model = sft(loaded.model, loaded.tokenizer, attack_rows("explicit_10"), settings, tmp_path)
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    model.eval()
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
        for p in twin.parameters():
            p.zero_()
        assert twin(ids).logits.abs().max() == 0, "a zeroed twin must answer nothing"
        assert model(ids).logits.abs().max() > 0, "and must not have touched the original"
