"""The statistics equal what a direct formula gives, on tiny Llama and GPT-2 (whose weights are stored turned)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resafe import sensitivity
from resafe.errors import ResafeError
from resafe.models import load
from resafe.sensitivity import Batch, GradientMoment, InputMoment
from tests.sensitivity.rows import ROWS
from tests.tiny import tiny
from tests.weights.models import EXPERTS

# One layer of each kind, with its place in the model.
LAYERS = {
    "llama": ("model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj"),
    "gpt2": ("transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_proj"),
}


@pytest.fixture(params=LAYERS)
def model(request: pytest.FixtureRequest, aligned: Path, tmp_path: Path) -> Any:
    """A tiny model in float64."""
    loaded = load(tiny(request.param, tmp_path / request.param, aligned))
    return loaded.model.double(), loaded.tokenizer


def inputs(model: Any, tokenizer: Any, layer: str) -> torch.Tensor:
    """What goes into `layer` at the positions that count, one row at a time: (n, in)."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, args, out: seen.append(args[0][0]))
    batches = sensitivity.answers(tokenizer, ROWS, size=1)
    with torch.no_grad():
        for batch in batches:
            model(batch.ids)
    handle.remove()
    return torch.cat([x[b.counts[0]] for x, b in zip(seen, batches)])


@pytest.mark.parametrize("which", [0, 1])
def test_the_moments_of_inputs_are_those_of_the_direct_formula(model: Any, which: int) -> None:
    net, tokenizer = model
    layer = LAYERS[net.config.model_type][which]
    x = inputs(net, tokenizer, layer)
    batches = sensitivity.answers(tokenizer, ROWS, size=3)
    full = sensitivity.input_moments(net, batches)[f"{layer}.weight"]
    thin = sensitivity.input_moments(net, batches, full=False)[f"{layer}.weight"]
    assert full.count == thin.count == len(x)
    assert torch.allclose(full.total, torch.einsum("ni,nj->ij", x, x), atol=1e-10)
    assert torch.allclose(thin.squares, (x**2).sum(0), atol=1e-10) and torch.allclose(full.squares, thin.squares, atol=1e-10)


def test_in_float32_they_agree_to_one_in_a_million(aligned: Path, tmp_path: Path) -> None:
    loaded = load(tiny("llama", tmp_path / "llama", aligned))
    batches = sensitivity.answers(loaded.tokenizer, ROWS, size=2)
    narrow = sensitivity.input_moments(loaded.model, batches)
    exact = sensitivity.input_moments(loaded.model.double(), batches)
    for name, moment in exact.items():
        assert float((narrow[name].total - moment.total).norm() / moment.total.norm()) < 1e-6, name


def test_layers_with_the_same_input_share_one_sum(aligned: Path, tmp_path: Path) -> None:
    loaded = load(tiny("llama", tmp_path / "llama", aligned))
    found = sensitivity.input_moments(loaded.model, sensitivity.answers(loaded.tokenizer, ROWS))
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"]
    q, k, v, o = (found[n] for n in names)
    assert q is k is v and o is not q
    assert len(found) == 14 and "lm_head.weight" not in found


def test_the_moments_of_gradients_are_those_of_the_direct_formula(model: Any) -> None:
    net, tokenizer = model
    layer = LAYERS[net.config.model_type][0]
    found = sensitivity.gradient_moments(net, sensitivity.answers(tokenizer, ROWS, size=3))[f"{layer}.weight"]
    weight = net.get_submodule(layer).weight
    assert weight.grad is None and found.fisher.shape == weight.shape
    grads = []
    for batch in sensitivity.answers(tokenizer, ROWS, size=1):
        labels = batch.ids.clone()
        labels[0, 1:][~batch.counts[0, :-1]] = -100
        labels[0, 0] = -100
        net(batch.ids, labels=labels).loss.backward()  # the library's own loss
        grads.append(weight.grad.clone())
        net.zero_grad()
    g = torch.stack(grads)
    assert torch.allclose(found.absolute.double(), g.abs().mean(0), rtol=1e-5, atol=1e-9)
    assert torch.allclose(found.fisher.double(), (g**2).mean(0), rtol=1e-5, atol=1e-12)


def test_the_gradient_of_a_direction_is_that_of_autograd_through_all_rows(model: Any) -> None:
    net, tokenizer = model
    asked = [r["messages"][:-1] for r in ROWS]
    target = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    batches = sensitivity.prompts(tokenizer, asked, size=2)
    cosine, found = sensitivity.direction_gradient(net, batches, 1, target)
    states = [net(b.ids, output_hidden_states=True).hidden_states[1][0, -1] for b in sensitivity.prompts(tokenizer, asked, size=1)]
    wanted = torch.nn.functional.cosine_similarity(torch.stack(states).mean(0), target, dim=0)
    (-wanted).backward()
    assert cosine == pytest.approx(wanted.item(), abs=1e-6)
    for name, g in found.items():
        own = net.get_parameter(name).grad
        assert torch.allclose(g, torch.zeros_like(g) if own is None else own, atol=1e-6), name
    assert not found[next(n for n in found if ".1." in n)].any(), "the second block comes after the first's output"


