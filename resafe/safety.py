"""Safety rows: hazardous prompts with refusals and, against over-refusal, harmless look-alikes with answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resafe.errors import ResafeError, suggest
from resafe.files import digest, file_digest
from resafe.heldout import drop_overlap
from resafe.rows import Row, key, read_jsonl, user_text

PACK = Path(__file__).parent / "data" / "safety_pack" / "pack.jsonl"
NAMES = ("default", "lab")


@dataclass(frozen=True)
class SafetyRows:
    """Rows to make or keep a model safe with, free of evaluation prompts and of repeated prompts."""

    refusals: list[Row]
    contrast: list[Row]
    source: str  # "default", "lab" or the file
    sha256: str  # of the file's bytes; for the lab, of the generated rows


def load_safety(spec: str | None = None) -> SafetyRows:
    """The shipped pack (None, "default"), the lab's ("lab") or a JSON Lines file; rows of kind "contrast" are contrast.

    Raises ResafeError for a file that can't be read and for one without a usable refusal.
    """
    if spec == "lab":
        return _lab()
    path = PACK if spec is None or spec == "default" else _existing(spec)
    rows = read_jsonl(path)
    contrast = [row for row in rows if row.get("kind") == "contrast"]
    refusals = [row for row in rows if row.get("kind") != "contrast"]
    source = "default" if path == PACK else str(spec)
    return _clean(refusals, contrast, source, file_digest(path))


def _lab() -> SafetyRows:
    from resafe.lab.safety import safety_rows

    refusals, contrast = safety_rows(seed=0)
    return _clean(refusals, contrast, "lab", digest([refusals, contrast]))


def _existing(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    if path.name == spec and not path.suffix:
        raise ResafeError(f"no safety rows named '{spec}' and no such file. {suggest(spec, NAMES)}")
    raise ResafeError(f"no such safety data file: {spec}")


def _clean(refusals: list[Row], contrast: list[Row], source: str, sha256: str) -> SafetyRows:
    """Drop evaluation prompts and all but the first row of each prompt; a prompt can't be both kinds."""
    seen: set[str] = set()
    clean = [_unseen(drop_overlap(rows)[0], seen) for rows in (refusals, contrast)]
    if not clean[0]:
        raise ResafeError(_why_empty(refusals, source))
    return SafetyRows(clean[0], clean[1], source, sha256)


def _why_empty(refusals: list[Row], source: str) -> str:
    if refusals:
        return f"safety data {source}: every refusal's prompt is an evaluation prompt; training on those is not allowed."
    return f"safety data {source} holds no refusals: add hazardous prompts with refusals (rows without kind 'contrast')."


def _unseen(rows: list[Row], seen: set[str]) -> list[Row]:
    kept = []
    for row in rows:
        name = _prompt_key(row)
        if name not in seen:
            seen.add(name)
            kept.append(row)
    return kept


def _prompt_key(row: Row) -> str:
    """The conversation before the answer: equal last questions in different conversations are different prompts."""
    messages = row["messages"][:-1]
    return key(user_text(messages)) if len(messages) == 1 else digest([[m["role"], key(m["content"])] for m in messages])
