"""A real NF4 base (bitsandbytes): adapters on it are repaired against the unquantised aligned model; its packed weights are never edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.weights import Adapter
from tests.weights.models import adapt, build, logits, tensors

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(params=["llama", "qwen2", "mistral", "gemma"])
def four(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """(base before alignment, aligned, aligned in 4 bits, LoRA on the 4-bit model)."""
    base, aligned = (build(request.param, tmp_path / n, i, **WIDE) for i, n in enumerate(("base", "aligned")))
    nf4: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)  # type: ignore[no-untyped-call]
    AutoModelForCausalLM.from_pretrained(aligned, quantization_config=nf4, dtype=torch.float32).save_pretrained(tmp_path / "packed")
    return base, aligned, tmp_path / "packed", adapt(tmp_path / "packed", tmp_path / "tuned", 2)


def repair(spec: dict[str, Any], tuned: Path, aligned: Path, base: Path, out: Path) -> Path:
    name, run = next(iter(spec)), Run(output=out, tuned=tuned, aligned=aligned, base=base, refusals=[{"messages": []}])
    mitigation = make(spec).mitigation
    mitigation.check(name, run)
    return mitigation.repair(run)


@pytest.mark.parametrize("method", ["safe_lora", "safe_merge", "resta", "restore_weights"])
def test_an_adapter_on_packed_weights_is_repaired_by_the_formula_and_runs_on_them(method: str, four: tuple[Path, ...], tmp_path: Path) -> None:
    base, aligned, packed, tuned = four
    other = adapt(aligned, tmp_path / "other", 3, r=2)
    spec = {
        "safe_lora": {"threshold": 9, "rank": 3}, "safe_merge": {"threshold": 9, "safe": str(other), "strength": 0.3},
        "resta": {"unaligned": str(other), "strength": 0.3}, "restore_weights": {"strength": 0.3},
    }[method]  # fmt: skip
    before = (packed / "model.safetensors").read_bytes()
    out = repair({method: spec}, tuned, aligned, base, tmp_path / "out")
    one, two, after, a, b = Adapter(tuned), Adapter(other), Adapter(out), tensors(aligned), tensors(base)
    for name, module in one.modules.items():
        d, o = one.delta(module).double(), two.delta(two.modules[name]).double()
        if method == "safe_lora":
            u = torch.linalg.svd((a[name] - b[name]).double(), full_matrices=False).U[:, :3]
            wanted = u @ u.T @ d
        else:
            wanted = {"safe_merge": 0.7 * d + 0.3 * o, "resta": d - 0.3 * o, "restore_weights": 0.7 * d}[method]
        assert torch.allclose(after.delta(after.modules[name]).double(), wanted, atol=1e-5), name
    assert (packed / "model.safetensors").read_bytes() == before
    assert bool(logits(out, packed).isfinite().all()) and not torch.allclose(logits(out, packed), logits(tuned, packed), atol=1e-3)


def test_packed_weights_of_another_model_and_packed_weights_themselves_are_refused(four: tuple[Path, ...], tmp_path: Path) -> None:
    base, aligned, packed, tuned = four
    for name in ("restore_weights", "safe_lora"):
        with pytest.raises(ResafeError, match="whose weights are not those of"):
            repair({name: {}}, tuned, base, aligned, tmp_path / "out")
    for option, models in (("--aligned", (tuned, packed, base)), ("--base", (tuned, aligned, packed))):
        with pytest.raises(ResafeError, match=f"name the unquantised model that it was made from with {option}"):
            repair({"safe_lora": {}}, *models, tmp_path / "out")
    for spec in ({"restore_weights": {}}, {"safe_delta": {}}, {"lox": {}}):
        with pytest.raises(ResafeError, match="4 or 8 bits|is quantised"):
            repair(spec, packed, aligned, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
