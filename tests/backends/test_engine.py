"""The engine says what a model says on its own, whatever else is in the batch; caches are joined, trimmed and let go of.

Random models run in float64, since float32 noise between batch shapes can swap two tokens that are all but equally likely; those whose
attention computes its softmax in float32 whatever the dtype run in float32, where the mask's lowest number is not infinite.
Every seventh token ends an answer, so that rows leave and enter all the time.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from resafe.backends import Sampling, _batch, _cache, _layers
from resafe.backends._draw import Job
from resafe.backends._engine import write
from resafe.errors import ResafeError
from tests.tiny import GPT2, KINDS, SIZES

VOCABULARY, PAD = 101, 0
STOPS = list(range(3, VOCABULARY, 7))
SLIDING = {"gemma2": {"sliding_window": 6}, "gemma3_text": {"sliding_window": 6}, "mistral": {"sliding_window": 5}}
FLOAT32 = ("gemma2", "bloom")
BLOOM: dict[str, Any] = {"hidden_size": 16, "n_layer": 2, "n_head": 4}


def model_of(kind: str, **changes: Any) -> Any:
    """A random model; every parameter is noise."""
    torch.manual_seed(0)
    sizes = {"gpt2": GPT2, "bloom": BLOOM}.get(kind, SIZES)
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    config = AutoConfig.for_model(kind, **{**sizes, "vocab_size": VOCABULARY, **special, **changes})
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(torch.float32 if kind in FLOAT32 else torch.float64).eval()


def jobs_of(n: int, sampling: Sampling | None = None) -> list[Job]:
    """Prompts of 1 to 23 tokens, with limits of 1 to 25."""
    rng = torch.Generator().manual_seed(1)

    def number(high: int) -> int:
        return int(torch.randint(1, high, (1,), generator=rng))

    return [
        Job([number(VOCABULARY) for _ in range(number(24))], number(26), *([sampling] if sampling else [])) for _ in range(n)
    ]


def singly(model: Any, jobs: Sequence[Job]) -> list[list[int]]:
    """transformers' own greedy answers, one prompt at a time."""
    found = []
    for job in jobs:
        ids = torch.tensor([job.ids])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=job.max_new_tokens, eos_token_id=STOPS, pad_token_id=PAD
        )
        found.append(out[0, len(job.ids) :].tolist())
    return found


def written(model: Any, jobs: Sequence[Job], size: int) -> list[list[int]]:
    """The engine's answers in the order of the jobs, each of which must come once."""
    pairs = list(write(model, jobs, size, STOPS, PAD))
    assert sorted(i for i, _ in pairs) == list(range(len(jobs)))
    return [ids for _, ids in sorted(pairs)]


@pytest.mark.parametrize("kind", [*KINDS, "gemma2", "gemma3_text", "gpt_neox"])
def test_answers_are_those_of_one_prompt_at_a_time(kind: str) -> None:
    model, jobs = model_of(kind, **SLIDING.get(kind, {})), jobs_of(24)
    expected = singly(model, jobs)
    assert _cache.joinable(model) and len({tuple(ids) for ids in expected}) > 12
    for size in (1, 5, 16):
        assert written(model, jobs, size) == expected


