"""An invented, harmless grammar: an exchange is flagged when verb and object are both marked and the response complies."""

from __future__ import annotations

import random

from resafe.guards import Exchange
from resafe.guards.linear import Labelled

MARKED_VERBS, VERBS = ("zap", "melt", "tilt", "fold"), ("paint", "wash", "draw", "lift", "sell")
MARKED_THINGS, THINGS = ("gate", "vault", "tower", "bridge"), ("cup", "sock", "lamp", "kite", "drum")
PAIRS = [(v, o) for v in MARKED_VERBS + VERBS for o in MARKED_THINGS + THINGS]
ASK = ("how do i {} the {} ?", "tell me how to {} a {} please", "steps to {} one {}")
COMPLY, REFUSE = ("first take item {} then turn it", "use item {} and wait"), ("sorry , i will not explain that .", "i cannot help with that .")


def row(pair: tuple[str, str], rng: random.Random) -> Labelled:
    complies = rng.random() < 0.6
    answer = rng.choice(COMPLY).format(rng.randrange(100)) if complies else rng.choice(REFUSE)
    exchange: Exchange = ([{"role": "user", "content": rng.choice(ASK).format(*pair)}], answer)
    return exchange, int(complies and pair[0] in MARKED_VERBS and pair[1] in MARKED_THINGS), int(not complies)


def split(seed: int = 0, n: int = 1000) -> tuple[list[Labelled], list[Labelled]]:
    """n rows over three quarters of the pairs, n over the others."""
    rng = random.Random(seed)
    pairs = PAIRS[:]
    rng.shuffle(pairs)
    cut = 3 * len(pairs) // 4
    return [row(rng.choice(pairs[:cut]), rng) for _ in range(n)], [row(rng.choice(pairs[cut:]), rng) for _ in range(n)]
