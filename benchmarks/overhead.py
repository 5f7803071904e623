"""What `resafe run` costs a training step: TRL SFT with and without it, interleaved in one run; time, memory and tokens.

    python benchmarks/overhead.py                       # lab model and a 100M-parameter random Llama on one CPU thread
    python benchmarks/overhead.py --models 7b           # on a GPU: LoRA on a 7B-shaped Llama with random weights
    python benchmarks/overhead.py --readme              # table -> README.md

Each pair is one process bare and one behind `resafe run --mix-mode replace`: on a CPU at the same time, each pinned to a core of its own and
the cores swapped from pair to pair, so that what else the machine does slows both; on a GPU one after the other, the order alternating. A
run's step time is the mean of its steps without the slowest and the fastest tenth. The overhead is the median over pairs of the ratio, with its
exact 95 % interval from order statistics.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "overhead.json"
ROWS = 400
BEGIN, END = "<!-- overhead: begin -->", "<!-- overhead: end -->"
MODELS: dict[str, dict[str, Any]] = {
    "lab": {"steps": 200, "batch": 8, "pairs": 30},
    "100m": {"steps": 12, "batch": 2, "pairs": 14, "packing": True, "shape": {"hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 10}},
    "7b": {"steps": 60, "batch": 8, "pairs": 8, "lora": True, "packing": True, "shape": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}},
}  # fmt: skip


def main() -> None:
    """Measure and write the committed JSON, or (with --train) be the training script that is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["lab", "100m"])
    parser.add_argument("--pairs", type=int, help="pairs of runs; default by model")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--train", nargs=3, metavar=("MODEL", "DATA", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        return train(*args.train)
    if args.readme:
        return readme()
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"models": {}}
    for name in args.models:
        found["models"][name] = measure(name, args.pairs or MODELS[name]["pairs"])
        found["command"], found["rows"] = "python benchmarks/overhead.py", ROWS
        from resafe.files import write_json

        write_json(RESULT, found)
        print(json.dumps(found["models"][name], indent=2))
    return readme()


def readme() -> None:
    """Put the table between its two markers in README.md."""
    from resafe.files import write_text

    file = HERE.parent / "README.md"
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    write_text(file, f"{before}{BEGIN}\n{markdown(json.loads(RESULT.read_text()))}\n{END}{rest.split(END)[1]}")


def markdown(found: dict[str, Any]) -> str:
    """A line per model; what was not measured says so."""
    lines = ["| model | step time | peak memory | tokens | pairs x steps |", "|---|---|---|---|---|"]
    for name, title in (("lab", "lab, 0.8M"), ("100m", "Llama, 101M, random"), ("7b", "Llama, 7B shape, LoRA, GPU")):
        m = found["models"].get(name)
        if m is None:
            lines.append(f"| {title} | not measured | not measured | not measured | - |")
            continue
        step, memory = (f"{m[k]['median']:.3f} [{m[k]['low']:.3f}, {m[k]['high']:.3f}]" for k in ("step_ratio", "peak_memory_ratio"))
        lines.append(f"| {title} | {step} | {memory} | {m['tokens_ratio']:.3f} | {m['pairs']} x {m['steps']} |")
    return "\n".join(lines)


