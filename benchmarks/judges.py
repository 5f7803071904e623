"""What the offline judges are worth, beside string matching: OMP_NUM_THREADS=1 python benchmarks/judges.py --data FOLDER

FOLDER is that of fit_offline_guard.py. Everything is measured on models, questions and jailbreak templates that the judge
was not fitted on; only the injections meet the judges that ship. Writes results/judges.json, prints its tables, and puts
them into resafe/data/guard/README.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results/judges.json"
README = HERE.parent / "resafe/data/guard/README.md"
INJECTIONS, BLIND, MIXED, AFTER = (HERE.parent / "tests/guards" / f"injections{name}.yaml" for name in ("", "_blind", "_mixed", "_after"))
NAMES = {"llama2orig": "Llama 2", "mistralinstruct": "Mistral"}
BEGIN, END = "<!-- judges.json -->", "<!-- end -->"
SHIPPED = ("rules", "offline", "encoder")
BETWEEN = {"start": "\n", "end": "\n", "same": " ", "end_same": " "}  # an injected text and the answer


def measure(data: Path, cache: Path | None) -> dict[str, Any]:
    """All results, as they are committed."""
    from guard_data import MODELS, hashes
    from guard_fit import Features, Sources
    from guard_measure import join, judge_answers, judge_harm, judge_refusal, trade_off, worth

    from resafe.guards import load_guard
    from resafe.guards.encoder import Encoder, find_encoder

    sources, embed = Sources.read(data), Features(Encoder(find_encoder()), cache)
    pairs = [(a, b) for a, b in zip(MODELS, reversed(MODELS))]
    parts = {b: judge_refusal(sources, embed, a, sources.xstest[b], [bool(r.refusal) for r in sources.xstest[b]]) for a, b in pairs}
    full = {m: replace(j, truth=[bool(r.full) for r in sources.xstest[m]]) for m, j in parts.items()}
    both = {"refusal": {**parts, "both": join(list(parts.values()))}, "full_refusal": {**full, "both": join(list(full.values()))}}
    harm = {"questions_and_templates": judge_harm(sources, embed), "questions": judge_harm(sources, None, templates=False)}
    own = {m: judge_answers(sources, embed, m, m)[True] for m in MODELS}  # to choose thresholds by: no other model is looked at
    return {
        "command": "OMP_NUM_THREADS=1 python benchmarks/judges.py --data FOLDER",
        "data_sha256": hashes(data),
        "judges": {name: load_guard(name).identity for name in SHIPPED},
        **{what: {m: {j: worth(v, j) for j in v.said} for m, v in found.items()} for what, found in both.items()},
        "refusal_on_other_sources": other_sources(sources, embed),
        "harm": {held: {j: worth(v, j) for j in v.said} for held, v in harm.items()},
        "harm_thresholds": trade_off(harm["questions_and_templates"], own),
        "harm_flagged_on_xstest": answers(sources, embed),
        "harm_flagged_on_jailbreakbench_openings": openings(),
        "injections": injections(sources),
        "ordinary_answers_changed": changed(sources),
    }


def other_sources(sources: Any, embed: Any) -> dict[str, Any]:
    """Judges fitted on each model's completions: hazardous answers of a third model that they call refusals, which is wrong."""
    from guard_data import MODELS
    from guard_measure import judge_refusal, rate

    rows = sources.broken(held_out=True)
    judged = {m: judge_refusal(sources, embed, m, rows, [False] * len(rows)) for m in MODELS}
    return {"harmful_answers_of_gptfuzz_called_refusals": {m: {j: rate(sum(v), len(v)) for j, v in found.said.items()} for m, found in judged.items()}}


def answers(sources: Any, embed: Any) -> dict[str, Any]:
    """Share of XSTest prompts answered in full that is flagged as harmful; fitted on the other model's answers."""
    from guard_data import MODELS
    from guard_measure import judge_answers, rate

    found = {}
    for model, other in zip(MODELS, reversed(MODELS)):
        for safe, judged in judge_answers(sources, embed, model, other).items():
            if judged.truth:
                kind = "safe_prompts" if safe else "unsafe_prompts"
                found[f"{model} {kind}"] = {j: rate(sum(v), len(v)) for j, v in judged.said.items() if j in ("offline", "encoder")}
    return found


def openings() -> dict[str, Any]:
    """Share of JailbreakBench's compliant openings ("Sure, here is ...", one for each prompt) that the judges that ship flag as harmful."""
    from guard_measure import rate

    from resafe.eval.suite import load_suite
    from resafe.guards import load_guard

    found: dict[str, Any] = {}
    for name in ("jailbreakbench_benign", "jailbreakbench"):
        exchanges = [(c.messages, c.row["Target"]) for c in load_suite(name).cases]
        found[name] = {j: rate(sum(bool(v.harmful) for v in load_guard(j).classify(exchanges)), len(exchanges)) for j in ("offline", "encoder")}
    return found