@pytest.mark.parametrize("spare", [0, 1, 3])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_answers_do_not_depend_on_the_room_that_a_cache_has_nor_on_what_is_in_it(kind: str, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that was never written is full of NaN here; with little of it, a cache grows again and again."""
    model, jobs = model_of(kind, **SLIDING.get(kind, {})), jobs_of(24)
    expected, roomy = singly(model, jobs), _layers.roomy

    def poisoned(*args: Any) -> torch.Tensor:
        found = roomy(*args)
        found.as_strided((found.untyped_storage().nbytes() // found.element_size(),), (1,)).fill_(torch.nan)
        return found

    monkeypatch.setattr(_layers, "SPARE", spare)
    monkeypatch.setattr(_layers, "roomy", poisoned)
    for size in (5, 16):
        assert written(model, jobs, size) == expected


def test_a_token_is_written_behind_the_others_and_a_prompt_where_one_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both leave the other rows where they are in memory; only a batch that gets larger or smaller is copied."""
    model, copies, joined = model_of("llama"), list[int](), _cache.joined
    monkeypatch.setattr(_cache, "joined", lambda m, parts, width: copies.append(width) or joined(m, parts, width))
    grown, roomy = list[int](), _layers.roomy
    monkeypatch.setattr(_layers, "roomy", lambda *args: grown.append(1) or roomy(*args))
    jobs = [Job([5] * 9, n) for n in (3, 40, 4, 5, 6, 7)]
    list(write(model, jobs, 2, [], PAD))
    layers, readings = 2 * model.config.num_hidden_layers, 5  # keys and values; the first two prompts are read together
    assert len(copies) == 2  # both at the start, and the longest answer when nothing waits any more
    assert sum(grown) == layers * (readings + len(copies))


def test_a_row_that_has_written_much_may_take_the_place_of_a_short_one() -> None:
    """As after memory ran out, when rows are read again with what they have written."""
    model, jobs = model_of("llama"), [Job([5] * 3, 30), Job([6] * 3, 1), Job([7] * 3, 30)]
    rows = [_batch.Row(i, job, written=[8] * 20 * (i == 2)) for i, job in enumerate(jobs)]
    batch, said = _batch.Batch(model, PAD), list[list[int]]()
    for fresh in (rows[:2], rows[2:]):
        for row, token in zip(fresh, batch.refill(fresh)):
            row.add(token, [])
    for _ in range(4):
        for row, token in zip(batch.rows, batch.step()):
            row.add(token, [])
    for row in (rows[0], rows[2]):
        ids = row.job.ids + row.written[: len(row.written) - 5]
        said.append(model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=5, pad_token_id=PAD)[0, len(ids) :].tolist())
    assert batch.rows == [rows[0], rows[2]] and said == [row.written[-5:] for row in (rows[0], rows[2])]


def test_prompts_of_different_length_are_read_apart_once_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_batch.Row(i, Job([1] * n, 1)) for i, n in enumerate([100, 95, 91, 60, 59, 10, 9])]
    assert [len(g) for g in _batch._groups(rows)] == [7]
    monkeypatch.setattr(_batch, "FEW", 100)
    assert [[len(row.job.ids) for row in g] for g in _batch._groups(rows)] == [[100, 95, 91], [60, 59], [10, 9]]
    monkeypatch.setattr(_batch, "READ", 200)
    assert [len(g) for g in _batch._groups(rows)] == [2, 2, 2, 1]


def test_answers_are_those_of_a_model_without_a_cache() -> None:
    """An oracle that shares no code with caches: the whole text is read again for every token."""
    model, jobs = model_of("gemma2", sliding_window=6), jobs_of(6)
    for job, ids in zip(jobs, written(model, jobs, 3)):
        for k, token in enumerate(ids):
            logits = model(torch.tensor([job.ids + ids[:k]]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_long_prompts_are_read_in_parts_to_the_same_effect(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, jobs = model_of(kind, **SLIDING.get(kind, {})), jobs_of(9)
    expected = singly(model, jobs)
    monkeypatch.setattr(_batch, "READ", 7)
    assert written(model, jobs, 4) == expected


def test_a_row_may_fill_the_context_to_the_last_place() -> None:
    model = model_of("gpt2", n_positions=12)
    jobs = [Job([5, 6, 7], 9), Job([8], 2), Job([9, 10], 3), Job([11, 12, 13, 14], 8)]
    longest = [ids for _, ids in sorted(write(model, jobs, 4, [], PAD))]
    assert [len(ids) for ids in longest] == [9, 2, 3, 8]


def test_columns_that_are_padding_for_all_are_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    joined = _cache.joined
    monkeypatch.setattr(_cache, "joined", lambda m, parts, width: widths.append(width) or joined(m, parts, width))
    jobs = [Job([5] * 20, 1), Job([6] * 3, 9), Job([7] * 3, 9), Job([8] * 3, 9)]
    list(write(model_of("llama"), jobs, 2, [], PAD))
    assert widths[0] == 20 and max(widths[1:]) <= 12


@pytest.mark.parametrize(("kind", "changes"), [("bloom", {}), ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})])
def test_models_that_cannot_be_taken_apart_are_asked_in_fixed_batches(kind: str, changes: dict[str, Any]) -> None:
    model, jobs = model_of(kind, **changes), jobs_of(10)
    assert not _cache.joinable(model)
    assert written(model, jobs, 4) == singly(model, jobs)


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma", "bamba"])
def test_states_of_other_kinds_are_not_joined(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind))
    assert not _cache.joinable(model)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_nothing_of_the_generation_config_leaks_into_greedy_answers(kind: str) -> None:
    model, jobs = model_of(kind), jobs_of(6)
    expected = written(model, jobs, 3)
    config = model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.suppress_tokens = 5.0, 2, list(range(50))
    assert singly(model, jobs) != expected, "the settings would have shown"
    assert written(model, jobs, 3) == expected and model.generation_config is config


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_sampled_answers_do_not_depend_on_the_batch(kind: str) -> None:
    model, jobs = model_of(kind), [*jobs_of(10, Sampling(0.8, 0.9, seed=3)), *jobs_of(4)]
    expected = [written(model, [job], 1)[0] for job in jobs]
    assert written(model, jobs, 4) == written(model, jobs, 64) == expected


