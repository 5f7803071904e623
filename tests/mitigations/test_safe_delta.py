"""Safe Delta: the selection by hand, the compensation by inverting one trailing block of H after another, and the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resafe.mitigations.safe_delta import SafeDelta, compensated, inverse_factor, selected
from resafe.sensitivity import InputMoment
from resafe.weights import merge_into
from tests.mitigations.twins import KINDS, SAFE, inputs, maps, pair, repaired
from tests.weights.models import IDS, loaded_with, logits, tensors

torch.manual_seed(0)
ROWS, COLUMNS = 6, 9
X = torch.randn(40, COLUMNS, dtype=torch.float64)
H = X.T @ X / 20 + 0.05 * torch.eye(COLUMNS, dtype=torch.float64)
A, F = torch.randn(ROWS, COLUMNS, dtype=torch.float64), torch.randn(ROWS, COLUMNS, dtype=torch.float64)
EYE = torch.eye(COLUMNS, dtype=torch.float64)


def test_the_factor_holds_the_conditional_inverse_curvatures() -> None:
    u = inverse_factor(H)
    assert torch.allclose(u.T @ u, torch.linalg.inv(H), atol=1e-10)
    for j in range(COLUMNS):
        assert float(u[j, j] ** 2) == pytest.approx(float(torch.linalg.inv(H[j:, j:])[0, 0]), rel=1e-9)


def test_the_cheapest_entries_are_taken_while_the_budget_lasts() -> None:
    u, d = torch.tensor([1.0, 0.5, 2.0]).double(), torch.tensor([[1.0, 1, 2], [3, 1, 1]]).double()
    # importance 1/u^2 = 1, 4, 1/4; cost d^2/u^2 by column: (1, 9), (4, 4), (1, 1/4). Order: column 2, column 0, column 1.
    budget = 2.5  # (1 + 1/4) + 1 fit, 9 more does not
    strength = budget * 2 * 4096 / 2 / ((1 + 4 + 0.25) / 3)
    assert selected(d, u, strength, 0, 99).tolist() == [[True, False, True], [False, False, True]]
    assert selected(d, u, strength / 2, 0, 99).tolist() == [[False, False, True], [False, False, True]]
    locked = selected(d, u, 1e9, 0.34, 99)  # 2 of 6 entries stay aligned: those of the dearest column
    assert locked.tolist() == [[True, False, True], [True, False, True]]


def test_each_block_has_a_budget_of_its_own_and_more_strength_never_takes_less() -> None:
    u, d = inverse_factor(H).diagonal(), F - A
    one, two = selected(d, u, 300, 0.15, 4), torch.cat([selected(d[:, s], u[s], 300, 0.15, 4) for s in (slice(4), slice(4, 8), slice(8, 9))], 1)
    assert torch.equal(one, two)
    sizes = [int(selected(d, u, s, 0.15, 4).sum()) for s in (0, 1, 10, 100, 1e3, 1e4, 1e9)]
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] == 24 - 3 + 24 - 3 + 6 and len(set(sizes)) >= 4


def one_by_one(tuned: torch.Tensor, aligned: torch.Tensor, chosen: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Optimal Brain Surgeon without a factorisation: fix a column, move all later ones to where the quadratic loss is least."""
    w = aligned.clone()
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        q = torch.where(chosen[:, j], tuned[:, j], w[:, j])
        error = (w[:, j] - q) / inverse[0, 0]
        w[:, j + 1 :] -= torch.outer(error, inverse[0, 1:])
        w[:, j] = q
    return w


@pytest.mark.parametrize("block", [1, 4, 128])
def test_the_compensation_is_that_of_the_surgeon(block: int) -> None:
    chosen = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) < 0.4
    found = compensated(F, A, chosen, inverse_factor(H), block)
    assert torch.allclose(found, one_by_one(F, A, chosen, H), atol=1e-10)
    assert torch.equal(found[chosen], F[chosen]) and not torch.allclose(found[~chosen], A[~chosen], atol=1e-3)


