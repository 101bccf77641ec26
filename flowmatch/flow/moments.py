"""Matching of moments: features move along the optimal transport between two normal distributions.

The Frechet distance |m - n|^2 + tr(S + R - 2 (R^1/2 S R^1/2)^1/2) is the squared Wasserstein distance of
N(m, S) and N(n, R), with the moments of generated features and of the target's. Its optimal map is
T(f) = n + A (f - m), A = R^1/2 (R^1/2 S R^1/2)^-1/2 R^1/2 (Dowson and Landau 1982), and its gradient in
a generated feature f of N is 2 (f - T(f)) / N. So |f - T(f)|^2, with T held constant, has the gradient
of the distance, and the distance as its mean.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

RIDGE = 1e-3  # added to both covariances, as a share of the target's mean variance


class Moments:
    """The moments of generated features beside those of a target.

    Generated moments are averages over the newest samples, in which a batch counts B / window.

    Args:
        target: Features of the target, [N, D] a part, two rows or more in all.
        window: Generated samples that an average reaches back to.
    """

    def __init__(self, target: Iterable[Tensor], window: int):
        count, total, products = 0, torch.zeros(()), torch.zeros(())
        for part in target:
            part = part.double()
            count, total, products = (
                count + len(part),
                total + part.sum(0),
                products + part.T @ part,
            )
        assert count > 1, "a target of two samples or more"
        self.target, second = total / count, products / count
        covariance = second - self.target[:, None] * self.target
        self.scale = covariance.trace().clamp(min=torch.finfo(torch.float32).tiny)
        self.ridge = (
            RIDGE * self.scale / len(covariance) * torch.eye(len(covariance)).to(covariance)
        )
        self.root = power(covariance + self.ridge, 0.5)  # R^1/2
        self.window = window
        self.mean, self.second = self.target, second  # of generated features
        self._map: Tensor | None = None

    @property
    def map(self) -> Tensor:
        """A of the transport f -> n + A (f - m), [D, D], float64."""
        if self._map is None:
            covariance = self.second - self.mean[:, None] * self.mean + self.ridge
            self._map = self.root @ power(self.root @ covariance @ self.root, -0.5) @ self.root
        return self._map

    def errors(self, f: Tensor) -> Tensor:
        """Return |f - T(f)|^2 / tr R, whose mean is the Frechet distance over the target's variance.

        Args:
            f: Generated features, [B, D].

        Returns:
            One number for each sample, [B].
        """
        with torch.no_grad():
            moved = self.target + (f.double() - self.mean) @ self.map
        return (f - moved.to(f)).square().sum(1) / self.scale.to(f)

    def fill(self, f: Tensor) -> None:
        """Begin with the moments of some generated features, [N, D]."""
        self._count(f, 1.0)

    def add(self, f: Tensor) -> None:
        """Count a batch of generated features, [B, D]."""
        self._count(f, min(1.0, len(f) / self.window))

    @torch.no_grad()
    def _count(self, f: Tensor, share: float) -> None:
        f = f.double()
        mean, second = f.mean(0), f.T @ f / len(f)
        finite = (
            mean.isfinite().all() & second.isfinite().all()
        )  # else the run stops, and keeps these
        self.mean = torch.where(finite, torch.lerp(self.mean, mean, share), self.mean)
        self.second = torch.where(finite, torch.lerp(self.second, second, share), self.second)
        self._map = None

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {"mean": self.mean, "second": self.second}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take what a checkpoint held."""
        self.mean, self.second = (saved[name].to(self.target) for name in ("mean", "second"))
        self._map = None


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a symmetric matrix with positive eigenvalues; on a GPU this waits for it.

    Args:
        matrix: [D, D], float64.
        exponent: Such as 0.5.
    """
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[-1] * torch.finfo(values.dtype).eps
    return vectors * values.clamp(min=floor) ** exponent @ vectors.T
