"""Time grids: N + 1 strictly monotone times from noise (t = 0) to data (t = 1)."""

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow.config import GridConfig, check_times


def uniform_grid(steps: int) -> Tensor:
    """Space N steps evenly from noise to data: [0, 1/N, ..., 1], float64 [N + 1]."""
    if steps < 1:
        raise UserError(f"steps={steps}: a sampler needs at least 1 step")
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def shift_grid(steps: int, shift: float) -> Tensor:
    """Space N steps evenly, then shift them towards noise (shift > 1) or data; float64 [N + 1].

    sigma' = shift sigma / (1 + (shift - 1) sigma), sigma = 1 - t (Esser et al. 2024, arXiv 2403.03206,
    eq. 23), as FlowMatchEulerDiscreteScheduler(shift=shift) does.
    """
    t = uniform_grid(steps)
    return t / (shift - (shift - 1) * t)


def sigmoid_grid(steps: int, kappa: float) -> Tensor:
    """Space N steps by a sigmoid of steepness kappa > 0, short at both ends; float64 [N + 1].

    t_i = (S(kappa (i/N - 1/2)) - S(-kappa/2)) / (S(kappa/2) - S(-kappa/2)) (Simple ReFlow, arXiv
    2410.07815).
    """
    s = torch.sigmoid(kappa * (uniform_grid(steps) - 0.5))
    grid = (s - s[0]) / (s[-1] - s[0])
    grid[-1] = 1
    return grid


def edm_grid(
    steps: int, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Tensor:
    """Space N steps as EDM does (arXiv 2206.00364, eq. 5), in t = 1 / (1 + sigma); float64 [N + 1].

    sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < N, then
    0. The first point is moved to t = 0, where our noise lies; all others are EDM's.
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
    """Lay out a grid of N steps from noise to data as a config says: float64 [N + 1].

    Raises UserError where a listed grid has another number of steps, or points fall together.
    """
    if config.grid == "list":
        if steps != len(config.points) - 1:
            raise UserError(
                f"steps={steps}: grid=list lists {len(config.points)} points; use "
                f"{len(config.points) - 1}"
            )
        return torch.tensor(config.points, dtype=torch.float64)
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
    """Squeeze a grid from 0 to 1 into the times of a span. [N + 1] -> [N + 1]; (0, 1) changes no bit."""
    return span[0] + (span[1] - span[0]) * grid
