"""Couplings: which noise goes with which data, batch -> (x0, x1)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow.config import CouplingConfig

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


def assign(x0: Tensor, x1: Tensor) -> Tensor:
    """Find the permutation p that makes the sum of |x1_i - x0_p(i)|^2 least, exactly.

    x0, x1: [B, ...] -> int64 [B], each of 0 to B - 1 once. (The Hungarian problem; as a coupling:
    Pooladian et al. 2023, arXiv 2304.14772, and Tong et al. 2023, arXiv 2302.00482.) In float64. Raises
    UserError for shapes that do not match and values that are not finite.
    """
    from scipy.optimize import linear_sum_assignment

    if x0.shape != x1.shape or not len(x0):
        raise UserError(f"x0 is {list(x0.shape)}, x1 {list(x1.shape)}; expected one shape")
    a, b = x1.flatten(1).double(), x0.flatten(1).double()
    # |a - b|^2 less what no permutation changes
    cost = -(a @ b.T)
    if not cost.isfinite().all():
        raise UserError("optimal transport: the batch holds NaN or infinity")
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def optimal_transport(block: int) -> Coupling:
    """Deal fresh noise out so that it has the least way to go, within each block of a batch.

    A micro-batch is made of whole blocks (`check`), so what is matched does not depend on the number
    of processes. The noise is permuted, the data stays: labels stay with it. Every noise is used once.
    """

    def couple(batch: Batch, draw: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor, Tensor]:
        x0, x1 = independent(batch, draw)
        if len(x1) % block:
            raise UserError(f"a batch of {len(x1)} does not hold whole blocks of {block}")
        pairs = zip(x0.split(block), x1.split(block), strict=True)
        return torch.cat([noise[assign(noise, data)] for noise, data in pairs]), x1

    return couple


def build(config: CouplingConfig) -> Coupling:
    """Make the coupling that a config names."""
    return optimal_transport(config.block) if config.name == "optimal_transport" else independent


def check(config: CouplingConfig, micro_batch: int) -> None:
    """Raise UserError where the micro-batch of a process is not made of whole blocks."""
    if config.name == "optimal_transport" and micro_batch % config.block:
        fitting = max((d for d in range(2, config.block + 1) if micro_batch % d == 0), default=None)
        way = "choose another fit.batch_size" if fitting is None else f"use {fitting}"
        raise UserError(
            f"coupling.block={config.block}: a process takes {micro_batch} samples of the batch at a "
            f"time, which is not a multiple of it; {way}, or another fit.micro_batch"
        )
