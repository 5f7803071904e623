"""Classifiers of exchanges: a conversation and the response to it.

`load_guard` takes a spec: `offline`, `refusal`, `harm`, `encoder[:FOLDER]`, `rules`, `lab`, a fitted guard file, a guard model's folder,
`moderation` or `chat:MODEL@URL`.
"""

from resafe.guards._base import Exchange, Guard, Verdict
from resafe.guards._load import load_guard
from resafe.guards.rules import is_refusal

__all__ = ["Exchange", "Guard", "Verdict", "is_refusal", "load_guard"]
