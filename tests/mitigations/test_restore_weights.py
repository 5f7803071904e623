"""restore_weights: W = (1 - a) W_f + a W_a, checked against the same arithmetic on loaded models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.mitigations.restore_weights import RestoreWeights
from resafe.weights import Adapter, merge_into
from tests.weights.models import KINDS, adapt, build, configure, load, logits, rewrite, shard, tensors

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def pair(home: Path, kind: str, dtype: torch.dtype = torch.float32, **tuned: Any) -> Run:
    aligned = build(kind, home / "aligned", 1, dtype)
    return Run(output=home / "out", aligned=aligned, tuned=build(kind, home / "tuned", 2, dtype, **tuned))


def folders(run: Run) -> tuple[Path, Path]:
    assert run.tuned and run.aligned
    return run.tuned, run.aligned


def expected(run: Run, a: float) -> dict[str, torch.Tensor]:
    """The interpolation, by the loader's own parameter names, in float64."""
    tuned, aligned = (load(f).state_dict() for f in folders(run))
    return {n: ((1 - a) * tuned[n].double() + a * aligned[n].double()).to(tuned[n].dtype) for n in tuned}


def refusal(run: Run, **parameters: Any) -> str:
    with pytest.raises(ResafeError) as caught:
        RestoreWeights(**parameters).repair(run)
    message = str(caught.value)
    assert "\n" not in message
    assert not run.output.exists() and not list(run.output.parent.glob(".out*"))
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_interpolated(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    run = pair(tmp_path, kind, dtype)
    found = load(RestoreWeights(strength=0.3).repair(run)).state_dict()
    for name, value in expected(run, 0.3).items():
        torch.testing.assert_close(found[name], value, atol=1e-7, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
        assert found[name].dtype == dtype


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_strength_0_is_the_tuned_model_and_1_the_aligned_one(tmp_path: Path, kind: str) -> None:
    run = pair(tmp_path, kind, torch.bfloat16)
    for strength, folder in zip((0, 1), folders(run)):
        run.output = tmp_path / f"out{strength}"
        found = tensors(RestoreWeights(strength=strength).repair(run))
        assert all(found[n].equal(t) for n, t in tensors(folder).items())


def test_tensors_are_joined_by_name_whatever_their_order_or_shard(tmp_path: Path) -> None:
    run = pair(tmp_path, "mistral")
    tuned, aligned = folders(run)
    whole = tensors(RestoreWeights(strength=0.4).repair(run))
    rewrite(tuned, dict(reversed(tensors(tuned).items())))
    shard(aligned)
    run.output = tmp_path / "again"
    again = tensors(RestoreWeights(strength=0.4).repair(run))
    assert whole.keys() == again.keys() and all(again[n].equal(t) for n, t in whole.items())


def test_names_without_their_leading_part_are_found(tmp_path: Path) -> None:
    run = pair(tmp_path, "gpt2")
    values = {n.removeprefix("transformer."): t for n, t in tensors(folders(run)[1]).items()}
    want = expected(run, 0.5)
    rewrite(folders(run)[1], {**values, "h.0.attn.bias": torch.ones(1, 1, 32, 32)})  # a causal mask, as old files have it
    found = load(RestoreWeights().repair(run)).state_dict()
    assert all(torch.allclose(found[n], t) for n, t in want.items())


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 2}])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_an_adapter_is_scaled_to_what_interpolating_the_merged_model_gives(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    aligned = build(kind, tmp_path / "aligned", 1)
    adapter = adapt(aligned, tmp_path / "adapter", 2, **settings)
    scaled = RestoreWeights(strength=0.3).repair(Run(output=tmp_path / "a", aligned=aligned, tuned=adapter))
    merged = merge_into(aligned, adapter, tmp_path / "merged")
    full = RestoreWeights(strength=0.3).repair(Run(output=tmp_path / "b", aligned=aligned, tuned=merged))
    again = tensors(merge_into(aligned, scaled, tmp_path / "again"))
    for name, value in tensors(full).items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(scaled, aligned), logits(full), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    aligned, other = build("llama", tmp_path / "aligned", 1), build("llama", tmp_path / "other", 3)
    run = Run(output=tmp_path / "out", aligned=aligned, tuned=adapt(other, tmp_path / "adapter", 2))
    assert "not those of" in refusal(run)
    shutil.rmtree(other)
    shutil.copytree(aligned, other)  # the same weights elsewhere
    assert RestoreWeights().repair(run) == run.output


def test_the_aligned_model_itself_is_refused(tmp_path: Path) -> None:
    aligned = build("llama", tmp_path / "aligned", 1)
    shutil.copytree(aligned, tmp_path / "tuned")
    shard(tmp_path / "tuned")
    run = Run(output=tmp_path / "out", aligned=aligned, tuned=tmp_path / "tuned")
    assert "holds the weights of the aligned model" in refusal(run)
    values = tensors(aligned)
    rewrite(aligned, {**values, EMBED: values[EMBED] + 1e-3})
    assert RestoreWeights().repair(run) == run.output


def test_an_adapter_on_a_quantised_base_is_scaled(tmp_path: Path) -> None:
    aligned = build("llama", tmp_path / "aligned", 1)
    adapter = adapt(aligned, tmp_path / "adapter", 2)
    configure(aligned, quantization_config={"quant_method": "bitsandbytes"})
    assert RestoreWeights().repair(Run(output=tmp_path / "out", aligned=aligned, tuned=adapter)).is_dir()


def test_kept_embeddings_stay_as_trained(tmp_path: Path) -> None:
    run = pair(tmp_path, "llama")
    found, tuned = tensors(RestoreWeights(embeddings="keep").repair(run)), tensors(folders(run)[0])
    assert {n for n in tuned if found[n].equal(tuned[n])} == {EMBED, HEAD}
    aligned = folders(run)[1]
    adapter = adapt(aligned, tmp_path / "adapter", 2, target_modules=["lm_head", "q_proj"])
    before = tensors(adapter)
    after = tensors(RestoreWeights(embeddings="keep").repair(Run(output=tmp_path / "b", aligned=aligned, tuned=adapter)))
    assert {n.split(".")[-3] for n in before if not after[n].equal(before[n])} == {"q_proj"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_strength_follows_the_depth(kind: str, tmp_path: Path) -> None:
    sizes = {"n_layer": 5} if kind == "gpt2" else {"num_hidden_layers": 5}
    aligned, tuned = (build(kind, tmp_path / n, i, **sizes) for i, n in enumerate(("aligned", "tuned")))
    adapter = adapt(aligned, tmp_path / "adapter", 2)
    how = RestoreWeights(strength=0.8, layers=(0.5, 1, 0))
    full = tensors(how.repair(Run(output=tmp_path / "full", aligned=aligned, tuned=tuned)))
    thin, before = Adapter(how.repair(Run(output=tmp_path / "thin", aligned=aligned, tuned=adapter))), Adapter(adapter)
    by_block = [0.4, 0.6, 0.8, 0.4, 0.0]  # 0.8 x (0.5, 0.75, 1, 0.5, 0)

    def strength(name: str) -> float:
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        return by_block[block] if block is not None else by_block[0] if "embed" in name or "wte" in name or "wpe" in name else by_block[-1]

    a, f = tensors(aligned), tensors(tuned)
    for name in f:
        torch.testing.assert_close(full[name], f[name] + strength(name) * (a[name] - f[name]), atol=1e-6, rtol=0)
    for name, module in before.modules.items():
        torch.testing.assert_close(thin.delta(thin.modules[name]), (1 - strength(name)) * before.delta(module), atol=1e-6, rtol=1e-5)
    assert {strength(n) for n in f} == set(by_block)


@pytest.mark.parametrize("layers", ["[]", "[0.5, 2]", "[.nan]", "x"])
def test_a_profile_that_is_none_is_refused(layers: str) -> None:
    with pytest.raises(ResafeError, match="restore_weights: layers"):
        make(f"restore_weights:layers={layers}")


def test_added_tokens_keep_their_rows(tmp_path: Path) -> None:
    run = pair(tmp_path, "llama", vocab_size=51)
    tuned, aligned = (tensors(f) for f in folders(run))
    found = tensors(RestoreWeights(strength=0.25).repair(run))
    for name in (EMBED, HEAD):
        assert found[name][48:].equal(tuned[name][48:])
        assert torch.allclose(found[name][:48], 0.75 * tuned[name][:48] + 0.25 * aligned[name], atol=1e-7)
    assert logits(run.output).shape[-1] == 51


def test_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    assert "vocabulary shrank" in refusal(pair(tmp_path, "llama", vocab_size=40))


def test_tied_embeddings_are_edited_once_and_stay_tied(tmp_path: Path) -> None:
    run = pair(tmp_path, "qwen2")
    assert HEAD not in tensors(RestoreWeights().repair(run))
    tuned, aligned = folders(run)
    rewrite(aligned, {**tensors(aligned), HEAD: tensors(aligned)[EMBED].clone()})  # stored twice: still tied
    run.output = tmp_path / "again"
    assert HEAD not in tensors(RestoreWeights().repair(run))
    rewrite(tuned, {**tensors(tuned), HEAD: tensors(tuned)[EMBED].clone()})
    run.output = tmp_path / "third"
    found = tensors(RestoreWeights().repair(run))
    assert found[HEAD].equal(found[EMBED])


@pytest.mark.parametrize("tied_side", ["tuned", "aligned"])
def test_a_model_tied_on_one_side_has_its_embedding_for_a_head(tmp_path: Path, tied_side: str) -> None:
    aligned = build("llama", tmp_path / "aligned", 1, tie_word_embeddings=tied_side == "aligned")
    tuned = build("llama", tmp_path / "tuned", 2, tie_word_embeddings=tied_side == "tuned")
    run = Run(output=tmp_path / "out", aligned=aligned, tuned=tuned)
    found = load(RestoreWeights(strength=0.3).repair(run)).state_dict()
    assert all(torch.allclose(found[n], t, atol=1e-7) for n, t in expected(run, 0.3).items())
    assert not found[HEAD].equal(found[EMBED])
    assert json.loads((run.output / "config.json").read_text())["tie_word_embeddings"] is False


def test_tensors_of_the_tuned_model_alone_and_buffers_are_kept(tmp_path: Path) -> None:
    run = pair(tmp_path, "llama")
    tuned, aligned = folders(run)
    extra = {"value_head.weight": torch.ones(3), "model.steps": torch.tensor([7]), "model.flag": torch.tensor([True])}
    rewrite(tuned, {**tensors(tuned), **extra})
    rewrite(aligned, {**tensors(aligned), "model.steps": torch.tensor([9])})
    lines: list[str] = []
    run.log = lines.append
    found = tensors(RestoreWeights().repair(run))
    assert all(found[n].equal(t) for n, t in extra.items())
    assert lines == ["kept as trained, since the aligned model has no such tensor: model.flag, value_head.weight (2 in all)"]


def test_a_tuned_model_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    run = pair(tmp_path, "llama", num_hidden_layers=1)
    assert "lacks 9 tensors" in (message := refusal(run))
    assert message.count("model.layers.1") == 3


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    assert "down_proj.weight has shape [16, 44]" in refusal(pair(tmp_path, "llama", intermediate_size=44))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nan_and_infinity_are_refused_by_name(tmp_path: Path, side: int, value: str) -> None:
    run = pair(tmp_path, "llama")
    folder = folders(run)[side]
    values = tensors(folder)
    values["model.norm.weight"][3] = float(value)
    rewrite(folder, values)
    message = refusal(run)
    assert "tensor model.norm.weight" in message and str(folder) in message


def test_quantised_checkpoints_and_damaged_shards_are_refused(tmp_path: Path) -> None:
    run = pair(tmp_path, "llama")
    tuned, aligned = folders(run)
    configure(aligned, quantization_config={"quant_method": "bitsandbytes"})
    assert "fine-tune with LoRA" in refusal(run)
    (tuned / "model.safetensors").write_bytes((tuned / "model.safetensors").read_bytes()[:-9])
    assert "is damaged" in refusal(run)


def test_models_that_read_other_tokens_are_refused(tmp_path: Path) -> None:
    run = pair(tmp_path, "llama")
    tuned, aligned = folders(run)
    vocabulary = {"a": 0, "b": 1, "c": 2}

    def write(folder: Path, vocab: Any) -> None:
        added = [{"id": 2, "content": "c"}]
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))

    write(aligned, vocabulary)
    write(tuned, {"a": 1, "b": 0, "c": 2})
    assert "2 ids, such as 0 ('b' and 'a')" in refusal(run)
    write(tuned, [["a", 0.0], ["b", -1.0], ["renamed", -2.0], ["new", -3.0]])
    assert RestoreWeights().repair(run) == run.output


