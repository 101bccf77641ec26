"""Densities of training times: each maps one uniform number to a time, by its inverse CDF.

A time is thus a function of the same random number whatever the batch, rank or device. `density` is
the closed form that the tests hold the samples against. Which one to use: logit-normal for stage 1
(SD3, arXiv 2403.03206, sec. 3.1); for reflow half of them at exactly t = 0, where a one-step sampler
evaluates the network, the rest noise-heavy, or for eight steps and more of a U shape (2-rectified
flow++, arXiv 2405.20320, sec. 4.1): docs/experiments.md.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowmatch.flow.config import TimesConfig


def uniform(u: Tensor, c: TimesConfig) -> Tensor:
    """p(t) = 1."""
    return u


def logit_normal(u: Tensor, c: TimesConfig) -> Tensor:
    """t = sigmoid(N(mean, std))."""
    return torch.sigmoid(c.mean + c.std * torch.special.ndtri(u))


def u_shape(u: Tensor, c: TimesConfig) -> Tensor:
    """p(t) = a cosh(a (t - 1/2)) / (2 sinh(a/2)), heavy at both ends."""
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(c.a / 2)) / c.a


def noise_heavy(u: Tensor, c: TimesConfig) -> Tensor:
    """p(t) = ln(10)/9 10^(1 - t), heavy at the noise end (Simple ReFlow, arXiv 2410.07815)."""
    return 1 - torch.log10(1 + 9 * u)


TIMES: dict[str, Callable[[Tensor, TimesConfig], Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "u_shape": u_shape,
    "noise_heavy": noise_heavy,
}


def sample(u: Tensor, c: TimesConfig) -> Tensor:
    """Turn uniform numbers into times. u: [B] float64 in [0, 1) -> t: [B] float32 in [0, 1]."""
    rest = ((u - c.zero) / (1 - c.zero) if c.zero < 1 else u).clamp(0, 1)
    t = TIMES[c.name](rest, c).clamp(0, 1)
    return torch.where(u < c.zero, torch.zeros_like(t), t).float()


def density(t: Tensor, c: TimesConfig) -> Tensor:
    """Evaluate p(t), the point mass at 0 left out: it integrates to 1 - zero. t: [B] in (0, 1)."""
    if c.name == "uniform":
        p = torch.ones_like(t)
    elif c.name == "logit_normal":
        z = (torch.logit(t) - c.mean) / c.std
        p = torch.exp(-0.5 * z**2) / (c.std * math.sqrt(2 * math.pi) * t * (1 - t))
    elif c.name == "u_shape":
        p = c.a * torch.cosh(c.a * (t - 0.5)) / (2 * math.sinh(c.a / 2))
    else:
        p = math.log(10) / 9 * 10 ** (1 - t)
    return (1 - c.zero) * p
