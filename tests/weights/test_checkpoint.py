"""Opening checkpoints: by name, lazily, and refusing what is unsound with one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resafe.errors import ResafeError
from resafe.weights import Checkpoint, Pair, Twin, same_weights, translate
from tests.weights.models import build, configure, rewrite, shard, tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("models") / "llama", seed=0, dtype=torch.bfloat16)


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def refusal(folder: Path) -> str:
    with pytest.raises(ResafeError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names_shapes_and_values_are_those_of_the_file(llama: Path) -> None:
    model = Checkpoint(llama)
    stored = tensors(llama)
    assert model.names() == sorted(stored)
    assert all(model.tensor(n).equal(t) and model.shape(n) == tuple(t.shape) for n, t in stored.items())
    assert model.dtype("lm_head.weight") == "BF16"
    assert not model.tied and model.quantised is None


def test_shards_read_like_one_file(llama: Path, tmp_path: Path) -> None:
    sharded = shard(copy(llama, tmp_path / "m"))
    assert same_weights(Checkpoint(llama), Checkpoint(sharded))


def test_an_unknown_name_is_answered_with_the_nearest(llama: Path) -> None:
    with pytest.raises(ResafeError, match="Did you mean 'lm_head.weight'"):
        Checkpoint(llama).tensor("lm_heed.weight")


def test_tied_means_stored_once_or_twice_with_equal_values(tmp_path: Path) -> None:
    folder = build("qwen2", tmp_path / "q", seed=0)
    assert Checkpoint(folder).tied
    values = tensors(folder)
    rewrite(folder, {**values, "lm_head.weight": values["model.embed_tokens.weight"].clone()})
    assert Checkpoint(folder).tied
    rewrite(folder, {**values, "lm_head.weight": values["model.embed_tokens.weight"] + 1})
    assert not Checkpoint(folder).tied


@pytest.mark.parametrize("keep", [0, 20, 600])
def test_a_truncated_file_is_named(llama: Path, tmp_path: Path, keep: int) -> None:
    folder = copy(llama, tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors is damaged" in refusal(folder)


def test_a_missing_shard_is_named(llama: Path, tmp_path: Path) -> None:
    folder = shard(copy(llama, tmp_path / "m"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(folder)


def test_an_index_that_promises_too_much_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = shard(copy(llama, tmp_path / "m"))
    file = folder / "model.safetensors.index.json"
    places = json.loads(file.read_text())["weight_map"]
    file.write_text(json.dumps({"weight_map": {**places, "model.extra": places["lm_head.weight"]}}))
    assert "promises tensor model.extra" in refusal(folder)
    file.write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    assert "not a file of that folder" in refusal(folder)


def test_pickles_adapters_and_empty_folders_are_refused(tmp_path: Path) -> None:
    assert "no such model folder" in refusal(tmp_path / "none")
    assert "holds no weights" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter" in refusal(tmp_path)


def test_quantised_checkpoints_are_recognised(llama: Path, tmp_path: Path) -> None:
    by_config = configure(copy(llama, tmp_path / "a"), quantization_config={"quant_method": "bitsandbytes"})
    assert Checkpoint(by_config).quantised == "bitsandbytes"
    by_name = copy(llama, tmp_path / "b")
    rewrite(by_name, {**tensors(by_name), "model.layers.0.mlp.up_proj.weight.absmax": torch.ones(3)})
    assert Checkpoint(by_name).quantised
    with pytest.raises(ResafeError, match="LoRA"):
        Pair(Checkpoint(llama), Checkpoint(by_name))


def test_a_leading_part_is_added_or_removed_for_all_names_or_none() -> None:
    long, short = ["transformer.h.0.w", "transformer.wte.weight"], ["h.0.w", "wte.weight"]
    assert translate(long, short) == dict(zip(long, short))
    assert translate(short, long) == dict(zip(short, long))
    assert translate(["norm.w", "x.a.w", "x.b.w"], ["norm.w", "a.w", "b.w"]) == {"norm.w": "norm.w"}
    assert translate(["model.norm.w", "draft.model.norm.w"], ["model.norm.w"]) == {"model.norm.w": "model.norm.w"}


def test_rules_compute_in_float32_and_the_result_has_the_tuned_dtype(llama: Path, tmp_path: Path) -> None:
    aligned = build("llama", tmp_path / "aligned", seed=1)
    seen = set()

    def rule(_: Twin, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        seen.update((ours.dtype, theirs.dtype))
        return theirs

    result = {p.name: p.value() for p in Pair(Checkpoint(llama), Checkpoint(aligned)).edit(rule)}
    assert seen == {torch.float32}
    assert all(result[n].equal(t.bfloat16()) for n, t in tensors(aligned).items())
