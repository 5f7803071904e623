"""The safety section of a model card: what was measured, what changed, what was decided, and what that does not say.

The section stands between two markers and is replaced in place; every other byte of the card stays, so that the same audit
written twice leaves the same file. No metadata are added: the Hub's model-index has no field for intervals, paired
differences or a decision, and writing it would dump the whole front matter anew, without the author's comments and quotes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resafe.errors import ResafeError
from resafe.eval.audit_view import HEADS, SAID, lines
from resafe.eval.auditing import Audit
from resafe.files import write_text

BEGIN, END = "<!-- resafe: safety begin -->", "<!-- resafe: safety end -->"
LONGEST = 300  # characters of a name that somebody else chose
_MARKUP = re.compile(  # all but letters, digits, quiet punctuation, and underscores inside a word; what makes links is broken up
    r"[^\w\s.,:;%()/+'’“”≥−–…\[\]-]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=\])\(|(?i:(?<=www)\.)"
)

WHY = (
    "Fine-tuning can remove the guardrails of an aligned language model, even where the training data hold nothing harmful "
    "([Qi et al. 2023](https://arxiv.org/abs/2310.03693))."
)
LIMITS = (
    "These numbers are about these prompts, answered greedily in one turn, and about these judges, which err. They say nothing of "
    "other languages, longer conversations, jailbreaks or later fine-tuning. A rate of 0 % is not zero: see its interval. "
    "“Kept” means no worse than before by more than is allowed; a model that was unsafe before stays so."
)


def card_file(path: Path) -> Path:
    """The card that a path means: the file itself, or README.md in a folder. Raises ResafeError where it cannot be written."""
    file = path / "README.md" if path.is_dir() else path
    if file.suffix.lower() not in (".md", ".markdown"):
        raise ResafeError(f"{path} is no model card: name a .md file or an existing folder.")
    if file.is_dir():
        raise ResafeError(f"{file} is a folder: name the model card's file.")
    if file.is_file():
        _split(_read(file), file)
    return file


def update_card(path: Path, section: str) -> Path:
    """Put `section` into the model card at `path` (a file, or a folder with or without README.md), in place of an earlier one.

    A card that is not there is made, with nothing else in it but a title. Raises ResafeError for cards whose front matter is
    not valid or whose markers do not match.
    """
    file = card_file(path)
    if not file.is_file():
        title = plain(file.absolute().parent.name) or "Model card"
        return write_text(file, f"# {title}\n\n{BEGIN}\n{section.strip()}\n{END}\n")
    text = _read(file)
    before, after = _split(text, file)
    newline = "\r\n" if "\r\n" in text else "\n"
    body = f"{BEGIN}\n{section.strip()}\n{END}".replace("\n", newline)
    return _write(file, f"{before}{body}{after}")


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")  # newlines as they are
    except UnicodeDecodeError:
        raise ResafeError(f"{file} is not UTF-8 text: save it as UTF-8 first.") from None


def _write(file: Path, text: str) -> Path:
    return write_text(file, text, mode=file.stat().st_mode & 0o777)


def _split(text: str, file: Path) -> tuple[str, str]:
    """What stands before and after the section: around the markers, else everything and the last newline."""
    _check_front_matter(text, file)
    if (text.count(BEGIN), text.count(END)) == (0, 0):
        newline = "\r\n" if "\r\n" in text else "\n"
        gap = "" if not text else newline if text.endswith(newline) else 2 * newline
        return text + gap, newline
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or not found:
        raise ResafeError(f"{file} has markers of the safety section that do not match: leave one '{BEGIN}' before one '{END}'.")
    return before, after


def _check_front_matter(text: str, file: Path) -> None:
    import yaml
    from huggingface_hub import ModelCard

    if not text.lstrip("\ufeff").lstrip().startswith("---"):
        return  # ModelCard warns of cards without
    try:
        ModelCard(text.lstrip("\ufeff"), ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ResafeError(f"{file}: the front matter is not valid: {' '.join(str(error).split())}") from None


def section(audit: Audit) -> str:
    """The Markdown of an audit. It holds no prompt and no response, and no path of the machine it ran on."""
    judges = {x.judge for c in audit.criteria for x in c.comparisons}
    why = audit.why
    for judge in sorted(judges, key=len, reverse=True):
        why = why.replace(judge, judge_name(judge))
    gaps = f" Not measured: {', '.join(audit.not_measured)}." if audit.not_measured else ""
    parts = [
        "## Safety after fine-tuning",
        f"**{SAID[audit.decision].capitalize()}.** {plain(why, 3000)}.{gaps}",
        f"{WHY} {_what(audit)}",
        _table(("measure", *HEADS), _rows(audit)),
        _method(audit),
        _table(("suite", "kind", "prompts", "licence", "source"), _suites(audit.meta)),
        _judges(audit.meta, judges),
        f"{LIMITS} Measured with resafe {version('resafe')}.",
    ]
    return "\n\n".join(p for p in parts if p)


def _what(audit: Audit) -> str:
    both = (_target(audit.meta, name) for name in (audit.before, audit.after))
    return "Therefore {} (before) and {} (after) were asked the same prompts and compared in pairs.".format(*both)


def _target(meta: Mapping[str, Any], name: str) -> str:
    entry = meta.get("targets", {}).get(name, {})
    about = [f"fingerprint {found[0][:12]}" for found in re.finditer(r"[0-9a-f]{16,}", str(entry.get("identity", "")))][:1]
    about += ["behind its output guard"] if entry.get("guard") else []
    return f"**{plain(name)}**" + (f" ({', '.join(about)})" if about else "")


def _rows(audit: Audit) -> Iterable[tuple[str, ...]]:
    for criterion in audit.criteria:
        for i, line in enumerate(lines(criterion)):
            scope, judge, *rest = vars(line).values()
            yield (criterion.name if i == 0 else "", plain(scope), plain(judge_name(judge)), *rest)


def _method(audit: Audit) -> str:
    return (
        "Per cent of the prompts. Harmfulness: requests that it should not serve, served. Nonrefusal: the same requests, not refused. "
        "Over-refusal: harmless requests refused. Coherence: answers that are language at all. Utility: right answers. "
        f"Intervals are {100 * audit.level:g} %: Wilson's for rates, Tango's score interval for changes. *Kept* takes an interval within what is allowed "
        "over all suites, and no suite beyond it on its own; *degraded* an interval that excludes no change, at "
        f"{100 * audit.strict:.2f} % because any of {audit.comparisons} comparisons can fail the audit, and an estimate beyond what is allowed."
    )


def _suites(meta: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for name, entry in meta.get("suites", {}).items():
        dropped = len(entry.get("dropped") or ())
        count = f"{entry.get('n', '')}" + (f" ({dropped} left out: they are in the training data)" if dropped else "")
        about = (str(entry.get(k) or "not stated") for k in ("licence", "source"))
        yield (f"{plain(name)} v{entry.get('version', 1)}", plain(str(entry.get("kind", ""))), count, *map(plain, about))


def _judges(meta: Mapping[str, Any], shown: Collection[str]) -> str:
    found = [f"{plain(judge_name(name))} ({plain(str(j.get('digest', '')))})" for name, j in meta.get("judges", {}).items() if name in shown]
    return f"Judges, with the hash of what each was exactly: {', '.join(found)}." if found else ""


def judge_name(spec: str) -> str:
    """A judge without the address or folder that it has on one machine."""
    if spec.startswith("chat:"):
        return spec.partition("@")[0]
    return spec if spec.startswith("moderation") else spec.rstrip("/").rpartition("/")[2].partition("?")[0]


def plain(text: str, longest: int = LONGEST) -> str:
    """A string chosen by somebody else as text of one Markdown table cell: no markup, HTML, line breaks or control characters."""
    line = " ".join("".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text).split())
    cut = line if len(line) <= longest else line[: longest - 1] + "…"
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", cut)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    body = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)
