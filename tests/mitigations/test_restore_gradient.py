"""Gradient-guided restoration: which entries are copied and given back, by hand and against autograd, and the rollback by utility."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resafe.errors import ResafeError
from resafe.mitigation import Run
from resafe.mitigations import make
from resafe.mitigations.restore_gradient import to_copy, to_give_back
from resafe.models import load_tokenizer
from resafe.rows import Row
from resafe.sensitivity import prompts
from resafe.weights import merge_into
from tests.mitigations.twins import BENIGN, KINDS, SAFE, inputs, maps, pair, repaired
from tests.weights.models import as_stored, load, logits, tensors

F = torch.tensor([[1.0, 1, 1, 1, 1]])
A = torch.tensor([[0.0, 0, 2, 2, 1]])  # restoring lowers the first two, raises the next two, and does nothing to the last
NONE = torch.zeros(1, 5, dtype=torch.bool)


def test_entries_are_copied_where_descent_leads_to_the_aligned_model_largest_gradients_first() -> None:
    g = torch.tensor([[3.0, 1, -2, 9, 9]])  # descent lowers the first two and the last two, raises the third
    assert to_copy(F, A, g, NONE, 0.2).tolist() == [[True, False, False, False, False]]
    assert to_copy(F, A, g, NONE, 0.4).tolist() == [[True, False, True, False, False]]
    assert to_copy(F, A, g, NONE, 1.0).tolist() == [[True, True, True, False, False]]
    assert to_copy(F, A, g, torch.tensor([[True, False, True, False, False]]), 1.0).tolist() == [[False, True, False, False, False]]
    assert not to_copy(F, A, g * 0, NONE, 1.0).any() and not to_copy(F, A, g, NONE, 0).any()


def test_entries_are_given_back_where_descent_leads_to_the_fine_tuned_model_first() -> None:
    copied = torch.tensor([[True, True, True, True, False]])
    g = torch.tensor([[-1.0, 2, 5, -7, -9]])  # descent leads back to F in the first and the third
    assert to_give_back(F, A, g, copied, 0.25).tolist() == [[False, False, True, False, False]]
    assert to_give_back(F, A, g, copied, 0.5).tolist() == [[True, False, True, False, False]]
    assert to_give_back(F, A, g, copied, 0.6).tolist() == [[True, True, True, False, False]], "a rest is rounded up"
    assert to_give_back(F, A, g, copied, 1.0).tolist() == copied.tolist()
    assert not to_give_back(F, A, g, NONE, 1.0).any()


def reading(folder: Path, grad: bool = False, rows: list[Row] = SAFE) -> Any:
    """(model, mean last hidden state at the ends of the prompts), row by row."""
    model = load(folder)
    batches = prompts(load_tokenizer(folder), [r["messages"][:-1] for r in rows], size=1)
    with torch.set_grad_enabled(grad):
        return model, torch.stack([model(b.ids, output_hidden_states=True).hidden_states[-1][0, -1] for b in batches]).mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_round_copies_the_entries_that_autograd_names(kind: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair(kind, tmp_path, aligned)
    out = maps(tensors(repaired("restore_gradient:rounds=1,rate=0.1", before, tuned, tmp_path / "out")))
    model, h = reading(tuned, grad=True)
    (-torch.nn.functional.cosine_similarity(h, reading(before)[1], dim=0)).backward()
    moved = 0
    a, f, grads, linear = maps(tensors(before)), maps(tensors(tuned)), maps(as_stored(tuned, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})), inputs(tuned, SAFE)
    for name in f:
        if name not in linear:
            assert torch.equal(out[name], f[name]), name
            continue
        g = grads[name]
        scores = torch.where((f[name] - a[name]).sign() == g.sign(), g.abs(), 0).flatten()
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[scores.argsort(descending=True)[: int(0.1 * len(scores))]] = True
        wanted = torch.where((chosen & (scores > 0)).view(g.shape), a[name], f[name])
        assert float((out[name] != wanted).float().mean()) < 0.01, name  # two gradients may be equal up to rounding
        copied = float((out[name] != f[name]).float().mean())
        assert 0.05 < copied <= 0.1 or (copied == 0 and not g.any()), name
        moved += copied > 0
    assert moved > 0.8 * len(linear), "in the last layer an expert may get none of the prompts' last tokens"


@pytest.mark.parametrize("depth", [0.5, 1.0])
def test_harmful_prompts_are_read_more_and_more_as_before(depth: float, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned)
    out = repaired(f"restore_gradient:rounds=4,rate=0.05,depth={depth}", before, tuned, tmp_path / "out")
    curve = json.loads((out / "restore_gradient.json").read_text())["curve"]
    cosines = [c["cosine"] for c in curve]
    assert len(cosines) == 5 and cosines[-1] > cosines[0] + 0.2
    if depth == 1:
        found = torch.nn.functional.cosine_similarity(reading(out)[1], reading(before)[1], dim=0)
        assert float(found) == pytest.approx(cosines[-1], abs=1e-5), "what was saved is what was measured"
    else:
        assert all(torch.equal(v, tensors(tuned)[n]) for n, v in tensors(out).items() if ".layers.1." in n), "the first half only"


def test_utility_within_the_margin_decides_how_much_stays_copied(aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned)
    f, linear = tensors(tuned), inputs(tuned, SAFE)

    def copied(folder: Path) -> float:
        found = tensors(folder)
        return sum(int((found[n] != f[n]).sum()) for n in linear) / sum(f[n].numel() for n in linear)

    def measure(folder: Path) -> float:
        return 1 - copied(folder)  # every copied entry costs

    how = "restore_gradient:rounds=3,rate=0.05,warmup=1"
    free = repaired(f"{how},margin=1", before, tuned, tmp_path / "free", measure=measure, task=BENIGN)
    bound = repaired(f"{how},margin=0.06", before, tuned, tmp_path / "bound", measure=measure, task=BENIGN)
    assert copied(free) > 0.1
    assert 0.03 < copied(bound) <= 0.06 + 1e-6
    with pytest.raises(ResafeError, match="nothing could stay restored"):
        repaired(f"{how},margin=0", before, tuned, tmp_path / "none", measure=measure, task=BENIGN)
    assert len(list(tmp_path.iterdir())) == 4, "no candidate is left over"


@pytest.mark.parametrize(("warmup", "times"), [(0, 5), (1, 4), (3, 2)])
def test_utility_is_first_looked_at_after_the_warmup(warmup: int, times: int, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned)
    seen: list[Path] = []

    def measure(folder: Path) -> float:
        seen.append(folder)
        return 1.0

    repaired(f"restore_gradient:rounds=3,rate=0.05,warmup={warmup}", before, tuned, tmp_path / "out", measure=measure, task=BENIGN)
    assert len(seen) == times, "as fine-tuned, after each round from then on, and at the end"


def test_a_rollback_goes_where_the_fine_tuned_model_read_benign_prompts(aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("llama", tmp_path, aligned)
    answers = iter((1.0, 0.0, 1.0, 1.0))  # as fine-tuned, too low after the first round, and well again
    how = "restore_gradient:rounds=1,rate=0.2,warmup=0,rollback=0.25"
    out = tensors(repaired(how, before, tuned, tmp_path / "out", measure=lambda _: next(answers), task=BENIGN))
    once = repaired("restore_gradient:rounds=1,rate=0.2", before, tuned, tmp_path / "once")
    model, h = reading(once, True, BENIGN)
    (-torch.nn.functional.cosine_similarity(h, reading(tuned, rows=BENIGN)[1], dim=0)).backward()
    a, f, c = tensors(before), tensors(tuned), tensors(once)
    for name in inputs(tuned, SAFE):
        copied = c[name] != f[name]
        back = to_give_back(f[name], a[name], model.get_parameter(name).grad, copied, 0.25)
        assert int(back.sum()) > 0 and float((out[name] != torch.where(copied & ~back, a[name], f[name])).float().mean()) < 0.01, name


def test_a_rollback_without_benign_prompts_is_refused(tmp_path: Path) -> None:
    run = Run(output=tmp_path / "out", aligned=tmp_path, refusals=SAFE, measure=lambda folder: 1.0)
    with pytest.raises(ResafeError, match="a rollback goes by benign prompts"):
        make("restore_gradient").mitigation.check("restore_gradient", run)


def test_a_rate_of_0_changes_nothing(aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair("gpt2", tmp_path, aligned)
    assert torch.equal(logits(repaired("restore_gradient:rate=0,rounds=1", before, tuned, tmp_path / "out")), logits(tuned))


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_merged_first(kind: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair(kind, tmp_path, aligned, lora=True)
    merged = merge_into(before, tuned, tmp_path / "merged")
    out = repaired("restore_gradient:rounds=2", before, tuned, tmp_path / "out")
    full = repaired("restore_gradient:rounds=2", before, merged, tmp_path / "full")
    assert torch.equal(logits(out), logits(full)) and not torch.allclose(logits(out), logits(merged))
