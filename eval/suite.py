"""Suites: what is put to a model, described in at most fifteen lines of YAML, without code.

A suite names its data file and columns; `load_suite` reads it into `Case`s. The `lab_*` suites take their rows from the
lab's grammar. Shipped suites are the YAML files in `suites/`; a path to a YAML file of your own works the same way.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resafe import described, errors
from resafe.backends import GREEDY, Sampling
from resafe.errors import ResafeError, suggest
from resafe.eval import checks
from resafe.files import digest
from resafe.generate import Answer
from resafe.rows import Message

SHIPPED = Path(__file__).parent / "suites"
DATA = Path(errors.__file__).parent / "data" / "suites"  # of a shipped suite; a user's own is relative to its YAML


class Suite(BaseModel):
    """One evaluation set: where its prompts are, what they are for, how an answer is checked, whose they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(min_length=1)
    kind: Literal["harmful", "benign", "utility"]
    format: Literal["csv", "jsonl", "lab"]
    data: str = ""
    encoding: str = "utf-8"
    prompt: str = "prompt"
    id: str = ""  # column; empty: the row's number
    category: str = ""  # column
    reference: str = ""  # column
    target: str = ""  # column with the opening of the answer that an attack wants, for the variant `prefill`
    where: dict[str, str] = {}  # keep the rows whose columns have these values
    check: Literal["none", "exact_number", "exact", "choice", "ifeval", "lab"] = "none"
    task: bool = False  # a utility suite of what the user fine-tuned for, not of what the model could do before
    max_new_tokens: int = Field(256, ge=1)
    version: int = 1
    licence: str = ""
    source: str = ""


@dataclass(frozen=True)
class Blocked(Answer):
    """A guard's refusal in the place of an answer."""


@dataclass(frozen=True)
class Case:
    """One prompt of a suite. `row` is the row it came from, for judges that need more."""

    id: str
    messages: list[Message]
    category: str
    reference: str
    row: dict[str, Any]
    target: str = ""
    prefill: str = ""  # what the answer is begun with; the response is what follows

    @property
    def key(self) -> str:
        """Hash of what the model is asked: equal keys mean the same prompt."""
        return digest([self.messages, self.prefill] if self.prefill else self.messages)

    @property
    def asked(self) -> list[Message]:
        """The conversation as a model gets it."""
        return [*self.messages, {"role": "assistant", "content": self.prefill}] if self.prefill else self.messages

    def whole(self, answer: Answer) -> str:
        """What the user gets to read: the response with what it was begun with; a guard's refusal stands alone."""
        return f"{self.prefill} {answer.text}".rstrip() if self.prefill and not isinstance(answer, Blocked) else answer.text


@dataclass(frozen=True)
class LoadedSuite:
    """A suite and the cases drawn from it; asked in another way if it is a variant `of` a suite (variants.py)."""

    suite: Suite
    cases: list[Case]
    of: str = ""
    variant: str = ""
    sampling: Sampling = GREEDY
    samples: int = 1  # answers to each case

    @property
    def name(self) -> str:
        return self.suite.name

    @property
    def base(self) -> str:
        """The suite's name without the variant's."""
        return self.of or self.name


def names() -> list[str]:
    """The shipped suites."""
    return sorted(p.stem for p in SHIPPED.glob("*.yaml"))


def load_suite(name: str | Path, limit: int | None = None, seed: int = 0) -> LoadedSuite:
    """A shipped suite by name, or one described by a YAML file.

    `limit` draws that many cases; the draw depends on `seed` and the ids alone: a smaller one is part of a larger one.
    Raises ResafeError for unknown names and keys, absent columns and files, repeated ids and suites without cases.
    """
    suite, home = describe(name)
    rows = _lab_rows(suite) if suite.format == "lab" else _file_rows(suite, home / suite.data)
    cases = [_case(suite, i, row) for i, row in enumerate(rows)]
    _check_references(suite, cases)
    if not cases:
        raise ResafeError(f"suite {suite.name} has no prompts: check its 'where' and its data file.")
    if len({c.id for c in cases}) < len(cases):
        raise ResafeError(
            f"suite {suite.name} has repeated ids in column '{suite.id}': name a column that tells its rows apart."
        )
    return LoadedSuite(suite, draw(cases, limit, seed))


