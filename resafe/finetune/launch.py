"""`resafe run` and `resafe plan`: start the user's command with the hook in its environment, wait, and read the receipts."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from resafe import manifest
from resafe.errors import ResafeError
from resafe.finetune import _run, environment, receipts
from resafe.finetune.inject._resafe_start import EXIT_NOT_APPLIED, RECEIPTS
from resafe.finetune.mixture import with_mode
from resafe.mitigation import Run
from resafe.mitigations import Named

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SENT = 0  # si_code is at most this for a signal that a process sent; the terminal's reaches the command by itself


@dataclass(frozen=True)
class Request:
    """The flags of `resafe run`, validated by `check`."""

    command: tuple[str, ...]
    mitigations: tuple[str, ...]
    safety_data: str | None = None
    mix_mode: str | None = None
    seed: int = 0
    receipts: Path | None = None
    aligned: Path | None = None
    base: Path | None = None
    output: Path | None = None

    def check(self) -> list[Named]:
        """The mitigations; everything that can be known to be wrong before the command runs is an error here."""
        if not self.command:
            raise ResafeError("there is no command to run: put it behind --, as in resafe run --mitigation mix_safety -- python train.py")
        named = with_mode(list(self.mitigations), self.mix_mode)
        if not named:
            raise ResafeError("name at least one mitigation (--mitigation NAME; resafe list shows them).")
        safety = _run.safety_for(named, self.safety_data)
        run = Run(
            output=Path(), seed=self.seed, aligned=self.aligned or Path(), base=self.base, refusals=safety.refusals if safety else [],
            contrast=safety.contrast if safety else [],
        )  # fmt: skip
        for m in named:
            m.mitigation.check(m.name, run)
        _run.guard_entry(run, named)
        if self.output and not _run.repairs(named):
            raise ResafeError(f"--output is for the repaired model, and {', '.join(m.name for m in named)} repairs nothing: the command saves its own.")
        if self.output and self.output.exists():
            raise ResafeError(f"output {self.output} exists already: name another folder, or remove it first.")
        return named


def run(request: Request, log: Callable[[str], None]) -> int:
    """Run the command under its mitigations; the exit code to end with: the command's own, or 3 if nothing was applied.

    A repair goes on from the folder that the command saved. Raises ResafeError, before anything runs, for bad input and for a
    command that already is below another `resafe run`.
    """
    named = request.check()
    if environment.watched():
        return _nested(request, named)
    with _receipts_folder(request.receipts) as folder:
        code = _execute(request, folder, plan=False, task=bool(_run.repairs(named)))
        verdict = receipts.judge(receipts.read(folder))
        failed = any(r["event"] == "failed" for r in receipts.read(folder))
        if code and not failed:
            log(f"the command ended with {_how(code)}; the mitigation had {'' if verdict.applied else 'not '}been applied.")
            return code
        if verdict.problem or code:
            _explain(verdict.problem or "a process of the command failed", request, named, bool(verdict.applied))
            return EXIT_NOT_APPLIED
        for folder_ in verdict.saved:
            _verified(folder_, verdict)
        _summary(verdict, log)
        for place in verdict.sharded:
            log(f"{place} holds FSDP shards, no whole weights. To merge them: {receipts.merge_command(place)}")
        return _repaired(request, named, verdict, folder, log)


def plan(request: Request, log: Callable[[str], None]) -> tuple[int, dict[str, Any] | None]:
    """(exit code, what the run would take), from the user's own command stopped after a few steps; nothing is saved."""
    named = request.check() if request.mitigations else []
    if not request.command:
        request.check()
    with _receipts_folder(None) as folder:
        code = _execute(request, folder, plan=True, task=False)
        found = receipts.read(folder)
        plans = [r for r in found if r["event"] == "plan"]
        if code or not plans:
            problem = receipts.judge(found).problem or "no training was started"
            _explain(problem, request, named, False)
            return (code or EXIT_NOT_APPLIED), None
        first = min(plans, key=lambda r: r["rank"])
        speeds = [p["seconds_per_step"] for p in plans if p["seconds_per_step"]]
        return 0, {**first, "seconds_per_step": mean(speeds) if speeds else None, "processes": len(plans)}


