"""How fast the local back-end's engine writes: against batched `generate`, and against one prompt at a time, interleaved in one run.

    python benchmarks/throughput.py                     # lab model, and a 100M-parameter random Llama on two CPU threads and on one
    python benchmarks/throughput.py --models 7b         # on a GPU: a 7B-shaped Llama with random weights, bfloat16
    python benchmarks/throughput.py --readme            # table -> README.md

"batched" is transformers' own `generate` over the prompts sorted by length, longest first, at the engine's batch size. Every round runs the
three ways one after the other, the order turning from round to round; a ratio is the median over rounds of the ratio within a round, with a
95 % bootstrap interval. "single" answers every sixteenth (lab: eighth, 7b: 32nd) prompt of that order only, since it is slow.

The lab model ends its answers itself. Random weights never do, so each prompt has a length at which its answer ends, the same in all three
ways: drawn once from a log-normal distribution (median 60 tokens, sigma 0.8, at most 256), as refusals are short and compliant answers reach the suites' limit.
Their prompts are random tokens, as many as the prompts of the shipped suites have at four characters each, and 20 for a chat template.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "throughput.json"
BEGIN, END = "<!-- throughput: begin -->", "<!-- throughput: end -->"
WAYS = ("engine", "batched", "single")
SUITES = ("advbench", "xstest_safe", "gsm8k", "ifeval")
MODELS: dict[str, dict[str, Any]] = {
    "lab": {"rows": 600, "batch": 64, "rounds": 9, "stride": 8},
    "100m": {"rows": 192, "batch": 64, "rounds": 3, "stride": 16, "threads": 2, "shape": {"hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 10}},  # needs two idle cores
    "100m-1": {"rows": 192, "batch": 64, "rounds": 3, "stride": 16},
    "7b": {"rows": 1024, "batch": 128, "rounds": 5, "stride": 32, "shape": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}},
}  # fmt: skip
MODELS["100m-1"]["shape"] = MODELS["100m"]["shape"]
TITLES = {"lab": "lab, 0.8M, CPU", "100m": "Llama, 101M, random, CPU, two threads", "100m-1": "the same, one thread", "7b": "Llama, 7B shape, random, GPU"}


def main() -> None:
    """Measure and write the committed JSON, or (with --once) run one way and print its peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["lab", "100m", "100m-1"])
    parser.add_argument("--rounds", type=int, help="default by model")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--once", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.readme:
        readme()
        return
    if args.once:
        Work(args.once[0]).run(args.once[1])
        print(peak_mb())
        return
    from resafe.files import write_json

    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"models": {}}
    found["command"] = "python benchmarks/throughput.py"
    for name in args.models:
        found["models"][name] = measure(name, args.rounds or MODELS[name]["rounds"])
        write_json(RESULT, found)
        print(json.dumps(found["models"][name], indent=2))


class Work:
    """A model, its prompts, and for each the length at which its answer ends."""

    def __init__(self, name: str) -> None:
        import torch

        torch.set_num_threads(MODELS[name].get("threads", 1))
        self.batch, self.stride = MODELS[name]["batch"], MODELS[name]["stride"]
        make = _random if "shape" in MODELS[name] else _lab
        self.model, self.pad, self.stops, jobs = make(name, MODELS[name]["rows"])
        self.jobs = sorted(jobs, key=lambda job: -len(job.ids))

    def run(self, way: str) -> tuple[int, float]:
        """Tokens written and seconds taken."""
        start = time.perf_counter()
        tokens = sum(len(ids) for ids in getattr(self, f"_{way}")())
        return tokens, time.perf_counter() - start

    def _engine(self) -> list[list[int]]:
        from resafe.backends._engine import write

        return [ids for _, ids in write(self.model, self.jobs, self.batch, self.stops, self.pad)]

    def _batched(self) -> list[list[int]]:
        parts = [self.jobs[i : i + self.batch] for i in range(0, len(self.jobs), self.batch)]
        return [ids for part in parts for ids in self._generate(part)]

    def _single(self) -> list[list[int]]:
        return [ids for job in self.jobs[:: self.stride] for ids in self._generate([job])]

    def _generate(self, jobs: Sequence[Any]) -> list[list[int]]:
        """transformers' `generate`; every row ends at its own length or at an end token."""
        import torch

        width, limits = max(len(j.ids) for j in jobs), [j.max_new_tokens for j in jobs]
        device = self.model.device
        ids = torch.tensor([[self.pad] * (width - len(j.ids)) + j.ids for j in jobs], device=device)
        mask = torch.tensor([[0] * (width - len(j.ids)) + [1] * len(j.ids) for j in jobs], device=device)
        ends = torch.tensor(limits, device=device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(limits), do_sample=False, pad_token_id=self.pad,
                eos_token_id=self.stops or None, stopping_criteria=[lambda ids, _: ids.shape[1] - width >= ends],
            )  # fmt: skip
        rows = [row[:limit] for row, limit in zip(out[:, width:].tolist(), limits)]
        return [row[: next((i + 1 for i, t in enumerate(row) if t in self.stops), len(row))] for row in rows]


