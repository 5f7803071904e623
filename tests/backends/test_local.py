"""A folder as a back-end: checkpoints, adapters that share a base, prefills, and what the identity depends on."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from resafe import chat, models
from resafe.backends import Backend, Request, Sampling
from resafe.backends.local import Bases, LocalBackend
from resafe.errors import ResafeError
from resafe.generate import Answer, generate

PROMPTS = ("say kite in code .", "what is the opposite of hot ?", "repeat these words : cat doll saw ball .", "what is the opposite of up ?")
ASKED = [[{"role": "user", "content": c}] for c in PROMPTS]
REQUESTS = [Request(c, 20) for c in ASKED]
PROBE = torch.tensor([[5, 6, 7, 8]])


def said(backend: LocalBackend, requests: list[Request] = REQUESTS) -> list[Answer]:
    found = dict(backend.stream(requests))
    return [found[i] for i in range(len(requests))]


@pytest.fixture(scope="module")
def adapter(aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random LoRA adapter of the lab model, strong enough to change what it says; each made once."""
    home = tmp_path_factory.mktemp("adapters")

    def make(seed: int, **settings: Any) -> Path:
        folder = home / f"{seed}-{'-'.join(settings)}"
        if not folder.is_dir():
            model = models.load_weights(aligned)
            torch.manual_seed(seed)
            config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **settings)
            adapted = get_peft_model(model, config)
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "lora_" in name or "modules_to_save" in name:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            adapted.peft_config["default"].base_model_name_or_path = str(aligned)
            adapted.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models whose weights are loaded during a test."""
    found: list[Any] = []
    load = models.load_weights

    def counted(*args: Any) -> Any:
        found.append(load(*args))
        return found[-1]

    monkeypatch.setattr(models, "load_weights", counted)
    return found


def test_it_is_a_backend_that_says_what_generate_says(aligned: Path) -> None:
    backend = LocalBackend(aligned, batch_size=2)
    assert isinstance(backend, Backend) and backend.name == aligned.name
    assert said(backend) == generate(models.load(aligned), ASKED, 20) and said(backend)[1].text == "cold ."


def test_rendered_is_the_prompt_in_token_ids(aligned: Path) -> None:
    backend = LocalBackend(aligned)
    assert backend.rendered(REQUESTS[0]) == chat.prompt_ids(models.load_tokenizer(aligned), ASKED[0])
    cut = backend.rendered(Request([{"role": "user", "content": "cat " * 500}], 56))
    assert len(cut) == 200, "the lab model's context holds 256 tokens"


def test_a_prefill_is_continued(aligned: Path) -> None:
    backend = LocalBackend(aligned)
    whole = said(backend)[2]
    first, rest = whole.text.split(" ", 1)
    prefilled = Request([*ASKED[2], {"role": "assistant", "content": first}], 20)
    assert said(backend, [prefilled])[0] == Answer(rest, whole.tokens - 1, True)


def test_samples_differ_by_seed_and_are_the_same_again(aligned: Path) -> None:
    backend = LocalBackend(aligned)
    requests = [Request(ASKED[0], 20, Sampling(8.0, seed=s)) for s in range(4)]
    once = said(backend, requests)
    assert len({a.text for a in once}) > 1 and said(LocalBackend(aligned, batch_size=1), requests) == once


def test_a_closed_backend_frees_its_model_and_answers_again(aligned: Path) -> None:
    backend = LocalBackend(aligned)
    once = said(backend)
    model = weakref.ref(backend._model().model)
    backend.close()
    gc.collect()
    assert model() is None and said(backend) == once


def test_the_identity_needs_no_weights_and_ignores_the_batch_size(aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_weights", lambda *_: pytest.fail("loaded"))
    one, two = LocalBackend(aligned, batch_size=1), LocalBackend(aligned, batch_size=7)
    assert one.identity == two.identity and one.identity is not None
    assert all(part in one.identity for part in (" float32 cpu sdpa ", one.template, "engine 1 joining"))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_the_identity_changes_with_every_file_that_decides_answers(file: str, aligned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(aligned, tmp_path / "model"))
    before = LocalBackend(folder).identity
    content = bytearray((folder / file).read_bytes())
    content[-2:-2] = b" "
    if file == "model.safetensors":
        content = bytearray((folder / file).read_bytes())
        content[-1] ^= 1
    (folder / file).write_bytes(content)
    assert LocalBackend(folder).identity != before


def test_the_identity_changes_with_dtype_template_and_engine(aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resafe.backends import _engine

    before = LocalBackend(aligned).identity
    assert LocalBackend(aligned, dtype="bfloat16").identity != before
    other = LocalBackend(aligned)
    other._tokenizer.chat_template += " "
    assert other.identity != before
    monkeypatch.setattr(_engine, "VERSION", 2)
    assert LocalBackend(aligned).identity != before


def test_the_outline_that_the_identity_is_made_of_is_that_of_the_loaded_model(aligned: Path) -> None:
    backend = LocalBackend(aligned)
    model = backend._model().model
    assert (model.config._attn_implementation, type(model)) == (backend._outline.config._attn_implementation, type(backend._outline))
    assert f" {str(model.dtype).removeprefix('torch.')} {model.device.type} " in str(backend.identity)


def test_an_adapter_says_what_its_merged_model_says(aligned: Path, adapter: Callable[..., Path]) -> None:
    backend, merged = LocalBackend(adapter(1)), models.load(adapter(1))
    assert said(backend) == generate(merged, ASKED, 20) != generate(models.load(aligned), ASKED, 20)
    with torch.no_grad():
        assert torch.allclose(backend._model().model(PROBE).logits, merged.model(PROBE).logits, atol=1e-4)


def test_adapters_of_one_base_load_it_once_and_leave_it_as_it_was(
    aligned: Path, adapter: Callable[..., Path], loads: list[Any]
) -> None:
    before, folders = models.load_weights(aligned)(PROBE).logits, (aligned, adapter(1), adapter(2), aligned)
    loads.clear()
    with Bases() as bases:
        found = []
        for folder in folders:
            backend = LocalBackend(folder, bases=bases)
            found.append(said(backend))
            backend.close()
        assert len(loads) == 1 and torch.equal(loads[0](PROBE).logits, before)
    assert found[1] != found[2] and found[0] == found[3] != found[1]
    assert found[2] == said(LocalBackend(adapter(2)))


def test_a_base_in_use_is_not_lent_twice(aligned: Path, adapter: Callable[..., Path]) -> None:
    bases = Bases()
    first = LocalBackend(aligned, bases=bases)
    said(first)
    first.close()
    one, two = LocalBackend(adapter(1), bases=bases), LocalBackend(aligned, bases=bases)
    adapted = said(one)
    assert said(two) == said(LocalBackend(aligned)) and said(one) == adapted


@pytest.mark.parametrize("merged", [True, False])
def test_another_model_takes_the_place_of_the_kept_one(
    merged: bool, aligned: Path, adapter: Callable[..., Path], loads: list[Any]
) -> None:
    with Bases() as bases:
        backend = LocalBackend(aligned, bases=bases)
        said(backend)
        backend.close()
        kept, other = weakref.ref(loads[0]), adapter(3, modules_to_save=["lm_head"]) if merged else aligned
        loads.clear()
        assert kept() is not None
        LocalBackend(other, dtype="float64", bases=bases)._model()
        gc.collect()
        assert kept() is None


def test_an_adapter_with_whole_modules_is_merged_into_a_base_of_its_own(adapter: Callable[..., Path]) -> None:
    folder = adapter(3, modules_to_save=["lm_head"])
    assert not models.attachable(folder) and models.attachable(adapter(1))
    assert said(LocalBackend(folder)) == generate(models.load(folder), ASKED, 20)


def test_an_adapter_that_does_not_fit_spoils_no_base(aligned: Path, adapter: Callable[..., Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(adapter(1), tmp_path / "broken"))
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with Bases() as bases:
        with pytest.raises(ResafeError, match="does not fit its base"):
            said(LocalBackend(broken, bases=bases))
        assert said(LocalBackend(aligned, bases=bases)) == said(LocalBackend(aligned))


def test_leaving_a_stream_early_leaves_the_backend_usable(aligned: Path) -> None:
    backend = LocalBackend(aligned, batch_size=2)
    for _ in backend.stream(REQUESTS):
        break
    assert said(backend) == said(LocalBackend(aligned))
