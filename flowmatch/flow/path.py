"""The straight path between noise and data, and what a velocity on it says about its ends.

Convention everywhere in the math: x0 is noise, x1 is data, t in [0, 1] grows from noise to data.
Flow straight and fast (Liu et al. 2022, arXiv 2209.03003), eq. 1; flow matching (Lipman et al. 2022,
arXiv 2210.02747). Many papers put noise at t = 1; here everything is already flipped.
"""

import torch
from torch import Tensor


def expand(t: Tensor | float, x: Tensor) -> Tensor:
    """Shape times for broadcasting. t: scalar or [B]; x: [B, ...] -> [B, 1, ...] or scalar."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t


def interpolate(x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
    """Walk the straight line: x_t = (1 - t) x0 + t x1. x0, x1: [B, ...]; t: [B] in [0, 1]."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1


def velocity(x0: Tensor, x1: Tensor) -> Tensor:
    """Differentiate the line in t: v = x1 - x0, the training target of every t."""
    return x1 - x0


def data_prediction(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Follow v to the end of the line: D = x + (1 - t) v = E[x1 | x_t] for the marginal velocity."""
    return x + (1 - expand(t, x)) * v


def noise_prediction(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Follow v back to its start: N = x - t v = E[x0 | x_t] for the marginal velocity."""
    return x - expand(t, x) * v