def test_the_hooks_are_gone_also_after_a_failure(model: Any) -> None:
    net, tokenizer = model
    good = sensitivity.answers(tokenizer, ROWS)
    bad = Batch(good[0].ids + 10**6, good[0].attention, good[0].counts)
    with pytest.raises(IndexError):
        sensitivity.input_moments(net, [bad])
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_layer_that_sees_some_of_the_tokens_is_refused(model: Any) -> None:
    net, tokenizer = model
    batch = sensitivity.answers(tokenizer, ROWS)[0]
    wrong = Batch(batch.ids, batch.attention, batch.counts[:, :-1])
    with pytest.raises(ResafeError, match="only some of the tokens"):
        sensitivity.input_moments(net, [wrong])


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_looked_at_one_by_one(kind: str, aligned: Path, tmp_path: Path) -> None:
    loaded = load(tiny(kind, tmp_path / kind, aligned, **EXPERTS[kind]))
    net, name = loaded.model, "model.layers.1.mlp.experts"
    found = sensitivity.input_moments(net, sensitivity.answers(loaded.tokenizer, ROWS, size=3))
    counts = [found[f"{name}.gate_up_proj[{e}]"].count for e in range(3)]
    answered = found["model.layers.1.self_attn.q_proj.weight"].count
    assert sum(counts) == 2 * answered and min(counts) > 0, "each token goes to two of three"
    assert counts == [found[f"{name}.down_proj[{e}]"].count for e in range(3)]
    assert found[f"{name}.gate_up_proj[0]"].total.shape == (16, 16) and found[f"{name}.down_proj[0]"].total.shape == (32, 32)
    gradients = sensitivity.gradient_moments(net, sensitivity.answers(loaded.tokenizer, ROWS))
    assert gradients[f"{name}.down_proj"].fisher.shape == net.get_parameter(f"{name}.down_proj").shape
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_an_expert_that_nothing_was_routed_to_has_no_moments(aligned: Path, tmp_path: Path) -> None:
    loaded = load(tiny("mixtral", tmp_path / "mixtral", aligned, **EXPERTS["mixtral"]))
    router = loaded.model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda m, args, out: (out[0], out[1], out[2].clamp(min=1)))
    found = sensitivity.input_moments(loaded.model, sensitivity.answers(loaded.tokenizer, ROWS))
    assert {f"model.layers.0.mlp.experts.{p}[{e}]" in found for p in ("gate_up_proj", "down_proj") for e in (1, 2)} == {True}
    assert not any(n.startswith("model.layers.0.mlp.experts") and n.endswith("[0]") for n in found)


def test_experts_of_another_kind_are_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", num_local_experts=2, num_experts_per_tok=1, kv_channels=8, **sizes))
    with pytest.raises(ResafeError, match="holds experts whose inputs cannot be told apart"):
        sensitivity.stacks(model)


def test_weights_in_8_bits_are_refused(model: Any) -> None:
    net, _ = model
    layer = net.get_submodule(LAYERS[net.config.model_type][0])
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ResafeError, match="is stored in torch.int8"):
        sensitivity.linears(net)


def test_frozen_weights_have_no_gradient_moments(model: Any) -> None:
    net, tokenizer = model
    with pytest.raises(ResafeError, match="frozen"):
        sensitivity.gradient_moments(net.requires_grad_(False), sensitivity.answers(tokenizer, ROWS))


def test_wanda_and_snip_are_those_of_an_8_by_8_by_hand() -> None:
    torch.manual_seed(0)
    w, x, g = torch.randn(8, 8), torch.randn(5, 8), torch.randn(3, 8, 8)
    moment = InputMoment((x.T @ x).double(), 5)
    gradient = GradientMoment(g.abs().mean(0), (g**2).mean(0))
    for i in range(8):
        for j in range(8):
            norm = sum(float(x[n, j]) ** 2 for n in range(5)) ** 0.5
            assert float(sensitivity.wanda(w, moment)[i, j]) == pytest.approx(abs(float(w[i, j])) * norm, rel=1e-5)
            mean = sum(abs(float(g[n, i, j])) for n in range(3)) / 3
            assert float(sensitivity.snip(w, gradient)[i, j]) == pytest.approx(abs(float(w[i, j])) * mean, rel=1e-5)


def test_the_top_share_of_each_row_is_exact_and_takes_the_first_of_equals() -> None:
    score = torch.tensor([[1.0, 5, 3, 3], [2, 2, 2, 2]])
    assert sensitivity.top_share(score, 0.5).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert sensitivity.top_share(torch.rand(3, 100), 0.29).sum(1).tolist() == [29, 29, 29]
    assert not sensitivity.top_share(score, 0.24).any() and sensitivity.top_share(score, 1).all()


def test_the_hessian_is_damped_and_invertible_also_with_dead_inputs() -> None:
    x = torch.tensor([[1.0, 0, 2], [3, 0, 4]])
    found = sensitivity.hessian(InputMoment((x.T @ x).double(), 2), damp=0.1)
    plain = (x.T @ x).double()  # 2/n = 1
    assert torch.allclose(found, plain + 0.1 * 10 * torch.eye(3, dtype=torch.float64), atol=1e-12)  # mean diagonal 30/3
    assert bool(torch.linalg.inv(found).isfinite().all())
    with pytest.raises(ResafeError, match="zero or not finite"):
        sensitivity.hessian(InputMoment(torch.zeros(3, 3), 2))
