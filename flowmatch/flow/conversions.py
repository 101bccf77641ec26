"""Conversions between velocity, score, noise prediction and data prediction, and diffusion models.

With D = E[x1 | x_t], N = E[x0 | x_t], s = grad log p_t: v = D - N, D = x + (1 - t) v, N = x - t v,
s = -N / (1 - t) (Tweedie's formula; stochastic interpolants, Albergo et al. 2023, arXiv 2303.08797).
`path` has D and N from v, which need no division. Score and data prediction exist for independent
Gaussian noise alone: after reflow D and N are only the ends of the lines.

A conversion that divides by t or 1 - t is undefined at that end (at t = 0 a noise prediction is x itself
for any data; at t = 1 a data prediction is), and raises UserError there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow.path import expand

SLACK = 1e-6  # of a float32 time at an end of its range


def _times(t: Tensor | float, x: Tensor, lowest: float, highest: float, why: str) -> Tensor:
    """Shape times for broadcasting; raise UserError outside [0, 1] and at an excluded end."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    inside = (t >= 0) & (t <= 1) & (t != lowest) & (t != highest)
    if not bool(inside.all()):
        bad = t[~inside].flatten()[0] if t.ndim else t
        raise UserError(
            f"t = {bad.item():g}: {why if 0 <= bad <= 1 else 'expected times in [0, 1]'}"
        )
    return expand(t, x)


def score_from_velocity(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Return s = (t v - x) / (1 - t), at t = 0 -x. x, v: [B, ...]; t: [B] or a float, in [0, 1)."""
    t = _times(t, x, -1, 1, "the score of the data does not follow from a velocity; use t < 1")
    return (t * v - x) / (1 - t)


def velocity_from_score(x: Tensor, s: Tensor, t: Tensor | float) -> Tensor:
    """Return v = (x + (1 - t) s) / t, at t = 1 x. x, s: [B, ...]; t: [B] or a float, in (0, 1]."""
    t = _times(t, x, 0, -1, "a velocity does not follow from the score of pure noise; use t > 0")
    return (x + (1 - t) * s) / t


def noise_from_score(s: Tensor, t: Tensor | float) -> Tensor:
    """Return N = -(1 - t) s, at any t in [0, 1]. s: [B, ...]; t: [B] or a float."""
    return -(1 - _times(t, s, -1, -1, "")) * s


def score_from_noise(n: Tensor, t: Tensor | float) -> Tensor:
    """Return s = -N / (1 - t). n: a noise prediction, [B, ...]; t: [B] or a float, in [0, 1)."""
    t = _times(t, n, -1, 1, "the score of the data does not follow from a noise; use t < 1")
    return -n / (1 - t)


def data_from_score(x: Tensor, s: Tensor, t: Tensor | float) -> Tensor:
    """Return D = (x + (1 - t)^2 s) / t (Tweedie). x, s: [B, ...]; t: [B] or a float, in (0, 1]."""
    t = _times(t, x, 0, -1, "the data does not follow from the score of pure noise; use t > 0")
    return (x + (1 - t) ** 2 * s) / t


def velocity_from_data(x: Tensor, d: Tensor, t: Tensor | float) -> Tensor:
    """Return v = (D - x) / (1 - t). x, d (a data prediction): [B, ...]; t: [B] or a float, in [0, 1)."""
    t = _times(t, x, -1, 1, "a velocity does not follow from a data prediction; use t < 1")
    return (d - x) / (1 - t)


def velocity_from_noise(x: Tensor, n: Tensor, t: Tensor | float) -> Tensor:
    """Return v = (x - N) / t. x, n (a noise prediction): [B, ...]; t: [B] or a float, in (0, 1]."""
    t = _times(t, x, 0, -1, "a velocity does not follow from a noise prediction; use t > 0")
    return (x - n) / t


def velocity_from_ends(d: Tensor, n: Tensor) -> Tensor:
    """Return v = D - N, at any t. d, n: [B, ...], data and noise prediction."""
    return d - n


class Foreign:
    """The velocity field of a diffusion model, trained on x1 + sigma x0 (EDM) or a scaling of it.

    An instance is v(x, t) for t in [t_min, t_max] = [1 / (1 + sigma_max), 1 / (1 + sigma_min)]; outside
    it raises UserError. Begin with `start(x0)` at t_min, and take the last step, from t_max to 1, with
    `finish`.

    Args:
        model: model(y, sigma) with y [B, ...] and sigma = (1 - t) / t, [B].
        kind: "data", where the model predicts x1, as EDM's denoiser does (Karras et al. 2022, arXiv
            2206.00364); or "noise", where it predicts x0, as DDPM's network does.
        sigma_min: Smallest noise level of its training.
        sigma_max: Largest noise level of its training.
        variance_preserving: y is x_t / sqrt(t^2 + (1 - t)^2), of unit variance, and not x_t / t.

    Raises:
        UserError: The kind is unknown, or the noise levels are not 0 < sigma_min < sigma_max.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        kind: str,
        *,
        sigma_min: float,
        sigma_max: float,
        variance_preserving: bool = False,
    ):
        if kind not in ("data", "noise"):
            raise UserError(f"kind={kind!r}: expected data or noise")
        if not 0 < sigma_min < sigma_max < float("inf"):
            raise UserError(
                f"sigma_min={sigma_min}, sigma_max={sigma_max}: expected 0 < sigma_min < sigma_max"
            )
        self.model, self.kind, self.variance_preserving = model, kind, variance_preserving
        self.t_min, self.t_max = 1 / (1 + sigma_max), 1 / (1 + sigma_min)

    def _predict(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the model's prediction at x_t, and t for broadcasting."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if not bool(((t >= self.t_min - SLACK) & (t <= self.t_max + SLACK)).all()):
            raise UserError(
                f"t from {t.min().item():g} to {t.max().item():g}: this model is trained on the noise "
                f"levels of t in [{self.t_min:g}, {self.t_max:g}] only; begin with start(x0), and end "
                "with finish(x)"
            )
        wide = expand(t, x)
        scale = (wide**2 + (1 - wide) ** 2).sqrt() if self.variance_preserving else wide
        return self.model(x / scale, ((1 - t) / t).expand(len(x))), wide

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Evaluate the velocity at x [B, ...] and t in [t_min, t_max] ([B] or a float)."""
        out, wide = self._predict(x, t)
        return (out - x) / (1 - wide) if self.kind == "data" else (x - out) / wide

    def start(self, x0: Tensor) -> Tensor:
        """Return x at t_min: (1 - t_min) x0, without the data, whose share is below 1 / sigma_max."""
        return (1 - self.t_min) * x0

    def finish(self, x: Tensor) -> Tensor:
        """Return the data prediction at t_max, the last step to t = 1. x: [B, ...] at t_max."""
        out, t = self._predict(x, self.t_max)
        return out if self.kind == "data" else (x - (1 - t) * out) / t
