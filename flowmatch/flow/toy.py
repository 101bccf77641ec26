"""Targets whose flow is known in closed form, against which solvers, samplers and training are tested.

For independent noise x0 ~ N(0, I) and a target x1 that is a mixture of Gaussians, every marginal of
x_t = (1 - t) x0 + t x1 is a mixture again, so the marginal velocity E[x1 - x0 | x_t], the score and
the data prediction are sums without a division by t or 1 - t: exact at both ends. (Flow straight
and fast, Liu et al. 2022, arXiv 2209.03003; stochastic interpolants, Albergo et al. 2023, arXiv
2303.08797, appendix A.)
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow import noise

RING_MODES, RING_RADIUS, RING_STD = 8, 2.5, 0.3


class GaussianMixture:
    """A mixture of K Gaussians in D dimensions, sum_k weights_k N(means_k, covariances_k).

    An instance is a velocity field: mixture(x, t) is the marginal velocity. It computes in the dtype and
    on the device of x.

    Args:
        weights: [K], positive; they are normalised.
        means: [K, D].
        covariances: [K, D, D], symmetric with positive eigenvalues.

    Raises:
        UserError: The shapes do not match, or weights or covariances are not positive.
    """

    def __init__(self, weights: Any, means: Any, covariances: Any):
        self.weights, self.means, self.covariances = (
            torch.as_tensor(value, dtype=torch.float64) for value in (weights, means, covariances)
        )
        k, *rest = self.means.shape if self.means.ndim == 2 else (0, 0)
        if self.weights.shape != (k,) or self.covariances.shape != (k, *rest, *rest) or not k:
            raise UserError(
                f"a mixture of weights {list(self.weights.shape)}, means {list(self.means.shape)}, "
                f"covariances {list(self.covariances.shape)}; expected [K], [K, D], [K, D, D]"
            )
        if not torch.allclose(self.covariances, self.covariances.mT):
            raise UserError("a mixture's covariances are not symmetric")
        self.variances, self.axes = torch.linalg.eigh(self.covariances)  # [K, D], [K, D, D]
        if not (self.weights > 0).all() or not (self.variances > 0).all():
            raise UserError(
                "a mixture's weights and the eigenvalues of its covariances must be > 0"
            )
        self.weights = self.weights / self.weights.sum()

    def _posterior(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, ...]:
        """Return gamma [B, K, 1], y in the axes of S_k [B, K, D], t [., 1, 1], variances, axes, means.

        C_k = t^2 S_k + (1 - t)^2 I, y_k = C_k^-1 (x - t mu_k), gamma_k ~ pi_k N(x; t mu_k, C_k).
        """
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise UserError(f"x is {list(x.shape)}; expected [B, {self.means.shape[1]}]")
        weights, means, variances, axes = (
            value.to(x) for value in (self.weights, self.means, self.variances, self.axes)
        )
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise UserError(f"t from {t.min():g} to {t.max():g}; expected times in [0, 1]")
        t = t.reshape(-1, 1, 1)  # [1 or B, 1, 1]
        rotated = torch.einsum("kde,bkd->bke", axes, x[:, None] - t * means)
        c = t**2 * variances + (1 - t) ** 2  # [1 or B, K, D]
        y = rotated / c
        logit = weights.log() - 0.5 * (rotated * y + c.log()).sum(2)
        return logit.softmax(1)[..., None], y, t, variances, axes, means

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return E[x1 - x0 | x_t] = sum gamma_k [mu_k + (t S_k - (1 - t) I) y_k].

        Args:
            x: [B, D].
            t: [B] or a float, in [0, 1].

        Returns:
            [B, D].

        Raises:
            UserError: x has another shape, or t another range.
        """
        gamma, y, t, variances, axes, means = self._posterior(x, t)
        parts = means + torch.einsum("kde,bke->bkd", axes, (t * variances - (1 - t)) * y)
        return (gamma * parts).sum(1)

    __call__ = velocity

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return grad log p_t(x) = -sum gamma_k y_k. x: [B, D]; t: [B] or a float."""
        gamma, y, _, _, axes, _ = self._posterior(x, t)
        return -(gamma * torch.einsum("kde,bke->bkd", axes, y)).sum(1)

    def data_prediction(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return E[x1 | x_t] = sum gamma_k [mu_k + t S_k y_k]. x: [B, D]; t: [B] or a float."""
        gamma, y, t, variances, axes, means = self._posterior(x, t)
        parts = means + torch.einsum("kde,bke->bkd", axes, t * variances * y)
        return (gamma * parts).sum(1)

    def noise_prediction(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return E[x0 | x_t] = (1 - t) sum gamma_k y_k. x: [B, D]; t: [B] or a float."""
        one = 1 - torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, 1)
        return -one * self.score(x, t)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Return the probability of each component, given data x at t = 1. [B, D] -> [B, K]."""
        return self._posterior(x, 1.0)[0][..., 0]

    def samples(self, n: int, seed: int) -> Tensor:
        """Draw n exact samples, float64 [n, D]: a function of (seed, n) alone."""
        rng = noise.generator(seed, n, noise.TOY)
        modes = rng.choice(len(self.weights), size=n, p=self.weights.numpy())
        z = torch.from_numpy(rng.standard_normal((n, self.means.shape[1])))
        scaled = z * self.variances[modes].sqrt()
        return self.means[modes] + torch.einsum("bde,be->bd", self.axes[modes], scaled)

    @property
    def mean(self) -> Tensor:
        """The mean of the mixture, [D]."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """The covariance of the mixture, [D, D]."""
        gaps = self.means - self.mean
        return torch.einsum("k,kde->de", self.weights, self.covariances) + (
            (self.weights[:, None] * gaps).T @ gaps
        )


class Gaussian(GaussianMixture):
    """A single Gaussian N(mean, covariance), whose flow is a linear map.

    mean: [D]; covariance: [D, D], symmetric with positive eigenvalues.
    """

    def __init__(self, mean: Sequence[float] | Tensor, covariance: Any):
        mean = torch.as_tensor(mean, dtype=torch.float64)
        covariance = torch.as_tensor(covariance, dtype=torch.float64)
        super().__init__(torch.ones(1), mean[None], covariance[None])

    @property
    def root(self) -> Tensor:
        """S^(1/2), symmetric, [D, D]."""
        return self.axes[0] * self.variances[0].sqrt() @ self.axes[0].T

    def flow(self, x0: Tensor, t: float = 1.0) -> Tensor:
        """Carry noise along the flow: x_t = t mu + (t^2 S + (1 - t)^2 I)^(1/2) x0.

        At t = 1 it is mu + S^(1/2) x0, which is also the optimal transport map.

        Args:
            x0: [B, D].
            t: In [0, 1].

        Returns:
            x_t, [B, D].
        """
        axes = self.axes[0].to(x0)
        scale = (t**2 * self.variances[0] + (1 - t) ** 2).sqrt().to(x0)
        return t * self.means[0].to(x0) + x0 @ (axes * scale) @ axes.T

    @property
    def loss_floor(self) -> float:
        """The smallest flow-matching loss, uniform t, squared error summed: (pi / 2) tr S^(1/2)."""
        return math.pi / 2 * float(self.variances.sqrt().sum())

    @property
    def straightness(self) -> float:
        """S(Z) of the flow (Liu et al. 2022, section 2.2): (2 - pi / 2) tr S^(1/2)."""
        return (2 - math.pi / 2) * float(self.variances.sqrt().sum())


def ring_mixture() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the weights [8], means [8, 2] and covariances [8, 2, 2] of the ring; float64."""
    angles = 2 * math.pi * np.arange(RING_MODES) / RING_MODES
    means = RING_RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    covariances = np.tile(RING_STD**2 * np.eye(2), (RING_MODES, 1, 1))
    return np.full(RING_MODES, 1 / RING_MODES), means, covariances


def ring() -> GaussianMixture:
    """Build the mixture that `data.source: ring` draws from: 8 Gaussians of std 0.3, radius 2.5."""
    return GaussianMixture(*ring_mixture())
