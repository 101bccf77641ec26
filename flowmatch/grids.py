"""Time grids: N + 1 strictly monotone times from noise (t = 0) to data (t = 1)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import pydantic
import torch
from torch import Tensor

from flowmatch.config import Config, UserError, option, used


class GridConfig(Config):
    """Where the points of a time grid lie."""

    grid: Literal["uniform", "shift", "sigmoid", "edm", "list"] = option(
        "uniform",
        "spacing of the times from 0 to 1; shift: short steps at the noise, as diffusers' flow "
        "schedulers shift them; sigmoid: short steps at both ends; edm: even in sigma^(1/rho), "
        "sigma = (1 - t) / t; list: the times in points",
    )
    shift: float = option(
        3.0, "grid=shift: 1 is uniform; larger puts more steps at the noise", gt=0
    )
    kappa: float = option(10.0, "grid=sigmoid: steepness; towards 0 it is uniform", gt=0, le=100)
    rho: float = option(7.0, "grid=edm: larger puts more steps at the data end", gt=0)
    sigma_min: float = option(0.002, "grid=edm: sigma of the last point before t = 1", gt=0)
    sigma_max: float = option(80.0, "grid=edm: sigma from which points are laid", gt=0)
    points: list[float] = option([], "grid=list: its N + 1 times", validate_default=True)

    @pydantic.field_validator("shift", "kappa", "rho", "sigma_min", "sigma_max")
    @classmethod
    def _of_grid(cls, value: float, info: pydantic.ValidationInfo) -> float:
        grid = {"shift": "shift", "kappa": "sigmoid"}.get(str(info.field_name), "edm")
        return used(cls, value, info, "grid", grid)

    @pydantic.field_validator("sigma_max")
    @classmethod
    def _ordered(cls, value: float, info: pydantic.ValidationInfo) -> float:
        if value <= info.data.get("sigma_min", 0):
            raise ValueError(f"expected more than sigma_min={info.data['sigma_min']}")
        return value

    @pydantic.field_validator("points")
    @classmethod
    def _listed(cls, value: list[float], info: pydantic.ValidationInfo) -> list[float]:
        used(cls, value, info, "grid", "list")
        if info.data.get("grid") == "list":
            check_times(value)
            if (value[0], value[-1]) != (0, 1):
                raise ValueError("expected times from 0 to 1")
        return value


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


def check_times(points: Sequence[float]) -> None:
    """Raise UserError unless times are two or more, strictly monotone, in [0, 1]."""
    steps = [after - before for before, after in pairwise(points)]
    if not steps or not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
        raise UserError(f"grid={list(points)}: expected at least two strictly monotone times")
    if min(points) < 0 or max(points) > 1:
        raise UserError(f"grid={list(points)}: expected times in [0, 1]")
