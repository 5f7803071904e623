"""vLLM needs CUDA, so these tests put a stand-in in its place: the parts of its interface that are used, with the names, the
signatures and the checks of vLLM 0.11 to 0.33, stepping a real model one token at a time."""

import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from resafe import chat, lab
from resafe.backends import Sampling
from resafe.backends._wire import request_seed
from resafe.backends.vllm import VllmBackend, _engine_input
from resafe.errors import ResafeError
from resafe.files import write_json
from resafe.fingerprint import model_fingerprint
from resafe.generate import Answer, generate
from resafe.models import load, load_tokenizer
from tests.backends.test_serve import ask, prompts


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not self.max_tokens or self.max_tokens < 1:
            raise ValueError("sampling")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1 or not self.lora_path:
            raise ValueError("lora")


@dataclass
class Job:
    prompt: list[int]
    params: SamplingParams
    lora: LoRARequest | None
    made: list[int] = field(default_factory=list)


class LLMEngine:
    """At most four requests run at once, those that were added first; each step adds one token to each."""

    def __init__(self, folder: str) -> None:
        self.loaded, self.jobs = load(folder), dict[str, Job]()
        self.seen, self.aborted, self.fail = dict[str, Job](), list[str](), ""

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(request_id, str) or request_id in self.jobs or prompt.get("type") != "token":
            raise TypeError("request")
        room = self.loaded.model.config.max_position_embeddings
        if not 0 < len(prompt["prompt_token_ids"]) < room:
            raise ValueError("prompt too long")
        self.jobs[request_id] = self.seen[request_id] = Job(prompt["prompt_token_ids"], params, lora_request)

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self.jobs.pop(name)
            self.aborted.append(name)

    def has_unfinished_requests(self) -> bool:
        return bool(self.jobs)

    def step(self) -> list[Any]:
        import torch

        outputs = []
        for name, job in list(self.jobs.items())[:4]:
            with torch.inference_mode():
                logits = self.loaded.model(torch.tensor([job.prompt + job.made])).logits[0, -1]
            job.made.append(int(logits.argmax()))
            reason = "stop" if job.made[-1] in (job.params.stop_token_ids or []) else None
            reason = reason or ("length" if len(job.made) == job.params.max_tokens else None)
            if name == self.fail:
                reason = "abort"
            if reason:
                del self.jobs[name]
            one = SimpleNamespace(index=0, text="", token_ids=list(job.made), finish_reason=reason, stop_reason=None)
            if reason or job.params.output_kind is not RequestOutputKind.FINAL_ONLY:
                outputs.append(SimpleNamespace(request_id=name, outputs=[one], finished=reason is not None))
        return outputs


class LLM:
    made: list["LLM"] = []

    def __init__(
        self, model: str, *, tokenizer: str | None = None, trust_remote_code: bool = False, dtype: str = "auto", seed: int = 0,
        generation_config: str = "auto", load_format: str = "auto", enable_lora: bool = False, max_lora_rank: int = 16,
        max_model_len: int | None = None, enforce_eager: bool = False,
    ) -> None:  # fmt: skip
        assert tokenizer is not None and load_tokenizer(Path(tokenizer))
        if max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise ValueError("max_lora_rank")
        self.given = dict(locals())
        self.llm_engine = LLMEngine(model)
        LLM.made.append(self)


def tokens_input(prompt_token_ids: list[int]) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": prompt_token_ids}