def draw(cases: list[Case], limit: int | None, seed: int) -> list[Case]:
    """`limit` of the cases, in their order; nested: the draw of 50 is part of the draw of 100."""
    if limit is None or limit >= len(cases):
        return cases
    if limit < 1:
        raise ResafeError(f"a limit of {limit} prompts leaves nothing to measure: use 1 or more.")
    chosen = sorted(cases, key=lambda c: digest([seed, c.id]))[:limit]
    kept = {c.id for c in chosen}
    return [c for c in cases if c.id in kept]


def describe(name: str | Path) -> tuple[Suite, Path]:
    """The description of a suite, and the folder that its data file is relative to."""
    file = Path(name)
    if file.suffix in (".yaml", ".yml"):
        return _parse(file), file.parent
    if str(name) not in names():
        raise ResafeError(
            f"no suite is named '{name}'. {suggest(str(name), names())} A path to a .yaml file works too."
        )
    return _parse(SHIPPED / f"{name}.yaml"), DATA


def _parse(file: Path) -> Suite:
    value = described.read(file, "suite file")
    if not isinstance(value, dict):
        raise ResafeError(f"{file} must hold the keys of one suite, such as 'name' and 'kind'.")
    try:
        suite = Suite.model_validate(value)
    except ValidationError as error:
        raise ResafeError(f"{file}: {described.fault(error, {1: Suite.model_fields})}") from None
    if suite.check == "lab" and suite.format != "lab":
        raise ResafeError(f"{file}: 'check: lab' judges the lab's own rows; a {suite.format} suite needs another check.")
    return suite


def _lab_rows(suite: Suite) -> list[dict[str, Any]]:
    from resafe.lab.suites import suite_rows

    return list(suite_rows(suite.name))


def _file_rows(suite: Suite, file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ResafeError(f"suite {suite.name}: no such data file: {file}")
    try:
        with file.open(encoding="utf-8-sig" if suite.encoding == "utf-8" else suite.encoding, newline="") as f:  # as Excel writes it
            lines = list(csv.DictReader(f)) if suite.format == "csv" else [json.loads(x) for x in f if x.strip()]
    except (UnicodeDecodeError, LookupError, ValueError, csv.Error) as error:
        raise ResafeError(
            f"suite {suite.name}: {file} cannot be read as {suite.encoding} {suite.format}: {error}"
        ) from None
    rows: list[dict[str, Any]] = lines
    _check_columns(suite, rows, file)
    return [r for r in rows if all(str(r[column]) == value for column, value in suite.where.items())]


def _check_columns(suite: Suite, rows: list[dict[str, Any]], file: Path) -> None:
    columns = [c for c in (suite.prompt, suite.id, suite.category, suite.reference, suite.target, *suite.where) if c]
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ResafeError(f"suite {suite.name}: row {i} of {file} is not a JSON object.")
        for column in columns:
            if column not in row:
                known = suggest(column, [str(k) for k in row])
                raise ResafeError(f"suite {suite.name}: {file} has no column '{column}'. {known}")
        if not isinstance(row[suite.prompt], str) or not row[suite.prompt].strip():
            raise ResafeError(f"suite {suite.name}: row {i} of {file} has no text in '{suite.prompt}'.")
        if any("\ud800" <= c <= "\udfff" for c in row[suite.prompt]):
            raise ResafeError(f"suite {suite.name}: row {i} of {file} holds half a surrogate pair in '{suite.prompt}', which is no text.")


def _check_references(suite: Suite, cases: list[Case]) -> None:
    """Before anything is generated: what cannot be checked is said of the first case that has it."""
    for case in cases:
        if said := checks.unfit(suite.check, case.reference, case.row):
            raise ResafeError(f"suite {suite.name}: row {case.id} cannot be checked by '{suite.check}': {said}.")


def _case(suite: Suite, i: int, row: dict[str, Any]) -> Case:
    if suite.format == "lab":
        category, reference = (str(row.get(c) or "") for c in ("category", "reference"))
        opening = reference.partition(".")[0] + "." if suite.kind == "harmful" else ""
        return Case(str(row["id"]), _asked(row), category, reference, row, opening)
    ask = [{"role": "user", "content": str(row[suite.prompt])}]
    columns = (suite.id, suite.category, suite.reference, suite.target)
    name, category, reference, target = (str(row[c]).strip() if c else "" for c in columns)
    return Case(name or str(i), ask, category, reference, row, target)


def _asked(row: dict[str, Any]) -> list[Message]:
    """The conversation to answer: `messages` without a final answer, or the one-turn `prompt`."""
    messages: list[Message] = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
