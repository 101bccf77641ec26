"""The learning rate as a function of the step."""

import math
from typing import Literal

Decay = Literal["constant", "linear", "cosine"]


def factor(step: int, steps: int, warmup: int, decay: Decay, begin: int = 0) -> float:
    """Return the share of the peak learning rate with which an update is made.

    It rises from 0 in a line over `warmup` updates; then it stays, or falls to 0 at update `steps`. In
    a run that has grown the decay is repeated, as in SGDR (Loshchilov & Hutter 2016, arXiv 1608.03983).

    Args:
        step: Updates made so far, 0, 1, ...
        steps: Updates of the whole run.
        warmup: Updates over which it rises.
        decay: "constant", "linear", or "cosine" (half a period).
        begin: Updates after which the run ended before it grew.

    Returns:
        A number in [0, 1].
    """
    if step < warmup:
        return step / warmup
    if decay == "constant":
        return 1.0
    begin = max(warmup, begin)
    left = max(steps, begin + 1) - begin  # a run may end in its warm-up
    if decay == "linear":
        return max(0.0, (left + begin - step) / left)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - begin) / left))))