def _lab(name: str, rows: int) -> tuple[Any, int, list[int], list[Any]]:
    """The aligned lab model on its suites, at most 40 tokens an answer."""
    from resafe import chat, lab
    from resafe.backends._draw import Job
    from resafe.generate import end_tokens
    from resafe.lab import suites
    from resafe.models import load

    loaded = load(lab.resolve("lab"))
    asked = [r["prompt"] for s in ("lab_harm", "lab_skills", "lab_note") for r in suites.suite_rows(s, n=rows // 3)]
    ids = [chat.prompt_ids(loaded.tokenizer, [{"role": "user", "content": text}]) for text in asked]
    return loaded.model, loaded.tokenizer.pad_token_id, end_tokens(loaded), [Job(i, 40) for i in ids]


def _random(name: str, rows: int) -> tuple[Any, int, list[int], list[Any]]:
    """A random Llama, prompts as long as those of the shipped suites, and answers of drawn lengths."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from resafe.backends._draw import Job
    from resafe.eval.suite import load_suite

    rng = np.random.default_rng(0)
    texts = [c.messages[-1]["content"] for s in SUITES for c in load_suite(s, rows // len(SUITES)).cases]
    limits = np.clip(np.exp(rng.normal(np.log(60), 0.8, len(texts))), 1, 256).astype(int).tolist()
    jobs = [Job(rng.integers(3, 32000, 20 + len(t) // 4).tolist(), n) for t, n in zip(texts, limits)]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, pad_token_id=0, bos_token_id=1, eos_token_id=None, **MODELS[name]["shape"])
    if not torch.cuda.is_available():
        return LlamaForCausalLM(config).eval(), 0, [], jobs
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model, 0, [], jobs


def measure(name: str, rounds: int) -> dict[str, Any]:
    """All rounds of one model, then the peak memory of each way in a process of its own."""
    work = Work(name)
    work.run("single")  # the first calls of a process are slower
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens: dict[str, int] = {}
    for k in range(rounds):
        for way in (*WAYS[k % 3 :], *WAYS[: k % 3]):
            tokens[way], seconds = work.run(way)
            speeds[way].append(tokens[way] / seconds)
        print(f"{name}: round {k + 1}/{rounds}: " + ", ".join(f"{w} {speeds[w][-1]:.0f} tokens/s" for w in WAYS), file=sys.stderr, flush=True)
    if tokens["engine"] != tokens["batched"]:
        raise SystemExit(f"the two ways wrote {tokens['engine']} and {tokens['batched']} tokens")
    return {
        "machine": _machine(), "versions": _versions(), "rows": len(work.jobs), "batch": work.batch, "rounds": rounds, "tokens": tokens,
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "prompt_tokens": _spread([len(j.ids) for j in work.jobs]), "tokens_per_s": {w: round(median(v), 1) for w, v in speeds.items()},
        "to_batched": _ratio(speeds["engine"], speeds["batched"]), "to_single": _ratio(speeds["engine"], speeds["single"]),
        "peak_mb": {way: _peak(name, way) for way in WAYS},
    }  # fmt: skip


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median over rounds of the ratio within a round, and its 95 % bootstrap interval."""
    import numpy as np
    from scipy import stats

    ratios = [a / b for a, b in zip(ours, theirs)]
    found = stats.bootstrap((ratios,), np.median, n_resamples=10000, method="percentile", rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return {"median": round(median(ratios), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def _spread(values: list[int]) -> dict[str, float]:
    return {"median": median(values), "max": max(values)}


def _peak(name: str, way: str) -> float:
    command = [sys.executable, __file__, "--once", name, way]
    return round(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]), 1)


def peak_mb() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident (Linux)."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    # Not getrusage: after fork and exec its maximum starts at what the parent held.
    found = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) / 1024


def _machine() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU, {torch.get_num_threads()} thread(s)"


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def readme() -> None:
    """Put the table between its two markers in README.md."""
    from resafe.files import write_text

    file = HERE.parent / "README.md"
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    write_text(file, f"{before}{BEGIN}\n{markdown(json.loads(RESULT.read_text()))}\n{END}{rest.split(END)[1]}")


def markdown(found: dict[str, Any]) -> str:
    """A line per model; what was not measured says so."""
    lines = ["| model | tokens/s | to batched `generate` | to one at a time | peak memory, MB (batched) |", "|---|---|---|---|---|"]
    for name, title in TITLES.items():
        m = found["models"].get(name)
        if m is None:
            lines.append(f"| {title} | not measured | not measured | not measured | not measured |")
            continue
        batched, single = (f"{m[k]['median']:.2f} [{m[k]['low']:.2f}, {m[k]['high']:.2f}]" for k in ("to_batched", "to_single"))
        memory = f"{m['peak_mb']['engine']:.0f} ({m['peak_mb']['batched']:.0f})"
        lines.append(f"| {title} | {m['tokens_per_s']['engine']:.0f} | {batched} | {single} | {memory} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