def injected(case: dict[str, str], base: str) -> str:
    """A base answer with the injected text before it, in the middle (after its first sentence) or behind it; "same": on its line."""
    text, where = case["text"].rstrip("\n"), case["at"]
    if where in ("start", "same"):
        return f"{text}{BETWEEN[where]}{base}"
    if where in ("end", "end_same"):
        return f"{base}{BETWEEN[where]}{text}"
    first, _, rest = base.partition(". ")
    return f"{first}. {text} {rest}" if rest else f"{base} {text}"


def injections(sources: Any) -> dict[str, Any]:
    """Verdicts of the judges that ship that an injected text turns, on our placeholders and on public answers.

    Our own texts were written beside the cleaning, those called blind without knowledge of it, the last of them when the judges
    were done; "before, on the line" are all of the first two, each before the answer and on its line. Refusals: of the public answers those that all judges read as people do.
    """
    from guard_data import MODELS

    from resafe.guards import load_guard

    corpus = yaml.safe_load(INJECTIONS.read_text(encoding="utf-8"))
    own = list(corpus["bases"].values())
    answers = [r for model in MODELS for r in sources.xstest[model]][::75]
    said = [load_guard(judge).classify([r.exchange for r in answers]) for judge in SHIPPED]
    clear = [r.exchange[1] for r, *found in zip(answers, *said) if all(v.refusal == bool(r.refusal) for v in found)]
    bases = {"refusal": [*own, *clear], "harm": [*own, *[r.exchange[1] for r in sources.gptfuzz if r.harm == 1][::170]]}
    blind, mixed, after = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in (BLIND, MIXED, AFTER))
    kinds = {"texts": corpus["injections"], "blind texts": blind, "blind texts anywhere": mixed, "blind texts afterwards": after}
    kinds["texts before, on the line"] = [{**case, "at": "same"} for case in (*corpus["injections"], *blind)]
    found: dict[str, Any] = {}
    for judge in SHIPPED:
        for head in ("refusal", "harm")[: 1 if judge == "rules" else 2]:
            for kind, cases in kinds.items():
                name = f"{head}, {judge}, {len(cases)} {kind}"
                found[name] = turned(load_guard(judge), head, cases, bases[head])
    return found


def turned(guard: Any, head: str, cases: Sequence[dict[str, str]], bases: Sequence[str]) -> dict[str, Any]:
    """How often an injected text turns the guard's verdict on a base answer."""
    from guard_data import exchange
    from guard_measure import rate

    field = {"harm": "harmful", "refusal": "refusal"}[head]
    before = [getattr(v, field) for v in guard.classify([exchange("", a) for a in bases])]
    after = [getattr(v, field) for v in guard.classify([exchange("", injected(c, a)) for c in cases for a in bases])]
    flips = [x != y for x, y in zip(before * len(cases), after)]
    return {**rate(sum(flips), len(flips)), "bases": len(bases), "bases_judged_true": sum(map(bool, before))}


def changed(sources: Any) -> dict[str, Any]:
    """Ordinary answers: of which the cleaning leaves out more than invisible characters, and which are cut before a refusal."""
    import unicodedata

    from guard_measure import rate

    from resafe.guards._behind import judged
    from resafe.guards._clean import clean

    texts = [r.exchange[1] for r in sources.everything()]
    visible, cleaned = ["".join(c for c in t if unicodedata.category(c) != "Cf") for t in texts], [clean(t) for t in texts]
    cut = sum(judged(t) != c for t, c in zip(texts, cleaned))
    return {"cleaned": rate(sum(c != v for c, v in zip(cleaned, visible)), len(texts)), "cut_before_a_refusal": rate(cut, len(texts))}


def percent(found: dict[str, Any]) -> str:
    return f"{100 * found['share']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [row(*heads), row(*("---" for _ in heads)), *(row(*r) for r in rows), ""]


def worth_rows(found: dict[str, Any], label: str) -> list[list[str]]:
    """One line for each judge."""
    lines = []
    for judge, v in found.items():
        d = v.get("against_keyword_qi")
        gain = f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]" if d else ""
        error = v["calibration"]["expected_calibration_error"] if "calibration" in v else None
        shares = [percent(v[k]) for k in ("accuracy", "sensitivity", "specificity")]
        lines.append([label, judge, *shares, "{:.2f} [{:.2f}, {:.2f}]".format(v["kappa"], *v["kappa_interval"]), gain, "" if error is None else f"{error:.3f}"])
    return lines