MODULES: dict[str, dict[str, Any]] = {
    "vllm": {"LLM": LLM, "__version__": "0.33.0", "__path__": []},
    "vllm.inputs": {"tokens_input": tokens_input},
    "vllm.lora": {"__path__": []},
    "vllm.lora.request": {"LoRARequest": LoRARequest},
    "vllm.sampling_params": {"SamplingParams": SamplingParams, "RequestOutputKind": RequestOutputKind},
}


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in MODULES.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    LLM.made = []


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({}, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": str(lab.resolve("lab")), "r": 12})
    return folder


def test_answers_are_those_of_the_local_model() -> None:
    asked = prompts(10)
    found = dict(VllmBackend(lab.resolve("lab")).stream([ask(p) for p in asked]))
    local = generate(load(lab.resolve("lab")), [[{"role": "user", "content": p}] for p in asked], max_new_tokens=40)
    assert [found[i] for i in range(10)] == local


def test_prompts_are_the_same_tokens_as_everywhere() -> None:
    backend = VllmBackend(lab.resolve("lab"))
    list(backend.stream([request := ask(prompts(1)[0], n=2)]))
    expected = chat.prompt_ids(load_tokenizer(lab.resolve("lab")), request.messages)
    assert LLM.made[0].llm_engine.seen["0"].prompt == expected == backend.rendered(request)


def test_a_prompt_that_leaves_no_room_is_cut_on_the_left() -> None:
    backend = VllmBackend(lab.resolve("lab"))
    request = ask(" ".join(prompts(40)), n=20)
    whole = chat.prompt_ids(load_tokenizer(lab.resolve("lab")), request.messages)
    assert backend.rendered(request) == whole[-236:]  # of 256
    assert len(VllmBackend(lab.resolve("lab"), max_model_len=100).rendered(request)) == 80
    assert next(backend.stream([request]))[1].error == ""


def test_an_older_engine_gets_prompts_as_it_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    vars(sys.modules["vllm.inputs"]).update(TokensPrompt=lambda prompt_token_ids: {"old": prompt_token_ids})
    monkeypatch.delattr(sys.modules["vllm.inputs"], "tokens_input")
    assert _engine_input([1, 2]) == {"old": [1, 2]}


def test_answers_come_as_they_finish() -> None:
    requests = [ask(prompts(1)[0], n=9), ask(prompts(1)[0], n=2), ask(prompts(1)[0], n=4)]
    found = list(VllmBackend(lab.resolve("lab")).stream(requests))
    assert [i for i, _ in found] == [1, 2, 0]
    assert [(a.tokens, a.finished) for _, a in found] == [(2, False), (4, False), (9, False)]


def test_leaving_early_takes_the_rest_back() -> None:
    stream = VllmBackend(lab.resolve("lab")).stream([ask(p, n=3) for p in prompts(8)])
    first = next(stream)[0]
    stream.close()  # type: ignore[attr-defined]
    engine = LLM.made[0].llm_engine
    assert not engine.has_unfinished_requests()
    assert str(first) not in engine.aborted and len(engine.aborted) >= 4


def test_a_request_that_the_engine_drops_is_no_answer() -> None:
    backend = VllmBackend(lab.resolve("lab"))
    backend._llm.llm_engine.fail = "1"
    found = dict(backend.stream([ask(p) for p in prompts(3)]))
    assert found[1] == Answer(error="api_error")
    assert found[0].text and found[2].text


def test_greedy_and_sampled_requests_are_put_as_asked() -> None:
    requests = [ask(prompts(1)[0], n=2), ask(prompts(1)[0], n=2, sampling=Sampling(0.7, 0.9, 5))]
    list(VllmBackend(lab.resolve("lab")).stream(requests))
    greedy, drawn = (LLM.made[0].llm_engine.seen[str(i)].params for i in range(2))
    assert (greedy.temperature, greedy.seed, greedy.max_tokens) == (0.0, None, 2)
    assert (drawn.temperature, drawn.top_p, drawn.seed) == (0.7, 0.9, request_seed(requests[1]))
    assert greedy.stop_token_ids == [load(lab.resolve("lab")).tokenizer.eos_token_id]


def test_nothing_of_the_model_is_trusted_or_taken_for_granted() -> None:
    list(VllmBackend(lab.resolve("lab"), dtype="float32", enforce_eager=True).stream([ask("hello", n=1)]))
    given = LLM.made[0].given
    assert (given["trust_remote_code"], given["load_format"], given["generation_config"]) == (
        False,
        "safetensors",
        "vllm",
    )
    assert (given["dtype"], given["enforce_eager"], given["enable_lora"]) == ("float32", True, False)


def test_an_adapter_is_applied_and_not_merged(adapter: Path) -> None:
    list(VllmBackend(adapter).stream([ask("hello", n=1)]))
    given = LLM.made[0].given
    assert (given["model"], given["enable_lora"], given["max_lora_rank"]) == (str(lab.resolve("lab")), True, 16)
    assert LLM.made[0].llm_engine.seen["0"].lora == LoRARequest("adapter", 1, str(adapter))


def test_ranks_of_single_layers_count_too(adapter: Path) -> None:
    write_json(
        adapter / "adapter_config.json",
        {"base_model_name_or_path": str(lab.resolve("lab")), "r": 4, "rank_pattern": {"q_proj": 33}},
    )
    list(VllmBackend(adapter).stream([ask("hello", n=1)]))
    assert LLM.made[0].given["max_lora_rank"] == 64


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"r": 1024}])
def test_an_adapter_that_vllm_cannot_apply_is_refused(adapter: Path, more: dict[str, Any]) -> None:
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(lab.resolve("lab")), "r": 8, **more})
    with pytest.raises(ResafeError, match="merge it first"):
        VllmBackend(adapter)


def test_the_identity_names_weights_dtype_settings_and_version() -> None:
    folder = lab.resolve("lab")
    backend = VllmBackend(folder, dtype="float16", max_model_len=99)
    assert backend.identity == f"{model_fingerprint(folder)} float16 max_model_len=99 vllm 0.33.0"
    assert backend.template == chat.template_id(load_tokenizer(folder))
    assert LLM.made == []  # the engine does not start for that


def test_without_vllm_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ResafeError, match="pip install 'resafe.vllm.'"):
        VllmBackend(lab.resolve("lab"))
