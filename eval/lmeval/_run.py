"""Run lm-evaluation-harness on a model folder and read what it measured."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from resafe.errors import ResafeError
from resafe.eval.lmeval._samples import Measured, import_samples

Say = Callable[[str], None]
PROGRESS = re.compile(r"(?:([^%|]*):)?\s*(\d+)%\|")  # of tqdm: what, percent
LOG = "lm_eval.log"


@dataclass(frozen=True)
class Setup:
    """How the harness asks. `few_shot` replaces the tasks' own number of examples.

    `include` is a folder with task files of your own; they may run code (the harness's `!function`).
    """

    few_shot: int | None = None
    chat_template: bool = False
    batch_size: int = 8
    include: Path | None = None


def measure(
    folder: Path,
    tasks: Sequence[str],
    limit: int | None = None,
    log: Say = lambda _: None,
    workdir: Path | None = None,
    setup: Setup = Setup(),
) -> dict[str, Measured]:
    """Suite name (`lmeval:TASK`) -> what the harness measured on a checkpoint or adapter, for every task or group named.

    `limit` takes the first that many samples of each task. Its output stays in a new folder in `workdir`, if given.
    Raises ResafeError when the harness is not installed, fails or measures nothing.
    """
    with ExitStack() as stack:
        if workdir is None:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="resafe-lm-eval-")))
        else:
            workdir.mkdir(parents=True, exist_ok=True)
            output = Path(tempfile.mkdtemp(prefix="lm-eval-", dir=workdir))
        return import_samples(run(folder, tasks, output, limit, log, setup))


def run(
    folder: Path,
    tasks: Sequence[str],
    output: Path,
    limit: int | None = None,
    log: Say = lambda _: None,
    setup: Setup = Setup(),
) -> Path:
    """Let the harness write its results and samples into `output`, beside its log. Returns `output`."""
    if find_spec("lm_eval") is None:
        raise ResafeError("lm-evaluation-harness is not installed: pip install 'resafe[lmeval]'.")
    args = arguments(folder, tasks, output, limit, setup)
    output.mkdir(parents=True, exist_ok=True)
    code, last = _run([sys.executable, "-m", "lm_eval", *args], output / LOG, log)
    if code:
        raise ResafeError(f"lm-evaluation-harness failed on {folder} with exit code {code}: {last}")
    return output


def arguments(folder: Path, tasks: Sequence[str], output: Path, limit: int | None, setup: Setup) -> list[str]:
    """The command line of `lm_eval` 0.4.13."""
    for task in tasks:
        if not re.fullmatch(r"\w[\w.+:-]*", task):
            raise ResafeError(f"'{task}' cannot be the name of a task; `lm-eval ls tasks` prints them.")
    if not tasks:
        raise ResafeError("name at least one task of lm-evaluation-harness; `lm-eval ls tasks` prints them.")
    include = setup.include and setup.include.resolve()
    optional = {"--limit": limit, "--num_fewshot": setup.few_shot, "--include_path": include}
    return [
        *("run", "--model", "hf", "--model_args", _model(folder), "--tasks", *tasks),
        *("--batch_size", str(setup.batch_size), "--log_samples", "--output_path", str(output.resolve())),
        *(part for name, value in optional.items() if value is not None for part in (name, str(value))),
        *(["--apply_chat_template"] if setup.chat_template else []),
    ]


def _model(folder: Path) -> str:
    """`--model_args`: values are quoted as Python literals, so that commas in paths stay in them."""
    from resafe.models import base_of, is_adapter, vet

    vet(folder)
    values = {"pretrained": folder}
    if is_adapter(folder):
        values = {"pretrained": base_of(folder), "peft": folder}
        if (folder / "tokenizer_config.json").is_file():
            values["tokenizer"] = folder
    return ",".join(f"{name}={str(path.resolve())!r}" for name, path in values.items())


def _run(command: list[str], file: Path, log: Say) -> tuple[int, str]:
    """Exit code and last line of a command; its output goes to `file`, and to `log` without most of its progress bars."""
    pipe, last, shown = subprocess.PIPE, "", ("", -1)
    with (
        file.open("w", encoding="utf-8") as copy,
        # no input: nothing that it might ask is answered
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                copy.write(line)
                if not (text := line.strip()):
                    continue
                last = text
                bar = PROGRESS.match(text)
                step = (bar[1] or "", int(bar[2]) // 10) if bar else ("", -1)
                if not bar or step != shown:
                    log(text)
                shown = step
        except BaseException:
            process.kill()
            raise
    return process.returncode, last
