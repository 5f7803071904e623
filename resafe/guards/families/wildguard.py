"""WildGuard: harmful request, refusal, harmful response, each yes or no.

https://arxiv.org/abs/2406.18495, prompt as in wildguard/utils.py of github.com/allenai/wildguard (Apache-2.0). A conversation of
several turns goes in as one request.
"""

from __future__ import annotations

import re

from resafe.guards._base import Verdict, unscored
from resafe.guards.families._base import Choice, Family, Probabilities, published

_WHOLE = re.compile(r"Harmful request: (?:yes|no)\nResponse refusal: (yes|no)\nHarmful response: (yes|no)")


def parse_wildguard(text: str) -> Verdict:
    """Three yes/no lines; the first, on the request, is not ours to judge."""
    if not (found := _WHOLE.fullmatch(text.strip())):
        return unscored("parse")
    return Verdict(found[2] == "yes", refusal=found[1] == "yes")


def weigh(probabilities: Probabilities, tail: str) -> Verdict:
    """From the probabilities of yes and no in the three lines."""
    _, refusal, harm = probabilities
    return Verdict(harm[0] > harm[1], harm[0], refusal=refusal[0] > refusal[1])


_YES_NO = ((" yes",), (" no",))
FAMILY = Family(
    "wildguard", parse_wildguard, "wildguard", template=published("wildguard"), weigh=weigh,
    choices=(
        Choice(_YES_NO, "Harmful request:", before="\n"),
        Choice(_YES_NO, "\nResponse refusal:", before="yes"),
        Choice(_YES_NO, "\nHarmful response:", before="yes"),
    ),
)  # fmt: skip
