"""Distribution matching distillation (DMD): a gradient of the reverse KL divergence from two velocities.

With noise added to a generated sample x, y = (1 - t) e + t x, the gradient of the divergence of the
noised distributions in x is the difference of their scores, and so of the means E[x | y] that the
velocities of the generated distribution ("fake") and of the data's ("real") predict (Yin et al. 2023,
arXiv 2311.18828, eq. 7 and 8; without its regression loss: 2024, arXiv 2405.14867). Both velocities are
those of independent noise.
"""

import torch
from torch import Tensor

from flowmatch.flow import path

SMALLEST, LARGEST = 0.02, 0.98  # times of the noise


def times(u: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into times of the noise. u: [B] -> [B]."""
    return SMALLEST + (LARGEST - SMALLEST) * u


@torch.no_grad()
def direction(x: Tensor, y: Tensor, t: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return (E_fake[x | y] - E_real[x | y]) / mean |x - E_real[x | y]|, the direction of ascent.

    Args:
        x: Generated samples, [B, ...].
        y: The samples with noise, [B, ...].
        t: Times of the noise, [B].
        real: Velocity of the data's distribution at y and t, [B, ...].
        fake: Velocity of the generated one there, [B, ...].

    Returns:
        [B, ...]; 0 where the velocities are equal.
    """
    truth = path.data_prediction(y, real, t)
    scale = (x - truth).abs().flatten(1).mean(1).clamp(min=torch.finfo(x.dtype).tiny)
    return (path.data_prediction(y, fake, t) - truth) / path.expand(scale, x)


def errors(x: Tensor, ascent: Tensor) -> Tensor:
    """Return errors whose gradient in x is the ascent over the root of the number of values.

    Args:
        x: Generated samples, [B, ...].
        ascent: From `direction`, [B, ...].

    Returns:
        |ascent|^2 / (2 root), one number for each sample, [B].
    """
    target = (x - ascent).detach()
    return (x - target).square().flatten(1).sum(1) / (2 * x[0].numel() ** 0.5)