def utility_of(curve: dict[float, float], run: Run) -> Callable[[Path], float]:
    """A measure that reads the strength off the weights of a candidate."""
    start, end = (tensors(f)["model.norm.weight"] for f in folders(run))

    def measure(folder: Path) -> float:
        there = tensors(folder)["model.norm.weight"]
        return curve[round(float(((there - start) / (end - start)).mean()), 2)]

    return measure


def test_auto_takes_the_largest_strength_within_the_margin(tmp_path: Path) -> None:
    run = pair(tmp_path, "llama")
    lines: list[str] = []
    run.log = lines.append
    run.measure = utility_of({0.0: 0.80, 0.9: 0.1, 0.7: 0.79, 0.5: 0.6, 0.3: 0.8}, run)
    out = RestoreWeights(strength="auto", grid=(0.3, 0.7, 0.5, 0.9), margin=0.02).repair(run)
    written = json.loads((out / "restore_weights.json").read_text())
    assert written["strength"] == 0.7
    assert [(p["strength"], p["utility"]) for p in written["curve"]] == [(0.0, 0.80), (0.9, 0.1), (0.7, 0.79)]
    assert len(lines) == 3
    assert {f.name for f in tmp_path.iterdir()} == {"aligned", "tuned", "out"}
    assert torch.allclose(load(out).state_dict()[HEAD], expected(run, 0.7)[HEAD], atol=1e-7)


