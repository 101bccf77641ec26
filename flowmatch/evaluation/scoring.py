"""What samples are worth beside real data: every measure of one set of samples, and its floor.

Points are scored by a distance alone. Images are scored on features: Frechet and kernel distance,
precision and recall, and how near they come to the images of training.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.data.dataset import Data
from flowmatch.evaluation import features, metrics
from flowmatch.flow.noise import Order

NEIGHBOURS = 5  # k of precision and recall


def embed_data(data: Data, count: int, seed: int, module: Any, device: torch.device) -> Tensor:
    """Give the features of the first items of data in the order of a seed; float64 [count, D]."""
    ids = Order(len(data), seed)(np.arange(count))
    parts = np.split(ids, range(features.BATCH, count, features.BATCH))
    return torch.cat([features.embed(data.batch(part)["x1"].to(device), module) for part in parts])


def same(a: Data, b: Data) -> bool:
    """Tell whether two sets of one shape hold the same items: as many, and 64 of them are equal.

    Their digests do not tell: those of files are of a whole folder, whatever the split.
    """
    ids = Order(a.count, 0)(np.arange(min(64, a.count)))
    return a.count == b.count and torch.equal(a.batch(ids)["x1"], b.batch(ids)["x1"])


class Scorer:
    """Real samples that others are held against, with what is known of them already."""

    def __init__(
        self,
        kind: str,
        reference: Tensor,
        module: Any = None,
        training: Tensor | None = None,
        apart: bool = False,
    ):
        """kind: frechet, on the features of module (None: the values), or sliced_wasserstein.

        reference: [N, ...] real samples in random order. training: features of the images that the
        models have seen, [M, D], in random order; apart: the reference is the beginning of these very
        images, and is to find neighbours other than itself.
        """
        self.kind, self.module = kind, module
        self.training, self.apart = training, apart
        self.real = self.features(reference)
        self.radius = None if kind != "frechet" else metrics.radii(self.real, NEIGHBOURS)

    def features(self, x: Tensor) -> Tensor:
        """Give what the measures look at."""
        return x if self.kind == "sliced_wasserstein" else features.embed(x, self.module)

    def floor(self) -> dict[str, float]:
        """Measure real samples against real ones, and all of them against training.

        They are the reference and as many images of training, so that chance is what it is for a
        model; where these are too few or the same, the two halves of the reference. `samples` is the
        size of a side.
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
        """Measure samples by everything there is. x: [N, ...]; images in [-1, 1]."""
        fake = self.features(x)
        found = {"distance": self.distance(self.real, fake)}
        if self.radius is not None:
            found |= self.qualities(self.real, self.radius, fake)
        if self.training is not None:
            found["nearest"] = metrics.nearest(fake, self.training)
        return found

    def distance(self, real: Tensor, fake: Tensor) -> float:
        """Measure the distance of the two sets."""
        if self.kind == "sliced_wasserstein":
            return metrics.sliced_wasserstein(real, fake)
        return metrics.frechet(real, fake)

    @staticmethod
    def qualities(real: Tensor, radius: Tensor, fake: Tensor) -> dict[str, float]:
        """Measure kernel distance, precision and recall. radius: of each real sample."""
        return {
            "kernel": metrics.kernel(real, fake),
            "precision": metrics.covered(fake, real, radius),
            "recall": metrics.covered(real, fake, metrics.radii(fake, NEIGHBOURS)),
        }
