"""`resafe repair` on damaged or unfit models: one line on stderr, exit code 2, and nothing that looks like a result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resafe import models
from resafe.cli import main
from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.weights import Checkpoint
from tests.weights.models import adapt, build, configure, rewrite, shard, tensors

Refused = Callable[..., str]
SHARD, INDEX, NORM = "model-00002-of-00003.safetensors", "model.safetensors.index.json", "model.norm.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("originals")
    for seed, name in enumerate(("tuned", "aligned")):
        shard(build("llama", home / name, seed, torch.bfloat16))
        words = {f"w{i}": i for i in range(48)}
        (home / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))
    return home


@pytest.fixture
def refused(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Damage a copy of the fine-tuned model, and repair it: the line that the user sees."""
    home = tmp_path / "home"
    shutil.copytree(originals, home)

    def run(damage: Callable[[Path], object], side: str = "tuned") -> str:
        damage(home / side)
        monkeypatch.setattr("sys.argv", ["resafe", "repair", str(home / "tuned"), "--aligned", str(home / "aligned"), "-m", "restore_weights", "-o", str(home / "out")])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("resafe: ")
        assert not (home / "out").exists()
        assert not [f for f in home.rglob("*.safetensors") if home / "tuned" not in f.parents and home / "aligned" not in f.parents]
        return line

    return run


def put(folder: Path, file: str, values: dict[str, torch.Tensor]) -> None:
    save_file(values, folder / file, metadata={"format": "pt"})


def held(folder: Path, name: str) -> str:
    """The shard that holds a tensor."""
    found: str = json.loads((folder / INDEX).read_text())["weight_map"][name]
    return found


def change(folder: Path, name: str, value: torch.Tensor) -> None:
    """Replace one tensor in its shard."""
    put(folder, held(folder, name), {**load_file(folder / held(folder, name)), name: value})


@pytest.mark.parametrize("head", [b"", b"{", b"\xff" * 8, (10**6).to_bytes(8, "little"), (4).to_bytes(8, "little") + b"null"])
def test_a_corrupt_header_is_refused(refused: Refused, head: bytes) -> None:
    line = refused(lambda folder: (folder / SHARD).write_bytes(head))
    assert SHARD in line and "is damaged" in line


def test_a_truncated_shard_is_refused(refused: Refused) -> None:
    line = refused(lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1]))
    assert SHARD in line and "is damaged" in line


def test_a_missing_shard_is_refused(refused: Refused) -> None:
    line = refused(lambda folder: (folder / SHARD).unlink(), "aligned")
    assert f"{SHARD} is missing" in line


def test_an_index_that_lists_a_tensor_elsewhere_is_refused(refused: Refused) -> None:
    def misplace(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][NORM] = next(f for f in index["weight_map"].values() if f != index["weight_map"][NORM])
        (folder / INDEX).write_text(json.dumps(index))

    assert f"promises tensor {NORM}" in refused(misplace)


def test_a_shard_that_holds_more_than_the_index_lists_is_refused(refused: Refused) -> None:
    def add(folder: Path) -> None:
        put(folder, SHARD, {**load_file(folder / SHARD), "model.old.weight": torch.ones(2)})

    line = refused(add)
    assert f"{SHARD} holds tensor model.old.weight, which" in line


def test_a_shard_that_is_replaced_while_it_is_used_is_refused(originals: Path, tmp_path: Path) -> None:
    home = shutil.copytree(originals / "tuned", tmp_path / "home")
    model = Checkpoint(home)
    before = model.tensor(NORM)
    file = home / held(home, NORM)
    put(home, "fresh", load_file(file))
    (home / "fresh").replace(file)
    with pytest.raises(ResafeError, match="was changed while it was being used"):
        model.tensor(NORM)
    assert Checkpoint(home).tensor(NORM).equal(before)


def test_sums_that_a_narrow_dtype_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    aligned, tuned = (build("llama", tmp_path / n, i, torch.float16) for i, n in enumerate(("aligned", "tuned")))
    base = build("llama", tmp_path / "base", 3, torch.float16)
    with pytest.raises(ResafeError, match="tensor .* would hold NaN or infinity as float16: use a smaller strength"):
        make("lox:strength=1e7").mitigation.repair(Run(output=tmp_path / "out", tuned=tuned, aligned=aligned, base=base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_alpha", None), ("lora_alpha", "x"), ("lora_alpha", float("nan")), ("r", None), ("r", "x"), ("r", 1e400), ("rank_pattern", [1]),
     ("alpha_pattern", {"(": 3}), ("alpha_pattern", {"q_proj": None}), ("alpha_pattern", 7), ("base_model_name_or_path", 5)],
)  # fmt: skip
def test_an_adapter_configuration_with_nonsense_is_refused_in_one_line(key: str, value: object, tmp_path: Path) -> None:
    aligned = build("llama", tmp_path / "aligned", 1)
    tuned = configure(adapt(aligned, tmp_path / "tuned", 2), "adapter_config.json", **{key: value})
    with pytest.raises(ResafeError, match=f"adapter_config.json.*{key}") as found:
        make("restore_weights").mitigation.repair(Run(output=tmp_path / "out", tuned=tuned, aligned=aligned))
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", ["restore_weights:strength=0.5", "resta:strength=0.5", "safe_lora", "lox"])
@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 3}, {"hidden_size": 32}], ids=["deeper", "wider"])
def test_an_adapter_that_does_not_fit_the_base_it_names_is_refused(sizes: dict[str, int], spec: str, tmp_path: Path) -> None:
    base, aligned, other = (build("llama", tmp_path / n, i, **s) for i, (n, s) in enumerate((("base", {}), ("aligned", {}), ("other", sizes))))
    tuned, fits = adapt(other, tmp_path / "tuned", 2), adapt(aligned, tmp_path / "fits", 3)
    configure(tuned, "adapter_config.json", base_model_name_or_path=str(aligned))
    named = [{"resta": {"unaligned": str(tuned)}}, {"resta": {"unaligned": str(fits)}}] if "resta" in spec else [spec]
    for made, started in zip(named, (fits, tuned) if "resta" in spec else (tuned,)):
        with pytest.raises(ResafeError, match="which .* adapts: is this its base|the adapter is of another model"):
            make(made).mitigation.repair(Run(output=tmp_path / "out", tuned=started, aligned=aligned, base=base))
    assert not (tmp_path / "out").exists()


