"""Vetted loading: what may be loaded is loaded, and everything else is one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resafe.errors import ResafeError
from resafe.generate import generate
from resafe.models import load, load_tokenizer
from tests.tiny import KINDS, tiny


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
