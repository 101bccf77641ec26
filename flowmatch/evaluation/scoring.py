"""Compare samples with real data: every measure of one set of samples, and the floor.

Points are scored by a distance alone. Images are scored on features: Frechet and kernel distance,
precision and recall, and the distance to the nearest training image.
"""

import numpy as np
import torch
from torch import Tensor, nn

from flowmatch.data.dataset import Data
from flowmatch.evaluation import features, metrics
from flowmatch.flow.noise import Order

NEIGHBOURS = 5  # k of precision and recall


def embed_data(
    data: Data, count: int, seed: int, module: nn.Module | None, device: torch.device
) -> Tensor:
    """Compute the features of the first items of data in the order of a seed.

    Args:
        data: The items.
        count: Number of items, at most len(data).
        seed: Of the order.
        module: As `features.embed` takes it, on `device`.
        device: Where the features are computed.

    Returns:
        float64 [count, D], on `device`.
    """
    ids = Order(len(data), seed)(np.arange(count))
    parts = np.split(ids, range(features.BATCH, count, features.BATCH))
    return torch.cat([features.embed(data.batch(part)["x1"].to(device), module) for part in parts])


def same(a: Data, b: Data) -> bool:
    """Return whether two sets of one shape hold the same items: equal sizes and 64 equal items.

    Digests cannot answer this: that of files covers a whole folder, whatever the split.
    """
    ids = Order(a.count, 0)(np.arange(min(64, a.count)))
    return a.count == b.count and torch.equal(a.batch(ids)["x1"], b.batch(ids)["x1"])


class Scorer:
    """Real samples to compare generated ones with. What depends on them alone is computed once."""

    def __init__(
        self,
        kind: str,
        reference: Tensor,
        module: nn.Module | None = None,
        training: Tensor | None = None,
        apart: bool = False,
    ):
        """Store the real samples.

        Args:
            kind: The distance: frechet or sliced_wasserstein.
            reference: Real samples [N, ...], in random order.
            module: Feature network for frechet, as `features.embed` takes it.
            training: Features of the training images [M, D], in random order.
            apart: Whether the reference is the beginning of the training images; a real sample is
                then not its own nearest training image.
        """
        self.kind, self.module = kind, module
        self.training, self.apart = training, apart
        self.real = self.features(reference)
        self.radius: Tensor | None = None
        self.within: float | None = None
        if kind == "frechet":
            self.radius = metrics.radii(self.real, NEIGHBOURS)
            self.within = metrics.kernel_within(self.real)

    def features(self, x: Tensor) -> Tensor:
        """Return what the measures compare: features for frechet, the samples themselves otherwise."""
        return x if self.kind == "sliced_wasserstein" else features.embed(x, self.module)

    def floor(self) -> dict[str, float]:
        """Compare real samples with real ones, and all real ones with the training images.

        The two sets are the reference and as many training images, which makes chance as large as for
        a model. If there are too few of these, or they are the same images, the two sets are the
        halves of the reference.

        Returns:
            The measures of `score`, and `samples`, the size of each set.
        """
        n, seen = len(self.real), self.training
        if seen is not None and not self.apart and len(seen) >= n:
            a, b = self.real, seen[:n]
        else:
            n //= 2
            a, b = self.real[:n], self.real[n : 2 * n]
        found: dict[str, float] = {"distance": self.distance(a, b), "samples": n}
        if self.radius is not None:
            found |= self.qualities(a, metrics.radii(a, NEIGHBOURS), b)
        if self.training is not None:
            found["nearest"] = metrics.nearest(self.real, self.training, self.apart)
        return found

    def score(self, x: Tensor) -> dict[str, float]:
        """Compute every measure of some samples.

        Args:
            x: [N, ...]; images in [-1, 1].

        Returns:
            `distance`; for frechet also `kernel`, `precision` and `recall`; with training images
            also `nearest`.
        """
        fake = self.features(x)
        found = {"distance": self.distance(self.real, fake)}
        if self.radius is not None:
            found |= self.qualities(self.real, self.radius, fake, self.within)
        if self.training is not None:
            found["nearest"] = metrics.nearest(fake, self.training)
        return found

    def distance(self, real: Tensor, fake: Tensor) -> float:
        """Compute the distance between two sets of what `features` returns."""
        if self.kind == "sliced_wasserstein":
            return metrics.sliced_wasserstein(real, fake)
        return metrics.frechet(real, fake)

    @staticmethod
    def qualities(
        real: Tensor, radius: Tensor, fake: Tensor, within: float | None = None
    ) -> dict[str, float]:
        """Compute kernel distance, precision and recall.

        Args:
            real: Features [N, D].
            radius: Of each real sample, [N].
            fake: Features [M, D].
            within: `metrics.kernel_within(real)`, if it is known already.
        """
        return {
            "kernel": metrics.kernel(real, fake, within),
            "precision": metrics.covered(fake, real, radius),
            "recall": metrics.covered(real, fake, metrics.radii(fake, NEIGHBOURS)),
        }