def test_after_one_column_the_later_ones_minimise_the_loss() -> None:
    chosen = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    chosen[:, 2] = True
    delta = compensated(F, A, chosen, inverse_factor(H)) - A
    wanted = -torch.outer((F - A)[:, 2], torch.linalg.solve(H[3:, 3:], H[3:, 2]))
    assert torch.allclose(delta[:, 3:], wanted, atol=1e-10) and not delta[:, :2].any()


def test_an_input_that_is_never_active_costs_nothing_and_gets_nothing_passed_on() -> None:
    x = torch.randn(40, COLUMNS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[:, 3] = 0  # a dead column: without damping H is singular
    moment = InputMoment(x.T @ x, len(x))
    found, taken = SafeDelta(strength=300, locked=0).edit(F, A, moment)
    assert bool(found.isfinite().all()) and torch.equal(found[:, 3], F[:, 3]) and ROWS <= taken < ROWS * COLUMNS
    nothing, _ = SafeDelta(strength=0, locked=0).edit(F, A, moment)
    assert torch.equal(nothing, A), "strength 0: the aligned weights"
    everything, taken = SafeDelta(strength=1e12, locked=0.15, block=COLUMNS).edit(F, A, moment)
    assert taken == ROWS * COLUMNS - int(0.15 * ROWS * COLUMNS) and int((everything == F).sum()) == taken


def test_without_correlations_it_is_a_plain_choice_of_entries() -> None:
    found, taken = SafeDelta(strength=2000, locked=0).edit(F, A, InputMoment(EYE, 2))
    cost = ((F - A) ** 2 * 1.01).flatten().cumsum(0)  # H = 1.01 I: equal importance, so in reading order
    chosen = (cost <= 1.01 * 1000 * ROWS / 4096).view(ROWS, COLUMNS)
    assert taken == int(chosen.sum()) and 0 < taken < ROWS * COLUMNS
    assert torch.allclose(found, torch.where(chosen, F, A), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_weight_is_edited_with_the_aligned_models_inputs(kind: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair(kind, tmp_path, aligned)
    out = repaired("safe_delta:strength=20000,block=16", before, tuned, tmp_path / "out")
    a, f, w, x = maps(tensors(before)), maps(tensors(tuned)), maps(tensors(out)), inputs(before, SAFE)
    assert len(x) >= 8 and x.keys() <= w.keys()
    for name in w:
        if name in x:
            h = 2 * x[name].T @ x[name] / len(x[name])
            h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
            ours, theirs = f[name].double(), a[name].double()
            u = inverse_factor(h)
            wanted = one_by_one(ours, theirs, selected(ours - theirs, u.diagonal(), 20000, 0.15, 16), h)
            close = torch.isclose(w[name].double(), wanted, atol=1e-5)
            assert float(close.double().mean()) > 0.97, name  # an entry at the edge of the budget may fall either way in float32
        else:
            assert torch.equal(w[name], a[name]), name
    assert torch.equal(loaded_with(before, tensors(out))(IDS).logits, logits(out)), "saved and loaded again"


@pytest.mark.parametrize("kind", KINDS)
def test_no_budget_is_the_aligned_model_and_all_of_it_the_fine_tuned_one(kind: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair(kind, tmp_path, aligned)
    a, f = tensors(before), tensors(tuned)
    back = tensors(repaired("safe_delta:strength=0", before, tuned, tmp_path / "back"))
    same = tensors(repaired("safe_delta:strength=1e12,locked=0,others=keep", before, tuned, tmp_path / "same"))
    assert all(torch.equal(back[n], a[n]) and torch.equal(same[n], f[n]) for n in f)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_merged_first(kind: str, aligned: Path, tmp_path: Path) -> None:
    before, tuned = pair(kind, tmp_path, aligned, lora=True)
    merged = merge_into(before, tuned, tmp_path / "merged")
    out = repaired("safe_delta:strength=3000", before, tuned, tmp_path / "out")
    full = repaired("safe_delta:strength=3000", before, merged, tmp_path / "full")
    assert torch.equal(logits(out), logits(full)) and not torch.allclose(logits(out), logits(before))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "full", "merged", "out", "tuned"], "nothing is left over"
