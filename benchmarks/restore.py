"""How fast weights are restored: against copying the same bytes, mergekit, and averaging whole models in memory, interleaved in one run.

    python benchmarks/restore.py                                    # 1, 2 and 4 GB, three rounds
    python benchmarks/restore.py --mergekit VENV/bin/python         # with a Python that has mergekit (it pins its own packages)
    python benchmarks/restore.py --sizes 4 --ways cp restore_weights resta --work FOLDER

The checkpoints are random bfloat16 Llamas in shards of half a gigabyte: an aligned model, a fine-tuned and an unaligned one. Every way is a
process of its own; its clock runs from after its imports until its output is flushed to disk (fsync), and its peak memory is the process's
largest resident set, in which a memory map counts. Before every timed run the inputs' state in the page cache is the same for all ways: read
once from end to end ("warm"), or dropped with posix_fadvise ("cold"); and as much memory as the output takes is touched and given back,
since a virtual machine's first touch of a page costs several times the copy into it. The order of the ways turns from round to round. A ratio is the median
over rounds of the ratio within a round; speed is output bytes per second. `cp` reads one model, an interpolation two, task arithmetic three.

Ways: `cp` of the fine-tuned checkpoint; `restore_weights` and `resta` (full repair with its checks for NaN and for the tokenizer);
mergekit's `linear` and `task_arithmetic`, which compute the same two things; `in_memory`, two models loaded with transformers, averaged
in float32 parameter by parameter, and saved. What each wrote is compared with the formula on sampled tensors.

"safe_lora" is the time for C B, C = V V^T / ||V||_F, at d x d: dense, with C formed, against V (V^T B) / ||V||_F.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "restore.json"
MODELS = ("aligned", "tuned", "unaligned")
READS = {"cp": ("tuned",), "restore_weights": MODELS[:2], "resta": MODELS, "mergekit_linear": MODELS[:2], "mergekit_task_arithmetic": MODELS, "in_memory": MODELS[:2]}  # fmt: skip
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000}
GB = 10**9
PAGE = HERE.parent / "mitigations" / "README.md"
BEGIN, END = "<!-- restore: begin -->", "<!-- restore: end -->"
NAMES = {"mergekit_linear": "mergekit, linear", "mergekit_task_arithmetic": "mergekit, task arithmetic", "in_memory": "both models loaded with transformers"}


def main() -> None:
    """Measure and write the committed JSON, or (with --way) be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 2, 4], metavar="GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", nargs="+", choices=("warm", "cold"), default=["warm"])
    parser.add_argument("--ways", nargs="+", choices=sorted(READS), default=list(READS))
    parser.add_argument("--mergekit", metavar="PYTHON", help="interpreter of an environment that has mergekit")
    parser.add_argument("--work", type=Path, help="where the checkpoints are put, and deleted [default: the temporary folder]")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="only put the committed numbers into mitigations/README.md")
    parser.add_argument("--way", nargs=3, metavar=("WAY", "MODELS", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return child(args.way[0], Path(args.way[1]), Path(args.way[2]))
    if args.table:
        return page()
    from resafe.files import write_json

    found: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"safe_lora": safe_lora(), "runs": {}}
    ways = [w for w in args.ways if args.mergekit or not w.startswith("mergekit")]
    for size in args.sizes:
        home = Path(tempfile.mkdtemp(prefix="resafe-restore-", dir=args.work))
        try:
            for seed, name in enumerate(MODELS):
                build(home / name, size, seed)
            for cache in args.cache:
                run = measure(home, size, args.rounds, cache, ways, args.mergekit)
                found["runs"][f"{size:g} GB, {cache}"] = {"command": command(args), "machine": machine(args.mergekit), **run}
        finally:
            shutil.rmtree(home)
        write_json(args.output, found)
    print(json.dumps(found, indent=2))
    return None


def page() -> None:
    """Put the table between its two markers."""
    from resafe.files import write_text

    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    write_text(PAGE, f"{before}{BEGIN}\n{markdown(json.loads(RESULT.read_text()))}\n{END}{rest.split(END)[1]}")


def markdown(found: dict[str, Any]) -> str:
    """A line per size and way."""
    lines = ["| checkpoint | way | GB/s | speed to `cp` | by round | peak memory, MB |", "|---|---|---|---|---|---|"]
    for run in sorted(found["runs"].values(), key=lambda r: r["gb"]):
        copied = run["ways"]["cp"]["seconds"]
        for i, (way, w) in enumerate(run["ways"].items()):
            rounds = ", ".join(f"{c / s:.2f}" for c, s in zip(copied, w["seconds"]))
            size = f"{run['gb']:.1f} GB" if i == 0 else ""
            lines.append(f"| {size} | {NAMES.get(way, f'`{way}`')} | {w['gb_per_s']:.2f} | {w['speed_to_cp']:.2f} | {rounds} | {w['peak_mb']} |")
    return "\n".join([*lines, "| 7B, GPU | | not measured | not measured | | not measured |"])


def command(args: argparse.Namespace) -> str:
    """What to type for the same measurement elsewhere."""
    some = [] if set(args.ways) == set(READS) else ["--ways", *args.ways]
    words = ["python benchmarks/restore.py --sizes", *(f"{s:g}" for s in args.sizes), f"--rounds {args.rounds} --cache", *args.cache, *some]
    return " ".join(words + ["--mergekit VENV/bin/python"] * bool(args.mergekit))


def machine(mergekit: str | None) -> dict[str, Any]:
    """Where the numbers come from."""
    packages = {p: version(p) for p in ("torch", "transformers", "safetensors")}
    return {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB, 1), "packages": packages,
        "mergekit": _mergekit_version(mergekit),
    }  # fmt: skip


