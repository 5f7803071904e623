"""vLLM in this process: continuous batching on a GPU, from a local folder. https://docs.vllm.ai (`pip install 'resafe[vllm]'`)

Written against the sources of vLLM 0.11 and 0.33; it has not been run on a GPU. Prompts are rendered by `resafe.chat` and handed over
as token ids, and answers are decoded here, so that both are what the local back-end would have seen and said. An adapter is
applied to its base, not merged. The engine is stepped, not called once, so that answers come out as they finish. In half
precision a greedy answer may differ from the local one where two tokens are equally likely within rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from resafe import chat, models
from resafe.backends._base import Request
from resafe.backends._draw import Job
from resafe.backends._wire import request_seed
from resafe.errors import ResafeError
from resafe.generate import Answer, fitted

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM takes for max_lora_rank


class VllmBackend:
    """Answers of the model in `folder` (a checkpoint or a LoRA adapter).

    `dtype` is "auto" (the stored one), "float16", "bfloat16" or "float32"; `options` go to `vllm.LLM` (such as
    tensor_parallel_size, gpu_memory_utilization, max_model_len). The engine starts with the first stream. Raises ResafeError for
    whatever is wrong with the folder, and where vLLM is not installed.
    """

    def __init__(self, folder: str | Path, dtype: str = "auto", **options: Any) -> None:
        self.folder = models.vet(Path(folder))
        self.name, self.dtype, self._options = self.folder.absolute().name, dtype, options
        self._vllm = _vllm()
        self._base, self._rank = self.folder, 0
        if models.is_adapter(self.folder):
            self._base, self._rank = models.base_of(self.folder), _rank(self.folder)

    @cached_property
    def identity(self) -> str | None:
        """The folder's fingerprint, the dtype, whatever else was said about the engine, and vLLM's version."""
        from resafe.fingerprint import model_fingerprint

        said = "".join(f" {k}={v}" for k, v in sorted(self._options.items()))
        return f"{model_fingerprint(self.folder)} {self.dtype}{said} vllm {self._vllm.__version__}"

    @property
    def template(self) -> str:
        """Short hash of the chat template."""
        return chat.template_id(self._tokenizer)

    def rendered(self, request: Request) -> Sequence[Any]:
        """Token ids; a prompt that leaves no room for its answer is cut on the left."""
        return self._job(request).ids

    def close(self) -> None:
        """Let go of the engine and its memory."""
        import gc

        self.__dict__.pop("_llm", None)
        gc.collect()

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answers as they finish. Leaving early takes back what is still queued."""
        engine, waiting = self._llm.llm_engine, set[str]()
        try:
            for i, request in enumerate(requests):
                job = self._job(request)
                prompt = _engine_input(job.ids)
                engine.add_request(str(i), prompt, self._params(request, job.max_new_tokens), lora_request=self._adapter)
                waiting.add(str(i))
            while waiting:
                ended = [o for o in engine.step() if o.finished]
                waiting.difference_update(o.request_id for o in ended)
                yield from ((int(o.request_id), self._answer(o.outputs[0])) for o in ended)
        finally:
            if waiting:
                engine.abort_request(sorted(waiting))

    def _job(self, request: Request) -> Job:
        """Fitted into the context as on the local back-end."""
        return fitted(chat.prompt_ids(self._tokenizer, request.messages), request.max_new_tokens, self._room)

    def _params(self, request: Request, limit: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        s = request.sampling
        return SamplingParams(
            temperature=s.temperature, top_p=s.top_p, seed=request_seed(request) if s.temperature else None,
            max_tokens=limit, stop_token_ids=self._stops, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip

    def _answer(self, output: Any) -> Answer:
        if output.finish_reason not in ("stop", "length"):
            return Answer(error="api_error")
        ids = list(output.token_ids)
        end = next((n for n, t in enumerate(ids) if t in self._stops), len(ids))
        text = self._tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
        return Answer(text, end, output.finish_reason == "stop")

    @cached_property
    def _llm(self) -> Any:
        lora = {"enable_lora": True, "max_lora_rank": self._rank} if self._rank else {}
        # generation_config="vllm": no sampling default of the model gets past Sampling. Nothing but safetensors is opened.
        return self._vllm.LLM(
            model=str(self._base), tokenizer=str(self._tokens_from), dtype=self.dtype, generation_config="vllm", seed=0,
            load_format="safetensors", trust_remote_code=False, **lora, **self._options,
        )  # fmt: skip

    @cached_property
    def _tokenizer(self) -> Any:
        return models.load_tokenizer(self.folder)

    @property
    def _tokens_from(self) -> Path:
        """Where `_tokenizer` comes from: an adapter's own folder, else its base's."""
        own = any((self.folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json"))
        return self.folder if own else self._base

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._base, trust_remote_code=False)

    @cached_property
    def _room(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        trained = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return int(self._options.get("max_model_len") or trained or 1 << 20)

    @cached_property
    def _stops(self) -> list[int]:
        """Ids that end an answer, as in `resafe.generate`."""
        from transformers import GenerationConfig

        configured = (self._base / "generation_config.json").is_file()
        found: Any = GenerationConfig.from_pretrained(self._base) if configured else self._config
        extra = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
        return sorted({self._tokenizer.eos_token_id, *(e for e in extra if e is not None)})

    @cached_property
    def _adapter(self) -> Any:
        """The request for the adapter; None for a checkpoint."""
        if not self._rank:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.name, 1, str(self.folder.absolute()))


def _rank(adapter: Path) -> int:
    """The smallest `max_lora_rank` that holds an adapter."""
    config = models.read_config(adapter / "adapter_config.json")
    rank = max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    if config.get("use_dora") or config.get("modules_to_save") or not 0 < rank <= RANKS[-1]:
        raise ResafeError(
            f"vLLM cannot apply the adapter in {adapter} (rank {rank}, DoRA or whole modules saved): merge it first."
        )
    return min(r for r in RANKS if r >= rank)


def _engine_input(ids: list[int]) -> Any:
    """A prompt of tokens, as newer engines want it, which deprecate the form that older ones know."""
    try:
        from vllm.inputs import tokens_input
    except ImportError:
        from vllm.inputs import TokensPrompt

        return TokensPrompt(prompt_token_ids=ids)
    return tokens_input(prompt_token_ids=ids)


def _vllm() -> Any:
    try:
        import vllm
    except ImportError:
        raise ResafeError(
            "vLLM is not installed: pip install 'resafe[vllm]', or name the folder without 'vllm:'."
        ) from None
    return vllm
