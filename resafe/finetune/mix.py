"""`resafe mix`: the mixture as a file, in the shape of the user's file. For every training tool that reads JSON Lines."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.files import check_absent, write_text
from resafe.finetune import _run
from resafe.finetune._data import safety_for_preferences
from resafe.finetune._encode import in_marks, rendered
from resafe.finetune.mixture import mix, with_mode
from resafe.heldout import overlap
from resafe.mitigation import Run
from resafe.mitigations import Named
from resafe.rows import Row, read_objects
from resafe.shapes import Render, Shape, read, shape_of, write


def mix_file(
    source: str | Path, output: str | Path | None, mitigations: _run.Specs = ("mix_safety",), safety_data: str | None = None,
    mix_mode: str | None = None, seed: int = 0, tokenizer: str | Path | None = None, log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Write the mixture of `source` (JSON Lines) to `output`; None writes nothing (a dry run). Returns rows, added and sha256.

    The user's lines stay as they are; safety rows are written with the same keys. `tokenizer` is a model folder whose chat
    template renders safety rows for files of plain `text`. The hash is the one that `resafe run` and `attach` give for the
    same rows. Raises ResafeError for bad input before anything is written.
    """
    path = Path(source)
    if output is not None:
        check_absent(Path(output))
    named = with_mode(list(mitigations), mix_mode)
    if strange := [m.name for m in named if "data" not in m.mitigation.hooks()]:
        raise ResafeError(f"{strange[0]} does not act on training data, so it cannot be part of a mixed file.")
    examples, lines, shape = _read(path)
    run = _run_for(named, safety_data, seed, log)
    if shape.preference:
        safety_for_preferences(run)
    rows = _conversations(path, examples, shape)
    run.task = rows
    mixture = mix(named, run, rows)
    render = _renderer(path, shape, examples, tokenizer) if mixture.added else None
    written = [lines[e] if isinstance(e, int) else json.dumps(write(e, shape, render), ensure_ascii=False) for e in mixture.entries]
    for suite, prompts in overlap(rows).items():
        log(f"note: {len(prompts)} prompts of the evaluation suite {suite} are in {path}.")
    if output is not None:
        write_text(Path(output), "".join(f"{line}\n" for line in written))
    return {**mixture.facts, "shape": shape.name}


def _read(path: Path) -> tuple[list[Row], list[str], Shape]:
    """(objects, their lines, their one shape). Raises ResafeError naming the first line that differs."""
    objects = read_objects(path)
    first = shape_of(objects[0][1])
    if first is None:
        raise ResafeError(
            f"{path} line {objects[0][0]}: expected messages, conversations, prompt+completion, instruction+output, question+answer, "
            f"prompt+chosen+rejected or text; found {', '.join(sorted(objects[0][1])) or 'nothing'}."
        )
    for number, value, _ in objects:
        if (found := shape_of(value)) is None or found.keys[:2] != first.keys[:2] or found.chat != first.chat:
            raise ResafeError(f"{path} line {number}: its keys are {', '.join(sorted(value)) or 'none'}, unlike the first row's ({first.name}): use one shape.")
    return [o[1] for o in objects], [o[2] for o in objects], first


def _conversations(path: Path, examples: Sequence[Row], shape: Shape) -> list[Row]:
    rows = []
    for number, example in enumerate(examples, 1):
        try:
            rows.append(read(example, shape))
        except ResafeError as error:
            raise ResafeError(f"{path} row {number}: {error}") from None
    return rows


def _run_for(named: Sequence[Named], safety_data: str | None, seed: int, log: Callable[[str], None]) -> Run:
    safety = _run.safety_for(named, safety_data)
    run = Run(
        output=Path(), seed=seed, refusals=safety.refusals if safety else [], contrast=safety.contrast if safety else [], log=log
    )  # fmt: skip
    for m in named:
        m.mitigation.check(m.name, run)
    return run


def _renderer(path: Path, shape: Shape, examples: Sequence[Row], folder: str | Path | None) -> Render | None:
    """What writes safety rows in a chat template's marks, where the user's rows are."""
    if shape.name != "text" and not in_marks(shape, examples):
        return None
    if folder is None:
        what = "whole texts" if shape.name == "text" else "prompts in the marks of a chat template"
        raise ResafeError(f"{path} holds {what}: name the model's folder with --tokenizer, so that safety rows are written in its template too.")
    from resafe.models import load_tokenizer, vet

    return functools.partial(rendered, load_tokenizer(vet(Path(folder))))