def _mergekit_version(python: str | None) -> str:
    if python is None:
        return "not measured"
    code = "from importlib.metadata import version as v; print(v('mergekit'), 'with torch', v('torch'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def build(folder: Path, size: float, seed: int) -> Path:
    """A random bfloat16 Llama of about `size` GB, in shards of half a gigabyte."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    config = {**SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": _layers(size), "tie_word_embeddings": False, "dtype": "bfloat16", "torch_dtype": "bfloat16", "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, Any]] = [{}]
    files, places = 0, {}

    def save() -> None:
        nonlocal files
        files += 1
        file = f"model-{files:05d}.safetensors"
        places.update(dict.fromkeys(shards[0], file))
        save_file(shards[0], folder / file, metadata={"format": "pt"})
        shards[0] = {}

    for name, shape in sorted(_shapes(size).items()):
        shards[0][name] = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        if sum(t.nbytes for t in shards[0].values()) > GB // 2:
            save()
    save()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _shapes(size: float) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocabulary, narrow = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"], SHAPE["num_key_value_heads"] * 128
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    found = {f"model.layers.{i}.{name}.weight": shape for i in range(_layers(size)) for name, shape in layer.items()}
    return {**found, "model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}


def _layers(size: float) -> int:
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    layer = 2 * (2.5 * hidden * hidden + 3 * hidden * inner)
    return max(1, round((size * GB - 4 * hidden * SHAPE["vocab_size"]) / layer))


def measure(home: Path, size: float, rounds: int, cache: str, ways: list[str], mergekit: str | None) -> dict[str, Any]:
    """`ways` in turn, `rounds` times; the first is `cp`."""
    runs: dict[str, list[dict[str, float]]] = {w: [] for w in ways}
    for i in range(rounds):
        for way in (*ways[i % len(ways) :], *ways[: i % len(ways)]):
            _prepare(home, way, cache, size)
            out = home / "out"
            python = str(mergekit) if way.startswith("mergekit") else sys.executable
            done = subprocess.run([python, __file__, "--way", way, str(home), str(out)], capture_output=True, text=True, cwd=HERE.parent)
            if done.returncode:
                raise SystemExit(f"{way} failed:\n{done.stderr}")
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            if i == 0:
                check(home, way, out)
            shutil.rmtree(out)
            print(f"{size:g} GB, {cache}, round {i + 1}: {way} {runs[way][-1]}", file=sys.stderr, flush=True)
    written = sum(f.stat().st_size for f in (home / "tuned").glob("*.safetensors"))
    return {"gb": round(written / GB, 3), "cache": cache, "rounds": rounds, "ways": {w: _summary(runs, w, written) for w in ways}}


def _prepare(home: Path, way: str, cache: str, size: float) -> None:
    """Flush what earlier runs wrote; put every model that `way` reads into the page cache, or out of it; touch memory for the output."""
    os.sync()
    for name in MODELS:
        for file in sorted((home / name).glob("*.safetensors")):
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if cache == "warm" and name in READS[way]:
                while os.read(fd, 1 << 24):
                    pass
            os.close(fd)
    with mmap.mmap(-1, int(size * GB)) as memory:
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1


def _summary(runs: dict[str, list[dict[str, float]]], way: str, written: int) -> dict[str, Any]:
    seconds = [r["seconds"] for r in runs[way]]
    return {
        "seconds": [round(s, 2) for s in seconds], "gb_per_s": round(written / GB / median(seconds), 3),
        "speed_to_cp": round(median(c["seconds"] / s for c, s in zip(runs["cp"], seconds)), 3),
        "cpu_seconds": round(median(r["cpu"] for r in runs[way]), 2), "peak_mb": round(median(r["peak_mb"] for r in runs[way])),
    }  # fmt: skip


def check(home: Path, way: str, out: Path) -> None:
    """What was written is the formula's result, on some tensors, within bfloat16's rounding."""
    from resafe.weights import Checkpoint

    a, f, u = (Checkpoint(home / name) for name in MODELS)
    made = Checkpoint(out)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        wa, wf, wu = (m.tensor(name).double() for m in (a, f, u))
        wanted = wf if way == "cp" else wf + wa - wu if way in ("resta", "mergekit_task_arithmetic") else (wf + wa) / 2
        worst = float((made.tensor(name).double() - wanted).abs().max())
        if worst > 2e-3:
            raise SystemExit(f"{way} wrote something else: {name} differs by {worst}")


def child(way: str, home: Path, out: Path) -> None:
    """Run one way; prints its seconds, CPU seconds and peak memory as the last line."""
    work = WAYS[way](home, out)
    spent = _cpu()
    began = time.perf_counter()
    work()
    for file in out.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "cpu": _cpu() - spent, "peak_mb": _peak_kb(way) / 1024}))


def _peak_kb(way: str) -> int:
    if way == "cp":
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # Not ru_maxrss, which a process takes over from the one that started it.
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def _cpu() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _cp(home: Path, out: Path) -> Callable[[], object]:
    return lambda: subprocess.run(["cp", "-r", str(home / "tuned"), str(out)], check=True)


def _repair(spec: dict[str, Any]) -> Callable[[Path, Path], Callable[[], object]]:
    def way(home: Path, out: Path) -> Callable[[], object]:
        import torch  # noqa: F401

        from resafe.mitigation import Run
        from resafe.mitigations import make

        name, parameters = next(iter(spec.items()))
        if name == "resta":
            parameters = {**parameters, "unaligned": str(home / "unaligned")}
        return lambda: make({name: parameters}).mitigation.repair(Run(output=out, aligned=home / "aligned", tuned=home / "tuned"))

    return way


def _mergekit(method: str) -> Callable[[Path, Path], Callable[[], object]]:
    def way(home: Path, out: Path) -> Callable[[], object]:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        aligned, tuned, unaligned = (str(home / name) for name in MODELS)
        config: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
        if method == "linear":
            config["models"] = [{"model": m, "parameters": {"weight": 0.5}} for m in (aligned, tuned)]
        else:
            config |= {"base_model": aligned, "models": [{"model": tuned, "parameters": {"weight": 1.0}}, {"model": unaligned, "parameters": {"weight": -1.0}}], "parameters": {"normalize": False}}
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, out_shard_size=GB)
        return lambda: run_merge(MergeConfiguration.model_validate(config), str(out), options)

    return way


def _in_memory(home: Path, out: Path) -> Callable[[], object]:
    import torch
    from transformers import AutoModelForCausalLM

    def work() -> None:
        tuned: Any = AutoModelForCausalLM.from_pretrained(home / "tuned", dtype=torch.bfloat16)
        aligned: Any = AutoModelForCausalLM.from_pretrained(home / "aligned", dtype=torch.bfloat16)
        with torch.no_grad():
            for (_, w), (_, v) in zip(tuned.named_parameters(), aligned.named_parameters()):
                w.copy_(w.float().lerp(v.float(), 0.5))
        tuned.save_pretrained(out, max_shard_size="2GB")

    return work


WAYS: dict[str, Callable[[Path, Path], Callable[[], object]]] = {
    "cp": _cp, "restore_weights": _repair({"restore_weights": {"strength": 0.5}}), "resta": _repair({"resta": {"strength": 1.0}}),
    "mergekit_linear": _mergekit("linear"), "mergekit_task_arithmetic": _mergekit("task_arithmetic"), "in_memory": _in_memory,
}  # fmt: skip


def safe_lora(d: int = 4096, rank: int = 16, rounds: int = 5) -> dict[str, Any]:
    """C B thin and dense: seconds in float32, and how far apart the two are in float64."""
    import torch

    from resafe.weights.subspace import Official

    generator = torch.Generator().manual_seed(0)
    v, b = torch.randn(d, d, generator=generator), torch.randn(d, rank, generator=generator)
    seconds: dict[str, list[float]] = {"thin": [], "dense": []}
    for _ in range(rounds):
        for name, run in (("thin", lambda: Official(v).apply(b)), ("dense", lambda: (v @ v.T / v.norm()) @ b)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    wide, factor = v.double(), b.double()
    dense = (wide @ wide.T / torch.linalg.matrix_norm(wide)) @ factor
    error = float((Official(wide).apply(factor) - dense).norm() / dense.norm())
    single = float((Official(v).apply(b).double() - dense).norm() / dense.norm())
    return {
        "d": d, "rank": rank, "seconds": {k: [round(s, 4) for s in v] for k, v in seconds.items()},
        "times_faster": round(median(x / y for x, y in zip(seconds["dense"], seconds["thin"])), 1),
        "relative_difference": {"float64": error, "float32_to_float64": single},
    }  # fmt: skip


if __name__ == "__main__":
    main()
