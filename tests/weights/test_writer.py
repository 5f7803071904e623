"""Writing checkpoints: in shards, whole or not at all."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from resafe.errors import ResafeError
from resafe.weights import write_checkpoint
from tests.weights.models import build, logits, stream, tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build("qwen2", tmp_path_factory.mktemp("models") / "m", seed=0)
    for name in ("tokenizer.json", "chat_template.jinja", "resafe.json", "optimizer.pt", "modeling_x.py", "LICENSE.txt"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-5").mkdir()
    return folder


def test_one_file_when_everything_fits(source: Path, tmp_path: Path) -> None:
    write_checkpoint(source, tmp_path / "out", stream(source))
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert logits(tmp_path / "out").equal(logits(source))


def test_shards_and_their_index_load_again(source: Path, tmp_path: Path) -> None:
    write_checkpoint(source, tmp_path / "out", stream(source), max_shard_bytes=4000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(source).values())
    assert all(f.stat().st_size < 4000 + 2000 for f in files)  # the limit and a header
    assert logits(tmp_path / "out").equal(logits(source))


def test_memory_holds_one_shard(source: Path, tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for i in range(40):
            value = np.zeros(100, np.float32)  # lives as long as any tensor that shares its memory
            alive.append(weakref.ref(value))
            most = max(most, sum(r() is not None for r in alive))
            yield f"t{i}", torch.from_numpy(value)

    write_checkpoint(source, tmp_path / "out", counted(), max_shard_bytes=2000)
    assert most <= 5 + 2  # a shard of five, the one that did not fit, the one being made


def test_what_belongs_to_the_model_comes_along_and_nothing_else(source: Path, tmp_path: Path) -> None:
    write_checkpoint(source, tmp_path / "out", stream(source), config={"tie_word_embeddings": False})
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE.txt"),
        "model.safetensors",
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(2000)
        yield "b", torch.ones(2000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(source, tmp_path / "out", broken(), max_shard_bytes=4000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_a_used_folder_are_refused_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    with pytest.raises(ResafeError, match="exists already"):
        write_checkpoint(source, tmp_path / "used", stream(source))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ResafeError, match="free some space"):
        write_checkpoint(source, tmp_path / "deep" / "out", stream(source))
    assert not (tmp_path / "deep").exists()


def test_a_tensor_given_twice_under_two_names_is_stored_twice(source: Path, tmp_path: Path) -> None:
    one = torch.arange(6.0)
    write_checkpoint(source, tmp_path / "out", iter([("a", one), ("b", one), ("c", one[:3])]))
    assert tensors(tmp_path / "out")["b"].equal(one) and tensors(tmp_path / "out")["c"].equal(one[:3])
