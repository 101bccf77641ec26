"""Losses on the velocity, one number for each sample; the training loss is their mean."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowmatch.config import UserError
from flowmatch.flow.config import LossConfig
from flowmatch.flow.path import data_prediction, velocity

NEAREST = 1e-2  # smallest 1 - t by which the feature loss divides

Distance = Callable[[Tensor, Tensor], Tensor]  # (v, target), [B, ...] each -> [B]


class Loss(Protocol):
    """The errors of a velocity v at x = x_t, for the pair x0, x1."""

    def __call__(
        self, v: Tensor, x: Tensor, x0: Tensor, x1: Tensor, t: Tensor, *, u: Tensor | None = None
    ) -> Tensor:
        """Compute one number for each sample, [B]. u: uniform numbers in [0, 1), for crops, [B]."""


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Return |a - b|^2, summed over dimensions. a, b: [B, ...] -> [B]."""
    return (a - b).square().flatten(1).sum(1)


def mse(v: Tensor, target: Tensor) -> Tensor:
    """Return the squared error, its mean over dimensions. v, target: [B, ...] -> [B]."""
    return (v - target).square().flatten(1).mean(1)


def pseudo_huber(v: Tensor, target: Tensor, c: float) -> Tensor:
    """Return sqrt(|e|^2 + c^2) - c, e the error of a sample (arXiv 2310.14189, eq. 7).

    Args:
        v: Velocity, [B, ...].
        target: What it should be, [B, ...].
        c: Where the loss turns from quadratic to linear, in units of |e|; more than 0.

    Returns:
        One number for each sample, [B].
    """
    return (squared(v, target) + c**2).sqrt() - c


def weighed(square: Tensor, power: float, eps: float) -> Tensor:
    """Return ((s + eps)^(1 - p) - eps^(1 - p)) / (1 - p), and log(1 + s / eps) for p = 1.

    Its gradient is that of s / (sg s + eps)^p, where sg stops the gradient (MeanFlow, arXiv 2505.13447;
    Simple ReFlow, arXiv 2410.07815), whose own value carries no information: for p = 1 it is always 1.
    p = 0 is s, p = 0.5 twice pseudo-Huber with c^2 = eps.

    Args:
        square: s, squared errors, [B].
        power: p, in [0, 1].
        eps: In units of s; more than 0.

    Returns:
        One number for each sample, [B].
    """
    if power == 1:
        return (square / eps).log1p()
    rest = 1 - power
    return ((square + eps) ** rest - eps**rest) / rest


def normalised(v: Tensor, target: Tensor, power: float, eps: float) -> Tensor:
    """Return `weighed` |v - target|^2, summed over dimensions. v, target: [B, ...] -> [B]."""
    return weighed(squared(v, target), power, eps)


def cut(x: Tensor, side: int, u: Tensor) -> Tensor:
    """Cut a square out of each sample, every place as likely.

    Args:
        x: Samples, [B, C, H, W].
        side: Of the squares, at most H and W.
        u: Uniform numbers in [0, 1), [B]; the place in sample i is a function of u[i] alone.

    Returns:
        [B, C, side, side].
    """
    high, wide = x.shape[2] - side + 1, x.shape[3] - side + 1
    place = (u * (high * wide)).long().clamp(max=high * wide - 1)
    offset, row = torch.arange(side, device=x.device), torch.arange(len(x), device=x.device)
    down, right = (place // wide)[:, None] + offset, (place % wide)[:, None] + offset  # [B, side]
    return x[row[:, None, None], :, down[:, :, None], right[:, None, :]].movedim(-1, 1)


def feature_loss(
    v: Tensor,
    x: Tensor,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    module: nn.Module,
    *,
    u: Tensor | None = None,
    crop: int | None = None,
    c: float = 0.5,
    power: float = 0.0,
    eps: float = 1e-3,
) -> Tensor:
    """Return t H(v, x1 - x0) + F(x_t + (1 - t) v, x1) / (1 - t), H pseudo-Huber (arXiv 2405.20320).

    F(a, b) is the pseudo-Huber distance of module(a) and module(b). With a power p > 0 the loss is
    `weighed` t |v - (x1 - x0)|^2 + |module(a) - module(b)|^2 / (1 - t)^2. The errors at the end shrink
    with 1 - t; the divisor is at least NEAREST, which leaves a factor of at most 1 at t = 1.

    Args:
        v: Velocity at x and t, [B, ...].
        x: x_t, [B, ...].
        x0: Noise of the pair, [B, ...].
        x1: Data of the pair, [B, ...].
        t: Times in [0, 1], [B].
        module: Frozen; turns [B, ...] into features of any shape [B, ...], such as the maps of an image
            classifier. Gradients go through it.
        u: Uniform numbers in [0, 1) that choose the crops, [B]; needed with `crop`.
        crop: Side of the square of each sample, [C, H, W], that the module sees; None for all of it.
        c: Constant of pseudo-Huber, where `power` is 0.
        power: p, in [0, 1].
        eps: Constant of `weighed`, where `power` is more than 0.

    Returns:
        One number for each sample, [B].

    Raises:
        UserError: The shapes do not fit.
    """
    if not v.shape == x.shape == x0.shape == x1.shape or t.shape != x.shape[:1]:
        shapes = ", ".join(str(list(value.shape)) for value in (v, x, x0, x1, t))
        raise UserError(f"v, x, x0, x1, t are {shapes}; expected one shape [B, ...], and t [B]")
    found, target = data_prediction(x, v, t), velocity(x0, x1)
    if crop is not None:
        assert u is not None
        found, x1 = cut(found, crop, u), cut(x1, crop, u)
    with torch.no_grad():
        wanted = module(x1)
    predicted = module(found)
    if predicted.ndim < 2 or len(predicted) != len(x):
        raise UserError(
            f"the feature module returns {list(predicted.shape)}; expected [{len(x)}, ...]"
        )
    left = (1 - t).clamp(min=NEAREST)
    if power:
        square = t * squared(v, target) + squared(predicted, wanted) / left.square()
        return weighed(square, power, eps)
    return t * pseudo_huber(v, target, c) + pseudo_huber(predicted, wanted, c) / left


def distance(config: LossConfig) -> Distance:
    """Build the loss (v, target) -> [B] of a config; a feature loss is no function of these two."""
    if config.name == "pseudo_huber":
        return partial(pseudo_huber, c=config.c)
    if config.name == "normalised":
        return partial(normalised, power=config.power, eps=config.eps)
    assert config.name == "mse"
    return mse


def build(config: LossConfig, module: nn.Module | None = None) -> Loss:
    """Build the loss of a config.

    Args:
        config: The loss and its constants.
        module: Of the feature loss: frozen, in eval mode.

    Returns:
        The loss.
    """
    if config.name == "feature":
        assert module is not None
        how: dict[str, Any] = config.model_dump(include={"c", "power", "eps", "crop"})
        return partial(feature_loss, module=module, **how)
    measure = distance(config)
    return lambda v, x, x0, x1, t, *, u=None: measure(v, velocity(x0, x1))