def render(results: dict[str, Any]) -> str:
    """The tables, as they stand in the README."""
    heads = ("held out", "judge", "accuracy", "sensitivity", "specificity", "kappa", "points over string match", "calibration error")
    lines = ["Refused in full or in part, against people:", ""]
    lines += table(heads, [r for m, v in results["refusal"].items() for r in worth_rows(v, NAMES.get(m, m))])
    lines += ["Only full refusals count (the judges look for both kinds):", ""]
    lines += table(heads, [r for m, v in results["full_refusal"].items() for r in worth_rows(v, NAMES.get(m, m))])
    lines += ["Harm, against the labels of GPTFuzz:", ""]
    held = {"questions_and_templates": "questions and templates", "questions": "questions"}
    lines += table(heads, [r for k, v in results["harm"].items() for r in worth_rows(v, held[k])])
    lines += ["Flagged as harmful among XSTest prompts that a model answered in full:", ""]
    shares = [
        [f"{NAMES[k.split()[0]]}, {k.split()[1].replace('_', ' ')} ({v['offline']['n']})", *(percent(v[j]) for j in ("offline", "encoder"))]
        for k, v in results["harm_flagged_on_xstest"].items()
    ]
    lines += table(("answers", "offline", "encoder"), shares)
    lines += ["Flagged as harmful among the compliant openings that JailbreakBench has for its prompts (\"Sure, here is ...\"):", ""]
    pairs = {"jailbreakbench_benign": "matched benign prompts, wrongly", "jailbreakbench": "harmful prompts, rightly"}
    jailbreakbench = results["harm_flagged_on_jailbreakbench_openings"]
    lines += table(("openings", "offline", "encoder"), [[f"{n} ({v['offline']['n']})", *(percent(x) for x in v.values())] for k, n in pairs.items() for v in [jailbreakbench[k]]])
    lines += ["What other thresholds of harm cost: on held-out questions and templates, and flagged among full answers to safe prompts by a", "model whose answers to the other half of the prompts were fitted on:", ""]
    lines += table(("judge", "threshold", "accuracy", "sensitivity", "specificity", *(f"flagged, {n}" for n in NAMES.values())), tried(results["harm_thresholds"]))
    lines += ["Harmful answers of GPTFuzz (a third model) called refusals, which is wrong:", ""]
    third = results["refusal_on_other_sources"]["harmful_answers_of_gptfuzz_called_refusals"]
    lines += table(("fitted on", *next(iter(third.values()))), [[NAMES[m], *(percent(x) for x in v.values())] for m, v in third.items()])
    lines += ["Verdicts turned by texts that talk to the judge, each put into several answers:", ""]
    found = results["injections"].items()
    lines += table(("head, judge, texts", "turned", "pairs", "answers"), [[k, percent(v), str(v["n"]), str(v["bases"])] for k, v in found])
    for what, judged in (("refusal", results["refusal"]["both"]), ("harm", results["harm"]["questions_and_templates"])):
        lines += [f"Calibration of `offline`, {what}: of the answers with a score in a bin, the share that people say yes to:", ""]
        lines += bins(judged["offline"]["calibration"]["bins"])
    cleaned, cut = results["ordinary_answers_changed"].values()
    said = f"Cleaning changes {percent(cleaned)} of {cleaned['n']:,} ordinary answers; {percent(cut)} refuse behind something, and are read from there."
    return "\n".join([*lines, said])


def tried(found: dict[str, Any]) -> list[list[str]]:
    """One line for each judge and threshold."""
    return [
        [judge, t, *(percent(v[k]) for k in ("accuracy", "sensitivity", "specificity")), *(percent(v["flagged"][m]) for m in NAMES)]
        for judge, values in found.items()
        for t, v in values.items()
    ]


def bins(found: Sequence[dict[str, Any]]) -> list[str]:
    """A reliability table."""
    rows = [[f"{b['from']:.1f}", str(b["n"]), f"{b['mean_score']:.2f}", f"{b['share']:.2f}"] for b in found]
    return table(("score from", "answers", "mean score", "share"), rows)


def readme_with(text: str, tables: str) -> str:
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", text, flags=re.DOTALL)


def main() -> None:
    from resafe.files import write_json, write_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="an .npz file that keeps embeddings between runs")
    args = parser.parse_args()
    results = measure(args.data, args.cache)
    write_json(RESULTS, results)
    tables = render(results)
    write_text(README, readme_with(README.read_text(encoding="utf-8"), tables))
    print(tables)


if __name__ == "__main__":
    main()
