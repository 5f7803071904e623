"""An audit as people read it: one line, the rows of its table, and the table for a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from resafe.eval.auditing import Audit
from resafe.eval.criterion import Criterion
from resafe.eval.gate import Comparison, Rate
from resafe.eval.view import percent, points

if TYPE_CHECKING:
    from rich.table import Table

SAID = {"kept": "kept", "degraded": "degraded", "unclear": "could not tell", "not asked": "not asked"}
HEADS = ("on", "judge", "before", "after", "change, points", "allowed", "prompts", "decision")


@dataclass(frozen=True)
class Line:
    """One comparison in words; the fields are in the order of HEADS."""

    scope: str
    judge: str
    before: str
    after: str
    change: str
    allowed: str
    prompts: str
    decision: str


def sentence(audit: Audit) -> str:
    """The decision and what it rests on. Begins differently from an error line, which has exit code 2 as well."""
    gaps = f" Not measured: {', '.join(audit.not_measured)}." if audit.not_measured else ""
    return f"Audit: {SAID[audit.decision]} (exit code {audit.exit_code}). {audit.why}.{gaps}"


def heading(criterion: Criterion) -> str:
    """A criterion and its decision, or why it has none."""
    if criterion.decides:
        return f"{criterion.name}: {SAID[criterion.decision]}"
    return f"{criterion.name} ({'no limit given' if criterion.limit is None else 'does not decide'})"


def lines(criterion: Criterion) -> list[Line]:
    joined = {c.judge for c in criterion.comparisons if len(c.suites) > 1}
    return [_line(criterion, c, c.judge in joined and len(c.suites) == 1) for c in criterion.comparisons]


def _line(criterion: Criterion, c: Comparison, part: bool) -> Line:
    """`part`: one of several suites, which has a say only where it stands out."""
    floor = criterion.floor
    change = "" if floor or None in (c.difference, c.low, c.high) else _points(c)
    allowed = "" if criterion.limit is None else f"{'≥ ' if floor else ''}{criterion.limit:g}"
    prompts = str(c.n) if c.scored == c.n else f"{c.scored} of {c.n}"
    said = SAID[c.decision] if not part or c.decision == "degraded" else "stands out" if c.stands_out else ""
    return Line(c.scope, c.judge, rate(c.before), rate(c.after), change, allowed, prompts, said)


def rate(r: Rate) -> str:
    return "n/a" if r.value is None else f"{percent(r.value)} [{percent(r.low)}, {percent(r.high)}]"


def _points(c: Comparison) -> str:
    return f"{points(c.difference or 0)} [{points(c.low or 0)}, {points(c.high or 0)}]"


def table(audit: Audit) -> Table:
    """Criteria, and under each the comparisons it rests on."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = f"% of prompts and paired differences [{100 * audit.level:g} % interval]; before: {audit.before}, after: {audit.after}"
    out = Table(caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, head in enumerate(HEADS):
        out.add_column(head, justify="right" if 1 < i < 7 else "left", overflow="fold", no_wrap=head != "judge")
    for criterion in audit.criteria:
        out.add_row(Text(heading(criterion), style="bold"))
        found = lines(criterion)
        for line in found:
            out.add_row(*(Text(x) for x in (f"  {line.scope}", *list(vars(line).values())[1:])), end_section=line is found[-1])
    return out