def _nested(request: Request, named: Sequence[Named]) -> int:
    """Below another `resafe run`: the same mitigations are applied once, by the outer one; others are refused."""
    outer = with_mode(environment.mitigations_of(), os.environ.get(environment.MODE))
    safety = environment.placed(request.safety_data) if request.safety_data else None
    same = [m.spec for m in outer] == [m.spec for m in named] and environment.seed_of() == request.seed
    if not same or safety != os.environ.get(environment.SAFETY) or request.output or request.receipts:
        names = ", ".join(m.name for m in outer)
        raise ResafeError(f"this command already runs below a resafe run with {names}: name all mitigations and options in that one, and leave this one out.")
    return _supervised(request.command, dict(os.environ))


@contextmanager
def _receipts_folder(asked: Path | None) -> Iterator[Path]:
    """An empty folder for receipts: the user's, kept; or one that goes away."""
    if asked is None:
        with tempfile.TemporaryDirectory(prefix="resafe-receipts-") as folder:
            yield Path(folder)
        return
    if asked.exists() and (not asked.is_dir() or any(asked.iterdir())):
        raise ResafeError(f"receipts folder {asked} is not empty: receipts of another run would be mixed up with this one's.")
    asked.mkdir(parents=True, exist_ok=True)
    yield asked.absolute()


def _execute(request: Request, folder: Path, plan: bool, task: bool) -> int:
    """The command's exit code; negative for the signal that ended it."""
    given = environment.variables(folder, request.mitigations, request.safety_data, request.mix_mode, request.seed, plan, task)
    env = {**environment.without_inject(os.environ), **given, "PYTHONPATH": environment.with_inject(os.environ.get("PYTHONPATH"))}
    return _supervised(request.command, env, stdout=sys.stderr if plan else None)  # the plan itself is what stdout is for


