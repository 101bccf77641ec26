"""Losses on the velocity, one number a sample; the training loss is their mean."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowmatch.config import UserError
from flowmatch.flow.config import LossConfig
from flowmatch.flow.path import data_prediction, velocity

NEAREST = 1e-2  # least 1 - t by which the feature loss divides


def mse(v: Tensor, target: Tensor, c: LossConfig) -> Tensor:
    """Mean of the squared error over dimensions. v, target: [B, ...] -> [B]."""
    return (v - target).square().flatten(1).mean(1)


def pseudo_huber(v: Tensor, target: Tensor, c: LossConfig) -> Tensor:
    """sqrt(|e|^2 + c^2) - c, the root per sample (arXiv 2310.14189, eq. 7). [B, ...] -> [B]."""
    return (squared(v, target) + c.c**2).sqrt() - c.c


def normalised(v: Tensor, target: Tensor, c: LossConfig) -> Tensor:
    """`weighed` |e|^2, summed over dimensions. [B, ...] -> [B]."""
    return weighed(squared(v, target), c)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2, summed over dimensions. [B, ...] -> [B]."""
    return (a - b).square().flatten(1).sum(1)


def weighed(square: Tensor, c: LossConfig) -> Tensor:
    """((s + eps)^(1 - p) - eps^(1 - p)) / (1 - p), and log(1 + s / eps) for p = 1. s: [B] -> [B].

    Its gradient is that of s / (sg s + eps)^p, sg without gradient (MeanFlow, arXiv 2505.13447; Simple
    ReFlow, arXiv 2410.07815), whose own value says little: for p = 1 it is always 1. p = 0 is s, p = .5
    twice pseudo-Huber with c^2 = eps.
    """
    if c.power == 1:
        return (square / c.eps).log1p()
    rest = 1 - c.power
    return ((square + c.eps) ** rest - c.eps**rest) / rest


LOSSES: dict[str, Callable[[Tensor, Tensor, LossConfig], Tensor]] = {
    "mse": mse,
    "pseudo_huber": pseudo_huber,
    "normalised": normalised,
}


def feature_loss(
    v: Tensor,
    x: Tensor,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    module: nn.Module,
    c: LossConfig,
) -> Tensor:
    """t H(v, x1 - x0) + F(x_t + (1 - t) v, x1) / (1 - t), H pseudo-Huber (arXiv 2405.20320).

    v: [B, ...] at x = x_t and t: [B] in [0, 1]; x0, x1: [B, ...], its pair. F(a, b) is the pseudo-Huber
    distance of module(a) and module(b), which the module gives as [B, ...] of any shape, such as the
    maps of an image classifier; gradients go through it, not to its parameters if they are frozen.
    With a power p > 0 it is `weighed` t |v - (x1 - x0)|^2 + |module(a) - module(b)|^2 / (1 - t)^2.
    Errors at the end shrink with 1 - t, so the divisor is kept above NEAREST, which leaves a factor of
    at most 1 at t = 1. Returns [B]. Raises UserError for shapes that do not fit.
    """
    if not v.shape == x.shape == x0.shape == x1.shape or t.shape != x.shape[:1]:
        shapes = ", ".join(str(list(value.shape)) for value in (v, x, x0, x1, t))
        raise UserError(f"v, x, x0, x1, t are {shapes}; expected one shape [B, ...], and t [B]")
    with torch.no_grad():
        wanted = module(x1)
    found = module(data_prediction(x, v, t))
    if found.ndim < 2 or len(found) != len(x):
        raise UserError(f"the feature module gives {list(found.shape)}; expected [{len(x)}, ...]")
    left = (1 - t).clamp(min=NEAREST)
    if c.power:
        square = t * squared(v, velocity(x0, x1)) + squared(found, wanted) / left.square()
        return weighed(square, c)
    return t * pseudo_huber(v, velocity(x0, x1), c) + pseudo_huber(found, wanted, c) / left


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def build(config: LossConfig, module: nn.Module | None = None) -> Loss:
    """Make loss(v, x, x0, x1, t) -> [B] of a velocity v at x = x_t on the pair x0, x1.

    module: of `feature`, frozen and in eval mode.
    """
    if config.name == "feature":
        assert module is not None
        return lambda v, x, x0, x1, t: feature_loss(v, x, x0, x1, t, module, config)
    return lambda v, x, x0, x1, t: LOSSES[config.name](v, velocity(x0, x1), config)
