"""Time grids: N + 1 strictly monotone times from noise (t = 0) to data (t = 1)."""

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow.config import MOST_STEPS, GridConfig, check_times


def uniform_grid(steps: int) -> Tensor:
    """Return the times of N equal steps from noise to data: [0, 1/N, ..., 1], float64 [N + 1].

    Raises:
        UserError: `steps` is less than 1.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: a sampler needs at least 1 step")
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def shift_grid(steps: int, shift: float) -> Tensor:
    """Return the times of N steps that are shifted towards the noise, or the data for shift < 1.

    sigma' = shift sigma / (1 + (shift - 1) sigma), sigma = 1 - t (Esser et al. 2024, arXiv 2403.03206,
    eq. 23), as in FlowMatchEulerDiscreteScheduler(shift=shift).

    Args:
        steps: N.
        shift: 1 is uniform; more than 0.

    Returns:
        Times from 0 to 1, float64 [N + 1].
    """
    t = uniform_grid(steps)
    return t / (shift - (shift - 1) * t)


def sigmoid_grid(steps: int, kappa: float) -> Tensor:
    """Return the times of N steps that are short at both ends.

    t_i = (S(kappa (i/N - 1/2)) - S(-kappa/2)) / (S(kappa/2) - S(-kappa/2)), S the sigmoid (Simple
    ReFlow, arXiv 2410.07815).

    Args:
        steps: N.
        kappa: Steepness; more than 0.

    Returns:
        Times from 0 to 1, float64 [N + 1].
    """
    s = torch.sigmoid(kappa * (uniform_grid(steps) - 0.5))
    grid = (s - s[0]) / (s[-1] - s[0])
    grid[-1] = 1
    return grid


def edm_grid(
    steps: int, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Tensor:
    """Return the times of N steps of EDM (arXiv 2206.00364, eq. 5), t = 1 / (1 + sigma).

    sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < N, then
    0. The first time is moved to 0, where our noise is; all others are EDM's.

    Args:
        steps: N.
        rho: Larger values put more steps at the data.
        sigma_min: Noise level of the last time before 1.
        sigma_max: Noise level of the first time in EDM.

    Returns:
        Times from 0 to 1, float64 [N + 1].
    """
    ramp = uniform_grid(steps - 1) if steps > 1 else torch.zeros(steps, dtype=torch.float64)
    if steps < 1:
        raise UserError(f"steps={steps}: a sampler needs at least 1 step")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigma = (high + ramp * (low - high)) ** rho
    grid = torch.cat([1 / (1 + sigma), torch.ones(1, dtype=torch.float64)])
    grid[0] = 0
    return grid


def make(config: GridConfig, steps: int) -> Tensor:
    """Return the times of N steps with the spacing of a config.

    Args:
        config: The spacing.
        steps: N.

    Returns:
        Times from 0 to 1, float64 [N + 1].

    Raises:
        UserError: A listed grid has another number of steps, two times are equal, or there are too many.
    """
    if config.grid == "list":
        if steps != len(config.points) - 1:
            raise UserError(
                f"steps={steps}: grid=list lists {len(config.points)} points; use "
                f"{len(config.points) - 1}"
            )
        return torch.tensor(config.points, dtype=torch.float64)
    if steps > MOST_STEPS:
        raise UserError(f"steps={steps}: a sampler takes at most {MOST_STEPS:,}")
    if config.grid == "shift":
        grid = shift_grid(steps, config.shift)
    elif config.grid == "sigmoid":
        grid = sigmoid_grid(steps, config.kappa)
    elif config.grid == "edm":
        grid = edm_grid(steps, config.rho, config.sigma_min, config.sigma_max)
    else:
        grid = uniform_grid(steps)
    check_times(grid.tolist())
    return grid


def squeeze(grid: Tensor, span: tuple[float, float]) -> Tensor:
    """Map a grid [N + 1] from [0, 1] to the times of a span; the span (0, 1) changes no bit."""
    return span[0] + (span[1] - span[0]) * grid