def _supervised(command: Sequence[str], env: Mapping[str, str], stdout: Any = None) -> int:
    """Run `command`, handing on the signals that are sent to this process alone; its exit code, negative for a signal."""
    watched = {*FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        child = subprocess.Popen(command, env=env, stdout=stdout, preexec_fn=lambda: _unblock(before))
        while child.poll() is None:
            info = signal.sigtimedwait(watched, 1.0)
            if info is not None and info.si_signo != signal.SIGCHLD and info.si_code <= SENT:
                child.send_signal(info.si_signo)
        return int(child.returncode)
    except OSError as error:
        raise ResafeError(f"the command cannot be started: {command[0]}: {error.strerror}.") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unblock(mask: Any) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end(code: int) -> None:
    """End this process as the command ended: with its exit code, or by the signal that ended it."""
    if code >= 0:
        raise SystemExit(code)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has left its own core dump
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
    os.kill(os.getpid(), -code)
    raise SystemExit(128 - code)  # a signal that does not end a process by default


def _how(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {-code}"


def _explain(problem: str, request: Request, named: Sequence[Named], applied: bool) -> None:
    """Why the run does not count, and the way by file."""
    head = "the run does not count" if applied else "the mitigation was NOT applied"
    sys.stderr.write(f"resafe: {head}: {problem}\n")
    if flags := _python_flags(request.command):
        sys.stderr.write(f"resafe: likely cause: python {' '.join(flags)} ignores PYTHONPATH, which the hook comes by.\n")
    if "data" in {h for m in named for h in m.mitigation.hooks()}:
        words = ["resafe", "mix", "DATA.jsonl", "-o", "MIXED.jsonl", *(w for m in request.mitigations for w in ("--mitigation", m))]
        words += ["--safety-data", request.safety_data] if request.safety_data else []
        words += ["--mix-mode", request.mix_mode] if request.mix_mode else []
        words += ["--seed", str(request.seed)] if request.seed else []
        sys.stderr.write(f"resafe: the same by file: {shlex.join(words)}\n")
    sys.stderr.write("resafe: if the command sets PYTHONPATH anew: resafe hook install, in the environment of the training command.\n")
    sys.stderr.flush()


def _python_flags(command: Sequence[str]) -> list[str]:
    """-E, -I, -S of a python in the command, which keep the hook out."""
    found = []
    for word, flags in zip(command, command[1:]):
        if Path(word).name.startswith("python") and flags.startswith("-") and not flags.startswith("--") and set(flags[1:]) & set("EIS"):
            found.append(flags)
    return found


def _verified(folder: Path, verdict: receipts.Verdict) -> None:
    """Note in a folder's manifest that the receipts of its run were complete."""
    entries = manifest.read(folder)
    if entries is not None:
        entries.pop("versions", None)
        manifest.write(folder, {**entries, "receipts": {"verified": True, "world": verdict.applied[0]["world"], "trainings": len(verdict.applied)}})


def _summary(verdict: receipts.Verdict, log: Callable[[str], None]) -> None:
    for r in verdict.applied:
        names = ", ".join(m["name"] for m in r["mitigations"])
        log(f"applied {names} to {r['trainer']}: {r['rows_before']} rows -> {r['rows']}, {r['world']} process{'es' * (r['world'] > 1)}; receipts complete.")


def _repaired(request: Request, named: Sequence[Named], verdict: receipts.Verdict, folder: Path, log: Callable[[str], None]) -> int:
    """Run the repairs in a fresh process on the last folder that was saved; 0, or 3 with what is left to do."""
    fixes = _run.repairs(named)
    if not fixes:
        return 0
    tuned = _final(verdict.saved)
    specs = [s for s in request.mitigations if s.split(":")[0].strip() in {m.name for m in named if {"repair", "guard"} & set(m.mitigation.hooks())}]
    if tuned is None:
        place = verdict.sharded[-1]
        sys.stderr.write(
            f"resafe: {', '.join(m.name for m in fixes)} NOT applied: {place} holds FSDP shards. Merge them, then repair:\n"
            f"  {receipts.merge_command(place)}\n  resafe repair {place} {' '.join('--mitigation ' + s for s in specs)} -o {place}-repaired\n"
        )
        return EXIT_NOT_APPLIED
    output = request.output or _free(tuned.with_name(f"{tuned.name}-repaired"))
    words = [sys.executable, "-c", "from resafe.cli import main; main()", "repair", str(tuned), "-o", str(output), "--seed", str(request.seed)]
    words += [w for s in specs for w in ("--mitigation", s)]
    started = verdict.applied[-1]["aligned"]
    if aligned := request.aligned or started:
        words += ["--aligned", str(aligned)]
    if request.base:
        words += ["--base", str(request.base)]
    if (rows := folder / environment.TASK_FILE).is_file():
        words += ["--data", str(rows)]
    if request.safety_data:
        words += ["--safety-data", request.safety_data]
    log(f"repairing {tuned} with {', '.join(m.name for m in fixes)}")
    code = subprocess.run(words, env=environment.without_inject(os.environ), check=False).returncode
    if code:
        sys.stderr.write(f"resafe: {', '.join(m.name for m in fixes)} NOT applied: the repair of {tuned} ended with {_how(code)}; the fine-tuned model is untouched.\n")
        return EXIT_NOT_APPLIED
    return 0


def _final(saved: Sequence[Path]) -> Path | None:
    """The folder that holds the result: the last one saved that is not a trainer's checkpoint, else the last one."""
    whole = [f for f in saved if not f.name.startswith("checkpoint-")]
    return whole[-1] if whole else saved[-1] if saved else None


def _free(folder: Path) -> Path:
    """`folder`, or with a number behind it the first that does not exist."""
    tries = [folder, *(folder.with_name(f"{folder.name}-{n}") for n in range(2, 1000))]
    return next(f for f in tries if not f.exists())


def exports(request: Request) -> str:
    """Shell lines that do for a whole job script what `resafe run` does for one command."""
    request.check()
    if request.receipts is None:
        raise ResafeError("name a receipts folder that all processes of the job can write to (--receipts DIR).")
    folder = request.receipts / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"  # never the receipts of another job
    given: Mapping[str, str] = environment.variables(folder, request.mitigations, request.safety_data, request.mix_mode, request.seed)
    lines = [f"export {k}={shlex.quote(v)}" for k, v in given.items()]
    lines.append(f'mkdir -p "${RECEIPTS}"')
    lines.append(f'export PYTHONPATH={shlex.quote(str(environment.INJECT))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    lines.append(f'# after the job: resafe receipts "${RECEIPTS}"   (exit code 3: not applied)')
    return "\n".join(lines)
