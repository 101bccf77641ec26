"""Conversions between velocity, score, noise prediction and data prediction, and foreign models.

With D = E[x1 | x_t], N = E[x0 | x_t], s = grad log p_t: v = D - N, D = x + (1 - t) v, N = x - t v,
s = -N / (1 - t) (Tweedie's formula; stochastic interpolants, Albergo et al. 2023, arXiv 2303.08797).
`path` holds D and N from v, which divide by nothing. Score and data prediction exist for an
independent coupling of Gaussian noise alone: after reflow D and N are only where the lines lead.

What divides by t or 1 - t is undefined at that end (at t = 0 a noise prediction is x itself whatever
the data; at t = 1 so is a data prediction): there a UserError says so.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow.path import expand

SLACK = 1e-6  # of a float32 time at an end of its range


def _times(t: Tensor | float, x: Tensor, lowest: float, highest: float, why: str) -> Tensor:
    """Shape times for broadcasting; raise UserError outside [0, 1], or at an excluded end."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    inside = (t >= 0) & (t <= 1) & (t != lowest) & (t != highest)
    if not bool(inside.all()):
        bad = t[~inside].flatten()[0] if t.ndim else t
        raise UserError(
            f"t = {bad.item():g}: {why if 0 <= bad <= 1 else 'expected times in [0, 1]'}"
        )
    return expand(t, x)


def score_from_velocity(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """s = (t v - x) / (1 - t), which is -x at t = 0. x, v: [B, ...]; t: [B] or a float, in [0, 1)."""
    t = _times(t, x, -1, 1, "a velocity does not tell the score of the data itself; use t < 1")
    return (t * v - x) / (1 - t)


def velocity_from_score(x: Tensor, s: Tensor, t: Tensor | float) -> Tensor:
    """v = (x + (1 - t) s) / t. x, s: [B, ...]; t: [B] or a float, in (0, 1]; at t = 1 it is x."""
    t = _times(t, x, 0, -1, "the score of pure noise does not tell a velocity; use t > 0")
    return (x + (1 - t) * s) / t


def noise_from_score(s: Tensor, t: Tensor | float) -> Tensor:
    """N = -(1 - t) s, at any t in [0, 1]. s: [B, ...]; t: [B] or a float."""
    return -(1 - _times(t, s, -1, -1, "")) * s


def score_from_noise(n: Tensor, t: Tensor | float) -> Tensor:
    """s = -N / (1 - t). n: [B, ...], a noise prediction; t: [B] or a float, in [0, 1)."""
    t = _times(t, n, -1, 1, "a noise prediction does not tell the score of the data; use t < 1")
    return -n / (1 - t)


def data_from_score(x: Tensor, s: Tensor, t: Tensor | float) -> Tensor:
    """D = (x + (1 - t)^2 s) / t (Tweedie). x, s: [B, ...]; t: [B] or a float, in (0, 1]."""
    t = _times(t, x, 0, -1, "the score of pure noise does not tell the data; use t > 0")
    return (x + (1 - t) ** 2 * s) / t


def velocity_from_data(x: Tensor, d: Tensor, t: Tensor | float) -> Tensor:
    """v = (D - x) / (1 - t). x, d: [B, ...], d a data prediction; t: [B] or a float, in [0, 1)."""
    t = _times(t, x, -1, 1, "a data prediction does not tell a velocity there; use t < 1")
    return (d - x) / (1 - t)


def velocity_from_noise(x: Tensor, n: Tensor, t: Tensor | float) -> Tensor:
    """v = (x - N) / t. x, n: [B, ...], n a noise prediction; t: [B] or a float, in (0, 1]."""
    t = _times(t, x, 0, -1, "a noise prediction does not tell a velocity there; use t > 0")
    return (x - n) / t


def velocity_from_ends(d: Tensor, n: Tensor) -> Tensor:
    """v = D - N, at any t. d, n: [B, ...], data and noise prediction."""
    return d - n


class Foreign:
    """A velocity field from a model of x1 + sigma x0 (EDM) or its variance-preserving scaling.

    model(y, sigma): y [B, ...], sigma [B] = (1 - t) / t. kind "data": it predicts x1, as EDM's denoiser
    D(y, sigma) does (Karras et al. 2022, arXiv 2206.00364); "noise": it predicts x0, as DDPM's network
    does. y is x_t / t, or with variance_preserving x_t / sqrt(t^2 + (1 - t)^2), of unit variance.
    sigma_min, sigma_max: the noise levels that the model knows.

    An instance is v(x, t) for t in [t_min, t_max] = [1 / (1 + sigma_max), 1 / (1 + sigma_min)], and
    raises UserError outside: start with `start(x0)` at t_min, and at t_max take the last step to
    t = 1 by `finish`.
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
        """Give the model's prediction at x_t, and t for broadcasting."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if not bool(((t >= self.t_min - SLACK) & (t <= self.t_max + SLACK)).all()):
            raise UserError(
                f"t from {t.min().item():g} to {t.max().item():g}: this model knows the noise levels "
                f"of t in [{self.t_min:g}, {self.t_max:g}] only; start(x0) begins there, finish ends"
            )
        wide = expand(t, x)
        scale = (wide**2 + (1 - wide) ** 2).sqrt() if self.variance_preserving else wide
        return self.model(x / scale, ((1 - t) / t).expand(len(x))), wide

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Evaluate the velocity. x: [B, ...]; t: [B] or a float, in [t_min, t_max] -> [B, ...]."""
        out, wide = self._predict(x, t)
        return (out - x) / (1 - wide) if self.kind == "data" else (x - out) / wide

    def start(self, x0: Tensor) -> Tensor:
        """Give x at t_min from noise: (1 - t_min) x0; the data's share there is below 1 / sigma_max."""
        return (1 - self.t_min) * x0

    def finish(self, x: Tensor) -> Tensor:
        """Take the last step, t_max to 1, by the data prediction. x: [B, ...] at t_max."""
        out, t = self._predict(x, self.t_max)
        return out if self.kind == "data" else (x - (1 - t) * out) / t
