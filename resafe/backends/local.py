"""A model folder on this machine: a full checkpoint, or a LoRA adapter on a base that is loaded once for all its adapters.

The tokenizer is read at once; the weights only when there is something to answer. The text of a greedy answer does not depend on
the batch that it was written in, except where two tokens are equally likely to the last few bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from resafe import chat, models
from resafe.backends import _engine
from resafe.backends._base import Request
from resafe.backends._bases import Bases
from resafe.backends._cache import joinable
from resafe.backends._draw import Job
from resafe.generate import Answer, answers, fitted, room

__all__ = ["Bases", "LocalBackend"]


class LocalBackend:
    """Answers of the model in `folder`, at most `batch_size` at the same time.

    `dtype` is a torch dtype name; "auto" is the stored one on an accelerator and float32 on a CPU. `bases` lends models to
    back-ends that are used one after the other. Raises ResafeError for whatever is wrong with the folder.
    """

    def __init__(self, folder: str | Path, batch_size: int = 64, dtype: str = "auto", bases: Bases | None = None) -> None:
        self.folder = models.vet(Path(folder))
        self.name = self.folder.absolute().name
        self.batch_size, self.dtype = batch_size, dtype
        self._bases, self._shared = (Bases(), False) if bases is None else (bases, True)
        self._home = models.base_of(self.folder) if models.is_adapter(self.folder) else self.folder
        self._tokenizer = models.load_tokenizer(self.folder)
        self._stack = ExitStack()
        self._loaded: models.Loaded | None = None

    @cached_property
    def identity(self) -> str | None:
        """Fingerprint, dtype, kind of device, attention, template, and the engine's version. Not `batch_size`."""
        from resafe.fingerprint import model_fingerprint

        model = self._outline
        way = "joining" if joinable(model) else "fixed"
        return " ".join(
            [
                model_fingerprint(self.folder), _dtype(model.config, self.dtype), _device(), str(model.config._attn_implementation),
                f"template {self.template}", f"engine {_engine.VERSION} {way}",
            ]
        )  # fmt: skip

    @property
    def template(self) -> str:
        """Short hash of the chat template."""
        return chat.template_id(self._tokenizer)

    def rendered(self, request: Request) -> Sequence[Any]:
        """Token ids. A prompt that leaves no room for its answer is cut on the left."""
        return self._job(request).ids

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answers as they finish; the model is loaded first. Leaving early frees the batch."""
        jobs = [self._job(r) for r in requests]
        yield from answers(self._model(), jobs, self.batch_size)

    def close(self) -> None:
        """Let go of the model, or give it back to `bases`. If this is asked again, the model is loaded again."""
        self._loaded = None
        self._stack.close()
        if not self._shared:
            self._bases.close()

    def _job(self, request: Request) -> Job:
        ids = chat.prompt_ids(self._tokenizer, request.messages)
        return fitted(ids, request.max_new_tokens, room(self._config), sampling=request.sampling)

    def _model(self) -> models.Loaded:
        if self._loaded is None:
            adapter = self.folder if models.is_adapter(self.folder) else None
            if adapter and not models.attachable(adapter):
                self._bases.close()
                quantised = getattr(self._config, "quantization_config", None) is not None
                self._loaded = models.load(adapter, self.dtype, merge=not quantised)
            else:
                model = self._stack.enter_context(self._bases.lent(self._home, self.dtype, adapter))
                models.check_vocabulary(self._tokenizer, model, self.folder)
                self._loaded = models.Loaded(model, self._tokenizer, self.folder)
        return self._loaded

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._home, trust_remote_code=False)

    @cached_property
    def _outline(self) -> Any:
        """The model without weights: what kind it is, and how it will attend."""
        import torch
        from transformers import AutoModelForCausalLM

        kind: Any = AutoModelForCausalLM
        with torch.device("meta"):
            return kind.from_config(self._config, trust_remote_code=False)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(config: Any, wanted: str) -> str:
    """The dtype that the weights will have in memory."""
    if wanted != "auto":
        return wanted
    return str(config.dtype or "float32").removeprefix("torch.") if _device() == "cuda" else "float32"
