"""The model that was loaded last, lent to one back-end at a time: adapters of one base that are evaluated in a row load it once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from resafe import models
from resafe.quiet import quieten


class Bases:
    """Keeps at most one model while nobody uses it, so that two never lie in memory because of this.

    A model that is lent belongs to whoever took it until it comes back; asked for it meanwhile, this loads another copy.
    """

    def __init__(self) -> None:
        self._key: tuple[Path, str] | None = None
        self._model: Any = None

    @contextmanager
    def lent(self, folder: Path, dtype: str, adapter: Path | None = None) -> Iterator[Any]:
        """The model of a full checkpoint, in eval mode, with a LoRA on it while it is lent. Loaded unless it is the one that is kept."""
        key = folder.resolve(), dtype
        model = self._model if self._key == key else None
        self.close()
        if model is None:
            quieten()
            model = models.load_weights(folder, dtype)
        if adapter is None:
            yield model
        else:
            with models.attached(model, adapter) as adapted:
                yield adapted
        self._key, self._model = key, model  # not where something failed: a half-fitted adapter may be in it

    def close(self) -> None:
        """Let go of what is kept."""
        self._key = self._model = None

    def __enter__(self) -> Bases:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