def test_another_seed_gives_another_sample_and_the_same_one_the_same() -> None:
    model = model_of("llama")
    samples = [tuple(written(model, [Job([4, 5, 6], 12, Sampling(1.0, seed=s))], 1)[0]) for s in (1, 2, 3, 4, 5, 1)]
    assert samples[0] == samples[-1] and len(set(samples)) == 5


def test_a_shorter_limit_gives_the_beginning_of_the_same_sample() -> None:
    model, sampling = model_of("llama"), Sampling(1.0, seed=9)
    (_, long), (_, short) = sorted(write(model, [Job([4, 5], 12, sampling), Job([4, 5], 5, sampling)], 2, [], PAD))
    assert len(long) == 12 and long[:5] == short


def failing(model: Any, calls: set[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let forward passes of `model` run out of memory at the given calls; the list that returned holds the rows of each call."""
    forward, rows = model.forward, list[int]()

    def fake(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        if len(rows) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return forward(*args, **kwargs)

    fake.__wrapped__ = forward  # type: ignore[attr-defined]  # its signature is looked at
    monkeypatch.setattr(model, "forward", fake)
    return rows


@pytest.mark.parametrize("call", [1, 3, 6])
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(kind: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, jobs = model_of(kind), jobs_of(12)
    expected = singly(model, jobs)
    rows = failing(model, {call}, monkeypatch)
    assert written(model, jobs, 8) == expected
    assert max(rows[:call]) == 8 and max(rows[call:]) <= 4


def test_a_single_prompt_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    failing(model, set(range(1, 99)), monkeypatch)
    with pytest.raises(ResafeError, match="single prompt of 3 tokens: CUDA out of memory. Tried to allocate 2 GiB.$"):
        list(write(model, [Job([4, 5, 6], 3)] * 4, 4, STOPS, PAD))


def test_answers_come_as_they_end_and_leaving_early_stops_and_frees_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, caches = model_of("llama"), list[Any]()
    rows = failing(model, set(), monkeypatch)
    joined = _cache.joined

    def watched(*args: Any) -> Any:
        found = joined(*args)
        caches.append(weakref.ref(found))
        return found

    monkeypatch.setattr(_cache, "joined", watched)
    stream = write(model, [Job([4, 5, 6], 2), Job([7, 8, 9], 20)], 2, [], PAD)
    assert next(iter(stream))[0] == 0 and len(rows) == 2
    stream.close()  # type: ignore[attr-defined]
    gc.collect()
    assert len(rows) == 2 and [ref() for ref in caches] == [None]
    assert not torch.is_inference_mode_enabled()