def test_auto_without_a_strength_that_qualifies_says_which_came_closest(tmp_path: Path) -> None:
    run = pair(tmp_path, "llama")
    run.measure = utility_of({0.0: 0.8, 0.9: 0.1, 0.5: 0.5}, run)
    assert "the best was 0.5000 at strength 0.5" in refusal(run, strength="auto", grid=(0.5, 0.9))


def test_auto_needs_a_measure_and_cleans_up_when_it_is_interrupted(tmp_path: Path) -> None:
    run = pair(tmp_path, "llama")
    assert "--data" in refusal(run, strength="auto")

    def interrupted(folder: Path) -> float:
        if folder == run.tuned:
            return 0.5
        raise KeyboardInterrupt

    run.measure = interrupted
    with pytest.raises(KeyboardInterrupt):
        RestoreWeights(strength="auto").repair(run)
    assert {f.name for f in tmp_path.iterdir()} == {"aligned", "tuned"}
    run.measure = lambda _: 42.0
    assert "not between 0 and 1" in refusal(run, strength="auto")


def test_a_used_output_folder_and_missing_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResafeError, match="--aligned"):
        RestoreWeights().repair(Run(output=tmp_path / "out", tuned=tmp_path))
    with pytest.raises(ResafeError, match="fine-tuned model"):
        RestoreWeights().repair(Run(output=tmp_path / "out", aligned=tmp_path))
    with pytest.raises(ResafeError, match="exists already"):
        RestoreWeights().repair(Run(output=Path(__file__).parent, tuned=tmp_path, aligned=tmp_path))


@pytest.mark.parametrize("wrong", [{"strength": 1.5}, {"strength": "most"}, {"grid": ()}, {"grid": (0.0,)}, {"alpha": 0.5}])
def test_parameters_outside_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RestoreWeights(**wrong)
