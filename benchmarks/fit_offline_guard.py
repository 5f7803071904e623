"""Fit the judges that ship with resafe: OMP_NUM_THREADS=1 python benchmarks/fit_offline_guard.py --data FOLDER

FOLDER holds gptfuzz_labeled/train.csv, gsm8k/train.jsonl, hh_rlhf/test.jsonl.gz and the two
xstest/xstest_v2_completions_*.csv, unchanged. Writes offline.safetensors, offline.json and encoder.safetensors; with one
thread the same bytes each time on one machine. With --encoder FOLDER it fits a head for another encoder instead, and puts
it into that folder.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from guard_data import MODELS, hashes
from guard_fit import (
    BROKEN_SAMPLE,
    BROKEN_WEIGHT,
    HARM,
    HEAD_L2,
    HH_SAMPLE,
    PACK_SAMPLE,
    PACK_WEIGHT,
    REFUSAL,
    ROUNDS,
    SURE,
    THRESHOLDS,
    WEAK,
    Features,
    Sources,
    fit_offline,
    harm_head,
    refusal_head,
)
from guard_measure import calibration, join, judge_harm, judge_refusal

from resafe.files import digest, write_json
from resafe.guards.encoder import OWN, SHARE, Encoder, find_encoder, head_bytes
from resafe.guards.linear import LinearGuard

TARGET = Path(__file__).parent.parent / "resafe/data/guard"


def calibrations(sources: Sources) -> dict[str, Any]:
    """Of the offline judge, on models, questions and templates that were not fitted on."""
    pairs = zip(MODELS, reversed(MODELS))
    refusal = join([judge_refusal(sources, None, a, (r := sources.xstest[b]), [bool(x.refusal) for x in r]) for a, b in pairs])
    harm = judge_harm(sources, None)
    return {head: calibration(j.scores["offline"], j.truth) for head, j in (("refusal", refusal), ("harm", harm))}


def about(guard: LinearGuard, sources: Sources, files: dict[str, str]) -> dict[str, Any]:
    harm, refusal = sources.harm(sources.gptfuzz), sources.refusal(MODELS)
    return {
        "command": "OMP_NUM_THREADS=1 python benchmarks/fit_offline_guard.py --data FOLDER",
        "settings": {"harm": HARM, "refusal": REFUSAL, "pack_sample": PACK_SAMPLE, "hh_sample": HH_SAMPLE, "broken_sample": BROKEN_SAMPLE},
        "settings_encoder": {"l2": HEAD_L2, "pack_weight": PACK_WEIGHT, "broken_weight": BROKEN_WEIGHT, "rounds": ROUNDS, "sure": SURE, "weak_weight": WEAK, "share": SHARE},
        "threshold": guard.threshold, "threshold_encoder": THRESHOLDS["encoder"], "identity": guard.identity,
        "data_sha256": files,
        "rows": {
            "harm": len(harm), "harmful": sum(r.harm or 0 for r in harm), "questions": len({r.question for r in sources.gptfuzz}),
            "templates": len({r.template for r in sources.gptfuzz}), "refusal": len(refusal), "refused": sum(r.refusal or 0 for r in refusal),
        },
        "calibration": calibrations(sources),
    }  # fmt: skip


def write_bytes(path: Path, content: bytes) -> None:
    neighbour = path.with_name(f".{path.name}.new")
    neighbour.write_bytes(content)
    os.replace(neighbour, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="fit only a head, for this sentence-transformers folder")
    parser.add_argument("--cache", type=Path, help="an .npz file that keeps embeddings between runs")
    args = parser.parse_args()
    files, sources = hashes(args.data), Sources.read(args.data)
    guard = fit_offline(sources.harm(sources.gptfuzz), sources.refusal(MODELS))
    if args.encoder is None:
        guard.save(TARGET / "offline.safetensors", data=digest(files))
        report = about(guard, sources, files)
        write_json(TARGET / "offline.json", report)
        print(json.dumps(report, indent=2))
    embed = Features(Encoder(args.encoder or find_encoder()), args.cache)
    heads = {"harm": harm_head(embed, sources.harm(sources.gptfuzz)), "refusal": refusal_head(embed, sources, MODELS, guard)}
    content = head_bytes(
        embed.encoder, {h: v.weights for h, v in heads.items()}, {h: v.intercept for h, v in heads.items()}, THRESHOLDS["encoder"],
        data=digest(files),
    )
    write_bytes(args.encoder / OWN if args.encoder else TARGET / "encoder.safetensors", content)


if __name__ == "__main__":
    main()
