"""The straight path between noise and data, and the predictions of its ends from a velocity.

Convention everywhere in the math: x0 is noise, x1 is data, t in [0, 1] grows from noise to data.
Flow straight and fast (Liu et al. 2022, arXiv 2209.03003), eq. 1; flow matching (Lipman et al. 2022,
arXiv 2210.02747). Many papers put noise at t = 1.
"""

import torch
from torch import Tensor


def expand(t: Tensor | float, x: Tensor) -> Tensor:
    """Shape times for broadcasting. t: scalar or [B]; x: [B, ...] -> [B, 1, ...] or scalar."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t


def interpolate(x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
    """Return x_t = (1 - t) x0 + t x1. x0, x1: [B, ...]; t: [B] or a float, in [0, 1] -> [B, ...]."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1


def velocity(x0: Tensor, x1: Tensor) -> Tensor:
    """Return v = x1 - x0, the derivative of the line in t and the training target. [B, ...]."""
    return x1 - x0


def data_prediction(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Return D = x + (1 - t) v, E[x1 | x_t] for the marginal velocity. x, v: [B, ...]; t: [B]."""
    return x + (1 - expand(t, x)) * v


def noise_prediction(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Return N = x - t v, E[x0 | x_t] for the marginal velocity. x, v: [B, ...]; t: [B]."""
    return x - expand(t, x) * v
