"""The learning rate as a function of the step."""

import math
from typing import Literal

Decay = Literal["constant", "linear", "cosine"]


def factor(step: int, steps: int, warmup: int, decay: Decay) -> float:
    """Return the share of the peak learning rate with which an update is made.

    It rises from 0 in a line over `warmup` updates; then it stays, or falls to 0 at update `steps`.

    Args:
        step: Updates made so far, 0, 1, ...
        steps: Updates of the whole run.
        warmup: Updates over which it rises.
        decay: "constant", "linear", or "cosine" (half a period).

    Returns:
        A number in [0, 1].
    """
    if step < warmup:
        return step / warmup
    if decay == "constant":
        return 1.0
    left = max(steps, warmup + 1) - warmup  # a run may end in its warm-up
    if decay == "linear":
        return max(0.0, (left + warmup - step) / left)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / left))))