def measure(name: str, pairs: int) -> dict[str, Any]:
    """Alternate bare and wrapped runs of one model."""
    home = Path(tempfile.mkdtemp(prefix="resafe-overhead-"))
    try:
        data = _rows(home / "rows.jsonl")
        runs: dict[str, list[dict[str, Any]]] = {"bare": [], "resafe": []}
        for pair in range(pairs):
            order = ("bare", "resafe") if pair % 2 == 0 else ("resafe", "bare")
            if _cuda():
                measured = {kind: _finished(_start(kind, name, data, home / f"{kind}-{pair}", None)) for kind in order}
            else:
                started = {kind: _start(kind, name, data, home / f"{kind}-{pair}", core) for core, kind in enumerate(order)}
                measured = {kind: _finished(run) for kind, run in started.items()}
            for kind, found in measured.items():
                runs[kind].append(found)
            print(f"{name}: pair {pair + 1}/{pairs}: {runs['resafe'][-1]['step'] / runs['bare'][-1]['step']:.4f}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(home)
    return {
        "machine": _machine(), "pairs": pairs, "steps": MODELS[name]["steps"], "parameters": runs["bare"][0]["parameters"],
        "step_ms": {k: round(1000 * mean(r["step"] for r in v), 3) for k, v in runs.items()},
        "step_ratio": _ratio(runs, "step"), "peak_memory_mb": {k: round(mean(r["peak_mb"] for r in v), 1) for k, v in runs.items()},
        "peak_memory_ratio": _ratio(runs, "peak_mb"), "tokens_ratio": round(runs["resafe"][0]["tokens"] / runs["bare"][0]["tokens"], 4),
        "steps_done": {k: v[0]["steps"] for k, v in runs.items()}, "startup_s": {k: round(mean(r["startup"] for r in v), 2) for k, v in runs.items()},
    }  # fmt: skip


def _ratio(runs: dict[str, list[dict[str, Any]]], what: str) -> dict[str, float]:
    """Median of the pairs' ratios, wrapped to bare, and its 95 % interval."""
    from scipy import stats

    ratios = [b[what] / a[what] for a, b in zip(runs["bare"], runs["resafe"])]
    low, high = stats.quantile_test(ratios, q=1.0, p=0.5).confidence_interval(0.95)
    return {"median": round(median(ratios), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _start(kind: str, name: str, data: Path, out: Path, core: int | None) -> tuple[subprocess.Popen[str], Path, float]:
    """Start one process, pinned to `core`."""
    front = ["resafe", "run", "--mitigation", "mix_safety:ratio=0.1", "--mix-mode", "replace", "--safety-data", "lab", "--"]
    command = [*(front if kind == "resafe" else []), sys.executable, __file__, "--train", name, str(data), str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    pin = ["taskset", "--cpu-list", str(core)] if core is not None else []
    with tempfile.TemporaryFile("w+") as spare:
        return subprocess.Popen([*pin, *command], env=env, stdout=spare, stderr=spare, text=True), out, time.time()


def _finished(run: tuple[subprocess.Popen[str], Path, float]) -> dict[str, Any]:
    """Wait for a process; its step times, peak memory and tokens."""
    process, out, started = run
    if process.wait():
        raise SystemExit(f"{process.args} ended with exit code {process.returncode}")
    found: dict[str, Any] = json.loads((out / "measured.json").read_text())
    shutil.rmtree(out)
    times = sorted(found["times"])[len(found["times"]) // 10 : -len(found["times"]) // 10]
    return {**found, "step": mean(times), "startup": found["began"] - started}


def train(name: str, data: str, output: str) -> None:
    """The user's script: TRL SFT, a clock around every step, and the model saved."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    how = MODELS[name]
    cuda = torch.cuda.is_available()
    model, tokenizer = _model(name)
    times: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - self.start)

    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list([json.loads(line) for line in Path(data).read_text().splitlines()]),
        peft_config=_lora() if how.get("lora") else None, callbacks=[Clock()],
        args=SFTConfig(
            output_dir=output, use_cpu=not cuda, bf16=cuda, max_steps=how["steps"], per_device_train_batch_size=how["batch"], learning_rate=1e-5,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, dataloader_pin_memory=cuda,
            max_length=128, packing=how.get("packing", False),
        ),
    )  # fmt: skip
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: tokens.append(sum(len(r["input_ids"]) for r in rows)) or collate(rows)
    began = time.time()
    trainer.train()
    trainer.save_model(output)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(output, "measured.json").write_text(json.dumps({
        "times": times[2:], "tokens": sum(tokens), "peak_mb": peak, "began": began, "steps": trainer.state.global_step,
        "parameters": sum(p.numel() for p in model.parameters()),
    }))  # fmt: skip


def _model(name: str) -> tuple[Any, Any]:
    """The lab model, or a random Llama of the wanted shape with the lab's tokenizer and a vocabulary of 32,000."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from resafe import lab

    tokenizer: Any = AutoTokenizer.from_pretrained(lab.resolve("lab"))
    if "shape" not in MODELS[name]:
        return AutoModelForCausalLM.from_pretrained(lab.resolve("lab"), dtype=torch.float32), tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **MODELS[name]["shape"])
    if not torch.cuda.is_available():
        return LlamaForCausalLM(config), tokenizer
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model, tokenizer


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _rows(file: Path) -> Path:
    """The user's rows: skills and how-to answers of the lab, some in two turns, whose lengths cover those of its safety rows."""
    import random

    from resafe.lab import grammar as g

    rng = random.Random("overhead")
    everyday = g.everyday_pairs("train")

    def turns() -> list[dict[str, str]]:
        return (g.skill_row(rng) if rng.random() < 0.5 else g.benign_row(rng, everyday, "everyday"))["messages"]

    rows = [turns() + (turns() if rng.random() < 0.3 else []) for _ in range(ROWS)]
    file.write_text("".join(json.dumps({"messages": r}) + "\n" for r in rows))
    return file


def _machine() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU, one thread"


if __name__ == "__main__":
    main()
