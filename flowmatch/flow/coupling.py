"""Couplings pair noise with data: batch -> (x0, x1)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow.config import CouplingConfig

Batch = dict[str, Any]
Draw = Callable[[tuple[int, ...]], Tensor]  # shape of a sample -> standard normal noise [B, *shape]
Coupling = Callable[[Batch, Draw], tuple[Tensor, Tensor]]


def independent(batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
    """Pair each image with fresh noise: the random coupling of stage 1.

    Args:
        batch: Its "x1" is the data, [B, ...].
        draw: draw(shape) returns standard normal noise, [B, *shape].

    Returns:
        x0 and x1, [B, ...] each.
    """
    x1 = batch["x1"]
    return draw(tuple(x1.shape[1:])), x1


def stored(batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
    """Return the pairs of a batch as they were generated: the straight coupling of stage 3."""
    return batch["x0"], batch["x1"]


def assign(x0: Tensor, x1: Tensor) -> Tensor:
    """Find the permutation p with the smallest sum of |x1_i - x0_p(i)|^2, exactly, in float64.

    This is the assignment problem; as a coupling: Pooladian et al. 2023, arXiv 2304.14772, and Tong et
    al. 2023, arXiv 2302.00482.

    Args:
        x0: Noise, [B, ...].
        x1: Data, [B, ...].

    Returns:
        p, int64 [B].

    Raises:
        UserError: The shapes differ, or a value is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    if x0.shape != x1.shape or not len(x0):
        raise UserError(f"x0 is {list(x0.shape)}, x1 {list(x1.shape)}; expected one shape")
    a, b = x1.flatten(1).double(), x0.flatten(1).double()
    # |a - b|^2 without the terms that no permutation changes
    cost = -(a @ b.T)
    if not cost.isfinite().all():
        raise UserError("optimal transport: the batch holds NaN or infinity")
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def optimal_transport(block: int) -> Coupling:
    """Build the coupling that permutes fresh noise to the smallest cost within each block of a batch.

    A micro-batch consists of whole blocks (`check`), so that the pairs do not depend on the number of
    processes. Only the noise is permuted: labels stay with their data, and each noise is used once.

    Args:
        block: Consecutive samples that are matched together.

    Returns:
        The coupling, which raises UserError for a batch that does not consist of whole blocks.
    """

    def couple(batch: Batch, draw: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor, Tensor]:
        x0, x1 = independent(batch, draw)
        if len(x1) % block:
            raise UserError(f"a batch of {len(x1)} does not consist of whole blocks of {block}")
        pairs = zip(x0.split(block), x1.split(block), strict=True)
        return torch.cat([noise[assign(noise, data)] for noise, data in pairs]), x1

    return couple


def build(config: CouplingConfig) -> Coupling:
    """Build the coupling of a config."""
    return optimal_transport(config.block) if config.name == "optimal_transport" else independent


def check(config: CouplingConfig, micro_batch: int) -> None:
    """Check that the micro-batch of a process consists of whole blocks.

    Raises:
        UserError: It does not.
    """
    if config.name == "optimal_transport" and micro_batch % config.block:
        largest = max((d for d in range(2, config.block + 1) if micro_batch % d == 0), default=None)
        way = "use another fit.batch_size" if largest is None else f"use {largest}"
        raise UserError(
            f"coupling.block={config.block}: the micro-batch of a process is {micro_batch} samples, "
            f"which is not a multiple; {way}, or another fit.micro_batch"
        )
