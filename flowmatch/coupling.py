"""Couplings: which noise goes with which data, batch -> (x0, x1)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Batch = dict[str, Any]
Coupling = Callable[[Batch, Callable[[tuple[int, ...]], Tensor]], tuple[Tensor, Tensor]]


def independent(batch: Batch, draw: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor, Tensor]:
    """Pair each image with fresh noise: the random coupling of stage 1.

    batch["x1"]: [B, ...]. draw(shape) gives standard normal noise [B, *shape].
    """
    x1 = batch["x1"]
    return draw(tuple(x1.shape[1:])), x1


def stored(batch: Batch, draw: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor, Tensor]:
    """Take the pairs as they were generated: the straight coupling of stage 3."""
    return batch["x0"], batch["x1"]
