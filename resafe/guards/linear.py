"""A guard that runs on any CPU: two logistic regressions over hashed words, one for harm and one for refusal.

With `signals`, the refusal head also reads _signals.py, which holds on models that it was not fitted on. Fit your own with
`LinearGuard.fit` on labelled exchanges. A file holds numbers and JSON metadata only (safetensors).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resafe.errors import ResafeError
from resafe.files import digest
from resafe.guards import _features, _signals
from resafe.guards._base import Exchange, Verdict, unscored, valid_score
from resafe.guards._behind import judged
from resafe.guards._clean import clean, split
from resafe.guards._logistic import logistic, sigmoid

if TYPE_CHECKING:
    from resafe.guards._features import Weights
    from resafe.rows import Message

Labelled = tuple[Exchange, int | None, int | None]  # exchange, harm label, refusal label; None leaves a head out
FORMAT = "resafe-linear-guard-2"
TEXT = 12  # words from which what was taken out of a response is looked at as a text of its own


@dataclass(frozen=True)
class LinearGuard:
    """Weights and intercepts of the heads; a score from `threshold` on is harmful. `notes` travel in the file.

    With `alone` the words of the response are read without its conversation. The weights of `refusal` end with those of
    the signals when `signals` is set; two signals read the last user turn in any case, and are silent where there is none.
    """

    weights: Mapping[str, Weights]
    intercepts: Mapping[str, float]
    bits: int
    threshold: float = 0.5
    notes: Mapping[str, Any] = field(default_factory=dict)
    name: str = "linear"
    signals: bool = False
    alone: bool = False
    scale: ClassVar[tuple[float, float] | None] = None
    reads_openings: ClassVar[bool] = True  # a refusal is told by how an answer opens

    @classmethod
    def fit(
        cls,
        rows: Sequence[Labelled],
        *,
        bits: int = 18,
        l2: float = 0.1,
        balanced: bool = True,
        seed: int = 0,
        signals: bool = False,
        alone: bool = False,
    ) -> LinearGuard:
        """Fit on labelled exchanges; a head without labels of both kinds says nothing. `seed` orders the rows.

        `balanced` gives both classes the same total weight, so a score is not the share of harmful rows in the data.
        Raises ResafeError when neither head has labels of both kinds.
        """
        import numpy as np

        if not 8 <= bits <= 24:
            raise ResafeError(f"bits must be between 8 and 24, not {bits}.")
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        labels = {"harm": [rows[i][1] for i in order], "refusal": [rows[i][2] for i in order]}
        if all(len({v for v in found if v is not None}) < 2 for found in labels.values()):
            raise ResafeError("a guard needs rows labelled harmful (1) and rows labelled harmless (0): one kind is missing.")
        exchanges = [rows[i][0] for i in order]
        weights, intercepts = {}, {}
        for head, found in labels.items():
            known = [i for i, v in enumerate(found) if v is not None]
            target = np.array([found[i] for i in known], dtype=np.float64)
            if len(set(target.tolist())) == 2:
                table = _table(head, reading(head, [exchanges[i] for i in known]), bits, signals, alone)
                exact, intercepts[head] = logistic(table, target, l2, balanced)
                weights[head] = exact.astype(np.float16)  # what `save` keeps
        notes = {"rows": len(rows), "l2": l2, "balanced": balanced, "seed": seed}
        return cls(weights, intercepts, bits, notes=notes, signals=signals, alone=alone)

    def only(self, head: str) -> LinearGuard:
        """The same guard with one head; the other says nothing."""
        self._known(head)
        return replace(self, weights={head: self.weights[head]}, intercepts={head: self.intercepts[head]}, name=head)

    @property
    def identity(self) -> str:
        """Names the weights, the features and the threshold."""
        sums = {head: hashlib.sha256(w.tobytes()).hexdigest() for head, w in self.weights.items()}
        whole = digest([sums, dict(self.intercepts), self.bits, self.threshold, _features.VERSION, self.signals and _signals.VERSION, self.alone])
        return f"{self.name} {whole[:12]} features v{_features.VERSION}"

    def scores(self, head: str, exchanges: Sequence[Exchange]) -> list[float]:
        """P(harmful) or P(refusal) of every exchange."""
        return [float(p) for p in sigmoid(self.log_odds(head, exchanges))]

    def log_odds(self, head: str, exchanges: Sequence[Exchange]) -> Any:
        """The log-odds behind `scores`, shape [exchanges]."""
        return highest(head, exchanges, lambda read: self.read_log_odds(head, read))

    def read_log_odds(self, head: str, read: Sequence[Exchange]) -> Any:
        """The log-odds of responses as `reading` left them, shape [read]."""
        self._known(head)
        return _table(head, read, self.bits, self.signals, self.alone) @ self.weights[head].astype("float64") + self.intercepts[head]

    def _known(self, head: str) -> None:
        if head not in self.weights:
            raise ResafeError(f"this guard was fitted without labels for '{head}'.")

    def classify(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Verdicts with scores; an empty response is left unscored."""
        if not exchanges:
            return []
        nothing = [None] * len(exchanges)
        harm = self.scores("harm", exchanges) if "harm" in self.weights else nothing
        refusal = self.scores("refusal", exchanges) if "refusal" in self.weights else nothing
        return [self._verdict(e, h, r) for e, h, r in zip(exchanges, harm, refusal)]

    def _verdict(self, exchange: Exchange, harm: float | None, refusal: float | None) -> Verdict:
        if not exchange[1].strip():
            return unscored("empty")
        if not all(p is None or valid_score(p) for p in (harm, refusal)):
            return unscored("out_of_range")
        return Verdict(None if harm is None else harm >= self.threshold, harm, None if refusal is None else refusal >= 0.5)

    def calibrate(self, rows: Sequence[Labelled], false_positive_rate: float) -> LinearGuard:
        """The guard with the lowest threshold that flags at most this share of the harmless `rows` (held out ones)."""
        harmless = sorted(self.scores("harm", [e for e, h, _ in rows if h == 0]), reverse=True)
        if not harmless or not 0 <= false_positive_rate < 1:
            raise ResafeError("calibration needs rows labelled harmless and a false-positive rate in [0, 1).")
        above = harmless[int(false_positive_rate * len(harmless))]  # this one and all below must pass
        return replace(self, threshold=min(1.0, above + 1e-6))

    def save(self, path: str | Path, **notes: Any) -> Path:
        """Write one safetensors file (half precision); `notes` go into its metadata as JSON."""
        import numpy as np
        from safetensors.numpy import save

        about = {"format": FORMAT, "features": _features.VERSION, "bits": self.bits, "threshold": self.threshold}
        about |= {"signals": self.signals and _signals.VERSION, "alone": self.alone, "intercepts": dict(self.intercepts), "notes": {**self.notes, **notes}}
        tensors = {head: np.ascontiguousarray(w) for head, w in self.weights.items()}
        return _write(Path(path), save(tensors, {"resafe": json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path, name: str = "") -> LinearGuard:
        """Read a file that `save` wrote. Raises ResafeError for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as f:
                about = json.loads((f.metadata() or {})["resafe"])
                weights = {head: f.get_tensor(head) for head in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ResafeError(f"{path} is not a guard file that resafe wrote ({type(error).__name__}: {error}).") from None
        if about["format"] != FORMAT or about["features"] != _features.VERSION or about["signals"] not in (False, _signals.VERSION):
            raise ResafeError(f"{path} was written by another version of resafe ({about['format']}): fit the guard again.")
        fields = {f: about[f] for f in ("intercepts", "bits", "threshold", "notes", "alone")}
        return cls(weights, name=name or Path(path).stem, signals=bool(about["signals"]), **fields)


def reading(head: str, exchanges: Sequence[Exchange]) -> list[Exchange]:
    """What a head reads of the responses. A refusal behind something is one, and makes that no less harmful."""
    read = judged if head == "refusal" else clean
    return [(conversation, read(response)) for conversation, response in exchanges]


def highest(head: str, exchanges: Sequence[Exchange], log_odds: Callable[[list[Exchange]], Any]) -> Any:
    """`log_odds` of what the head reads, shape [exchanges]; of harm also of what was taken out, where that is a text: the higher one."""
    import numpy as np

    if head != "harm":
        return log_odds(reading(head, exchanges))
    conversations, parts = [c for c, _ in exchanges], [split(response) for _, response in exchanges]
    out = np.array(log_odds([(c, left) for c, (left, _) in zip(conversations, parts)]), dtype=float)
    if texts := [i for i, (_, taken) in enumerate(parts) if len(taken.split()) >= TEXT]:
        out[texts] = np.maximum(out[texts], log_odds([(conversations[i], parts[i][1]) for i in texts]))
    return out


def _table(head: str, read: Sequence[Exchange], bits: int, signals: bool, alone: bool) -> Any:
    """Hashed words, for the refusal head followed by the signals where they are asked for: a scipy CSR matrix."""
    words = _features.matrix([([], response) for _, response in read] if alone else read, bits)
    if not signals or head != "refusal":
        return words
    from scipy.sparse import csr_matrix, hstack

    return hstack([words, csr_matrix([_signals.signals(response, _asked(conversation)) for conversation, response in read])], format="csr")


def _asked(conversation: Sequence[Message]) -> str:
    """The last user turn, or nothing."""
    return next((m["content"] for m in reversed(conversation) if m["role"] == "user"), "")


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(fd, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.chmod(tmp, 0o644)
    os.replace(tmp, path)
    return path
