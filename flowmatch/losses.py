"""Losses on the velocity, one number a sample; the training loss is their mean."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from flowmatch.config import Config, option


class LossConfig(Config):
    """How the error of a velocity is weighed."""

    name: Literal["mse", "pseudo_huber"] = option("mse", "loss on the velocity, per sample")
    c: float = option(
        0.5, "pseudo_huber: where it turns from quadratic to linear, in units of |v|", gt=0
    )


def mse(v: Tensor, target: Tensor, c: LossConfig) -> Tensor:
    """Mean of the squared error over dimensions. v, target: [B, ...] -> [B]."""
    return (v - target).square().flatten(1).mean(1)


def pseudo_huber(v: Tensor, target: Tensor, c: LossConfig) -> Tensor:
    """sqrt(|e|^2 + c^2) - c, the root per sample (arXiv 2310.14189, eq. 7). [B, ...] -> [B]."""
    return ((v - target).square().flatten(1).sum(1) + c.c**2).sqrt() - c.c


LOSSES: dict[str, Callable[[Tensor, Tensor, LossConfig], Tensor]] = {
    "mse": mse,
    "pseudo_huber": pseudo_huber,
}