def test_a_second_model_with_more_layers_is_refused(tmp_path: Path) -> None:
    base, aligned, tuned = (build("llama", tmp_path / n, i) for i, n in enumerate(("base", "aligned", "tuned")))
    deep = build("llama", tmp_path / "deep", 3, num_hidden_layers=3)
    for spec, start in (({"resta": {"unaligned": str(deep)}}, base), ({"safe_lora": {}}, deep), ({"lox": {}}, deep)):
        with pytest.raises(ResafeError, match="deep has 9 tensors that .*aligned lacks: model.layers.2"):
            make(spec).mitigation.repair(Run(output=tmp_path / "out", tuned=tuned, aligned=aligned, base=start))
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_base_is_an_adapter_is_refused(tmp_path: Path) -> None:
    aligned = build("llama", tmp_path / "aligned", 1)
    tuned = adapt(aligned, tmp_path / "tuned", 2)
    configure(tuned, "adapter_config.json", base_model_name_or_path=str(tuned))
    with pytest.raises(ResafeError, match="an adapter itself"):
        models.vet(tuned)


def test_an_adapter_with_another_tokenizer_is_refused(originals: Path, tmp_path: Path) -> None:
    aligned = build("llama", tmp_path / "aligned", 1)
    tuned = adapt(aligned, tmp_path / "tuned", 2)
    for folder, words in ((aligned, "xy"), (tuned, "yx")):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {w: i for i, w in enumerate(words)}}, "added_tokens": []}))
    with pytest.raises(ResafeError, match="tokenizers of .* differ"):
        make("restore_weights").mitigation.repair(Run(output=tmp_path / "out", tuned=tuned, aligned=aligned))


def test_an_index_that_points_outside_is_refused_before_any_loader_runs(originals: Path, tmp_path: Path) -> None:
    home = shutil.copytree(originals / "tuned", tmp_path / "home")
    index = json.loads((home / INDEX).read_text())
    index["weight_map"][NORM] = "../aligned/model.safetensors"
    (home / INDEX).write_text(json.dumps(index))
    with pytest.raises(ResafeError, match="not a file of that folder"):
        models.vet(home)


def test_another_shape_is_refused(refused: Refused) -> None:
    line = refused(lambda folder: change(folder, NORM, torch.ones(17)))
    assert f"tensor {NORM} has shape [17]" in line and "[16]" in line


def test_a_vocabulary_of_the_same_size_with_other_tokens_is_refused(refused: Refused) -> None:
    words = {f"w{i}": (i + 1) % 48 for i in range(48)}
    line = refused(lambda folder: (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}})))
    assert "tokenizers" in line and "48 ids" in line


@pytest.mark.parametrize("file", ["vocab.json", "vocab.txt"])
def test_older_tokenizers_are_compared_by_their_tokens_too(refused: Refused, file: str) -> None:
    def old(folder: Path) -> None:
        for side, words in (("tuned", ["a", "c", "b"]), ("aligned", ["a", "b", "c"])):
            home = folder.parent / side
            (home / "tokenizer.json").unlink()
            (home / file).write_text("\n".join(words) if file == "vocab.txt" else json.dumps({w: i for i, w in enumerate(words)}))

    assert "2 ids, such as 1 ('c' and 'b')" in refused(old)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("side", ["tuned", "aligned"])
def test_a_number_that_is_none_is_refused_by_the_tensors_name(refused: Refused, side: str, value: str) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    broken = torch.ones(16, 16, dtype=torch.bfloat16)
    broken[15, 15] = float(value)
    line = refused(lambda folder: change(folder, name, broken), side)
    assert f"tensor {name} in " in line and f"/{side}/" in line and "NaN or infinity" in line


def test_sums_that_overflow_are_no_infinity(originals: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(originals / "tuned", tmp_path / "large")
    change(folder, NORM, torch.full((16,), 3e38, dtype=torch.bfloat16))
    assert bool(Checkpoint(folder).finite(NORM).isfinite().all())


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".quant_state.bitsandbytes__nf4", torch.uint8), (".absmax", torch.float32), (".SCB", torch.float32), ("_scale", torch.float32)]
)
def test_packed_weights_are_refused_with_a_way_out(refused: Refused, suffix: str, kind: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def pack(folder: Path) -> None:
        values = tensors(folder)
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        rewrite(folder, {**values, name: torch.zeros(320, 1, dtype=torch.uint8), name + suffix: torch.zeros(4).to(kind)})

    line = refused(pack)
    assert "is quantised" in line and name in line and "the adapter is edited instead" in line


def test_bytes_in_place_of_a_weight_are_packed_even_without_a_name_for_it(refused: Refused) -> None:
    line = refused(lambda folder: change(folder, "model.layers.0.mlp.up_proj.weight", torch.zeros(40, 8, dtype=torch.uint8)))
    assert "up_proj.weight is U8" in line


def test_a_quantised_configuration_is_refused(refused: Refused) -> None:
    assert "is quantised (mxfp4)" in refused(lambda folder: configure(folder, quantization_config={"quant_method": "mxfp4"}), "aligned")
