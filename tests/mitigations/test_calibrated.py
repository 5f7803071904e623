"""What every repair that looks at activations or gradients refuses, before or without writing anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.mitigations._calibrated import as_full
from tests.mitigations.twins import SAFE, noisy, pair, repaired
from tests.tiny import tiny
from tests.weights.models import adapt, configure

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
