"""The contract of a back-end: requests in, answers out as they finish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from resafe.rows import Message

if TYPE_CHECKING:
    from resafe.generate import Answer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0; else from softmax(logits / temperature), its top_p nucleus.

    `seed` decides every draw, together with the request, not with what else is in the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    """One conversation to answer. It ends in a user turn, or in an assistant turn that is to be continued (a prefill).

    The answer to a prefilled request is the continuation alone.
    """

    messages: Sequence[Message]
    max_new_tokens: int = 256
    sampling: Sampling = GREEDY


@runtime_checkable
class Backend(Protocol):
    """Answers requests.

    `identity` names everything that could change an answer beside the request (weights, adapter, tokenizer, template,
    dtype, ...); None where that cannot be known, as for a served model: such answers are not reused by other runs.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str | None: ...

    @property
    def template(self) -> str:
        """Short hash of the chat template, which is part of every number; "" where it cannot be known."""
        ...

    def rendered(self, request: Request) -> Sequence[Any]:
        """What the model is sent for a request, JSON-able: token ids, or messages where a server renders them."""
        ...

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """(position in `requests`, answer), each position once, in the order in which they finish.

        A request that got no answer yields `Answer(error=reason)`; an exception ends the stream.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds; it is opened again if it is asked again."""
        ...
