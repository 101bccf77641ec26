"""Densities of training times; each maps one uniform number to a time through its inverse CDF.

A time is therefore a function of the same random number, independent of batch, rank and device. Which
density to use: logit-normal for stage 1 (SD3, arXiv 2403.03206, sec. 3.1); for reflow half of the times
at exactly t = 0, where a one-step sampler evaluates the network, and the rest noise-heavy, or U-shaped
for eight steps and more (2-rectified flow++, arXiv 2405.20320, sec. 4.1): docs/experiments.md.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowmatch.flow.config import TimesConfig

Times = TimesConfig | Sequence[Tensor]  # a density, or the grids of samplers


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return t = sigmoid(N(mean, std)) from uniform numbers. u: [B] in [0, 1) -> [B]."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def logit_normal_density(t: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return p(t) = N(logit(t); mean, std) / (t (1 - t)). t: [B] in (0, 1) -> [B]."""
    z = (torch.logit(t) - mean) / std
    return torch.exp(-0.5 * z**2) / (std * math.sqrt(2 * math.pi) * t * (1 - t))


def u_shape(u: Tensor, a: float = 4.0) -> Tensor:
    """Return times that are frequent at both ends from uniform numbers. u: [B] in [0, 1) -> [B]."""
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(a / 2)) / a


def u_shape_density(t: Tensor, a: float = 4.0) -> Tensor:
    """Return p(t) = a cosh(a (t - 1/2)) / (2 sinh(a/2)). t: [B] in [0, 1] -> [B]."""
    return a * torch.cosh(a * (t - 0.5)) / (2 * math.sinh(a / 2))


def noise_heavy(u: Tensor) -> Tensor:
    """Return times that are frequent at the noise from uniform numbers. u: [B] in [0, 1) -> [B]."""
    return 1 - torch.log10(1 + 9 * u)


def noise_heavy_density(t: Tensor) -> Tensor:
    """Return p(t) = ln(10)/9 10^(1 - t) (Simple ReFlow, arXiv 2410.07815). t: [B] in [0, 1] -> [B]."""
    return math.log(10) / 9 * 10 ** (1 - t)


def on_grids(u: Tensor, grids: Sequence[Tensor]) -> Tensor:
    """Turn uniform numbers into times at which samplers evaluate: a grid, and in it the start of a step.

    Each grid is as frequent as the others, and each step of a grid: the mean of an error over these
    times is the mean over the grids of what one evaluation of each adds. All grids begin at t = 0, which
    is thus the most frequent time (7 of 12 with 1, 2 and 4 steps).

    Args:
        u: Uniform numbers in [0, 1), float64, [B].
        grids: Times of N steps from 0 to 1, [N + 1] each.

    Returns:
        Times in [0, 1), float32, [B].
    """
    which = (u * len(grids)).long()
    rest, t = u * len(grids) - which, torch.zeros_like(u)
    for number, grid in enumerate(grids):
        starts = grid[:-1].to(u)
        t = torch.where(which == number, starts[(rest * len(starts)).long()], t)
    return t.float()


def sample(u: Tensor, config: Times, starts: Sequence[float] = (0.0,)) -> Tensor:
    """Turn uniform numbers into the times of a config.

    Args:
        u: Uniform numbers in [0, 1), float64, [B].
        config: A density, and the share `zero` of times that are set to exactly 0; or the grids of
            `on_grids`.
        starts: What they are set to instead, each as often.

    Returns:
        Times in [0, 1], float32, [B].
    """
    if not isinstance(config, TimesConfig):
        return on_grids(u, config)
    zero = config.zero
    rest = ((u - zero) / (1 - zero) if zero < 1 else u).clamp(0, 1)
    if config.name == "logit_normal":
        t = logit_normal(rest, config.mean, config.std)
    elif config.name == "u_shape":
        t = u_shape(rest, config.a)
    elif config.name == "noise_heavy":
        t = noise_heavy(rest)
    else:
        t = rest
    t = t.clamp(0, 1)
    if not zero:
        return t.float()
    which = (u / zero * len(starts)).long().clamp(max=len(starts) - 1)
    return torch.where(u < zero, torch.tensor(starts, dtype=u.dtype)[which], t).float()


def density(t: Tensor, config: TimesConfig) -> Tensor:
    """Evaluate the density of the times of a config, without the point mass at 0.

    Args:
        t: Times in (0, 1), [B].
        config: As in `sample`.

    Returns:
        p(t), [B]; its integral is 1 - zero.
    """
    if config.name == "logit_normal":
        p = logit_normal_density(t, config.mean, config.std)
    elif config.name == "u_shape":
        p = u_shape_density(t, config.a)
    elif config.name == "noise_heavy":
        p = noise_heavy_density(t)
    else:
        p = torch.ones_like(t)
    return (1 - config.zero) * p
