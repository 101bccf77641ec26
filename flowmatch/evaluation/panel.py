"""The panel of an evaluation: several feature spaces, several measures in each, an interval on each.

Each resample draws samples and real ones with replacement (Efron 1979); all rows share the draws, which
makes their differences and ratios more precise than each of them. The neighbourhoods of precision,
recall, density and coverage are those of the whole sets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data.dataset import Data
from flowmatch.evaluation import features, scoring
from flowmatch.evaluation.spaces import Space
from flowmatch.flow import noise

RESAMPLES = 200
CHUNK = 1 << 21  # values of a matrix of distances at a time: they stay in a processor's cache
SLACK = 1 + 1e-9  # rounding of a squared distance that equals a squared radius
MEASURES = (
    *("frechet", "precision", "recall", "density", "coverage", "nearest", "diversity"),
    "diversity_ratio",
)


def weights(count: int, seed: int, which: int) -> Tensor:
    """Draw how often each sample is in each resample.

    Args:
        count: Number of samples.
        seed: Of the draws.
        which: Number of the set: 0 generated, 1 real.

    Returns:
        float64 [1 + RESAMPLES, count], each row of sum count; row 0 is the set itself.
    """
    drawn = noise.generator(seed, which, noise.BOOTSTRAP).integers(count, size=(RESAMPLES, count))
    again = [np.bincount(row, minlength=count) for row in drawn]
    return torch.from_numpy(np.stack([np.ones(count), *again]).astype(np.float64))


def interval(values: Tensor, centred: bool = False) -> dict[str, float]:
    """Return a value and its 95% interval, the percentiles of its resamples.

    Args:
        values: [1 + RESAMPLES]; the first is that of the set itself.
        centred: Move the resamples' mean to the value: resamples have fewer different samples, by
            which a Frechet distance grows. The interval is for sets of the same size.

    Returns:
        `value`, `low` and `high`.
    """
    value, again = float(values[0]), values[1:].cpu().numpy()
    low, high = np.quantile(again, [0.025, 0.975]) - (again.mean() - value if centred else 0.0)
    return {"value": value, "low": float(max(0.0, low)), "high": float(high)}


@dataclass(frozen=True)
class Cloud:
    """The features of a set, and how often each sample is in each resample.

    x: float64 [N, D]. weights: [1 + RESAMPLES, N]. classes: int64 [N], as the judge sees them.
    """

    x: Tensor
    weights: Tensor
    classes: Tensor

    @cached_property
    def radii(self) -> Tensor:
        """The squared distances to the k-th nearest neighbour in the set, [N]."""
        k = scoring.NEIGHBOURS
        if len(self.x) <= k:
            raise UserError(f"{len(self.x)} samples cannot have {k} neighbours each")
        found = [
            d.topk(k, largest=False).values[:, -1] for _, d in _squares(self.x, self.x, apart=True)
        ]
        return torch.cat(found)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Means [1 + RESAMPLES, D] and covariances [1 + RESAMPLES, D, D] of the resamples."""
        n = len(self.x)
        centre = self.x.mean(0)
        x = self.x - centre  # so that no digits cancel
        means = self.weights @ x / n
        products = torch.stack([(x * w[:, None]).T @ x for w in self.weights])
        squares = means[:, :, None] * means[:, None, :]
        return means + centre, (products - n * squares) / (n - 1)

    @cached_property
    def roots(self) -> Tensor:
        """The square roots of the covariances."""
        found, vectors = torch.linalg.eigh(self.moments[1])
        return (vectors * found.clamp(min=0).sqrt()[:, None]) @ vectors.mT

    def mean(self, column: Tensor) -> Tensor:
        """Average a column [N] of numbers of samples in each resample: [1 + RESAMPLES]."""
        return self.weights @ column.double() / len(self.x)


def _squares(a: Tensor, b: Tensor, apart: bool = False) -> Any:
    """Yield the first row and the squared distances of some rows of a to all of b: [rows, len(b)].

    apart: a is the beginning of b; the distance of a row to itself counts as infinite.
    """
    centre = b.mean(0)
    a, b = a - centre, b - centre
    own, other = a.square().sum(1), b.square().sum(1)
    rows = max(1, CHUNK // len(b))
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        d = torch.addmm(other, a[part], b.T, alpha=-2).add_(own[part, None]).clamp_(min=0)
        if apart:
            place = torch.arange(len(d), device=d.device)
            d[place, start + place] = torch.inf
        yield start, d


def frechet(real: Cloud, fake: Cloud) -> Tensor:
    """Compute the Frechet distance, as `metrics.frechet` defines it, of each resample: [1 + RESAMPLES].

    The trace of (S1 S2)^(1/2) is that of (S1^(1/2) S2 S1^(1/2))^(1/2).
    """
    (m1, s1), (m2, s2) = real.moments, fake.moments
    inner = torch.linalg.eigvalsh(real.roots @ s2 @ real.roots).clamp(min=0).sqrt().sum(1)
    traces = (s1 + s2).diagonal(dim1=1, dim2=2).sum(1)
    return ((m1 - m2).square().sum(1) + traces - 2 * inner).clamp(min=0)


def neighbourhoods(real: Cloud, fake: Cloud) -> dict[str, Tensor]:
    """Compute precision, recall, density and coverage of each resample: [1 + RESAMPLES] each.

    Precision and recall as in `metrics.covered`. Naeem et al. 2020, arXiv 2002.09797: density (eq. 4) is
    the mean number of neighbourhoods of real samples that hold a generated one, over k; coverage
    (eq. 5) is the share of neighbourhoods of real samples that hold at least one.
    """
    real_radii, fake_radii = real.radii * SLACK, fake.radii * SLACK
    counts = []
    covered = torch.zeros(len(real.x), dtype=torch.bool, device=real.x.device)
    recalled = covered.clone()
    for start, d in _squares(fake.x, real.x):
        inside = d <= real_radii
        counts.append(inside.sum(1))
        covered |= inside.any(0)
        recalled |= (d <= fake_radii[start : start + len(d), None]).any(0)
    count = torch.cat(counts)
    return {
        "precision": fake.mean(count > 0),
        "recall": real.mean(recalled),
        "density": fake.mean(count) / scoring.NEIGHBOURS,
        "coverage": real.mean(covered),
    }


def nearest(cloud: Cloud, training: Tensor, apart: bool = False) -> Tensor:
    """Compute the mean distance to the nearest training image, of each resample: [1 + RESAMPLES].

    Args:
        cloud: The samples.
        training: Features of the training images, [M, D].
        apart: Whether the samples are the first training images; none is then its own nearest.
    """
    found = [d.min(1).values for _, d in _squares(cloud.x, training, apart)]
    return cloud.mean(torch.cat(found).sqrt())


def diversity(cloud: Cloud) -> Tensor:
    """Compute the mean distance of two samples of one class, of each resample: [1 + RESAMPLES].

    The mean over the samples of the mean distance within their class; copies of one sample in a
    resample are no pair.
    """
    total, members = torch.zeros_like(cloud.weights[:, 0]), torch.zeros_like(cloud.weights[:, 0])
    for label in cloud.classes.unique().tolist():
        kept = cloud.classes == label
        x, w = cloud.x[kept], cloud.weights[:, kept]
        distances = torch.zeros_like(total)
        for start, d in _squares(x, x):
            place = torch.arange(len(d), device=d.device)
            d[place, start + place] = 0
            distances += (w * (w[:, start : start + len(d)] @ d.sqrt())).sum(1)
        size = w.sum(1)
        pairs = size.square() - w.square().sum(1)
        there = pairs > 0
        total += torch.where(there, size * distances / pairs.clamp(min=1), 0)
        members += torch.where(there, size, 0)
    return total / members.clamp(min=1)


class Panel:
    """The measures of rows of samples in several feature spaces."""

    def __init__(
        self,
        spaces: list[Space],
        reference: Tensor,
        training: Data,
        seen: int,
        seed: int,
        *,
        apart: bool,
    ):
        """Compute the features of real images.

        Args:
            spaces: The trained feature spaces.
            reference: Real images [N, C, H, W] that samples are compared with, in random order, on the
                device of the measures.
            training: The training images.
            seen: Number of training images that the nearest is searched in.
            seed: Of the evaluation.
            apart: Whether the reference is the beginning of the training images.
        """
        self.spaces, self.seed, self.apart = spaces, seed, apart
        self.device = reference.device
        for space in spaces:
            space.net.to(self.device)
        real = self.clouds(reference, 1)
        self.real = dict(zip((space.name for space in spaces), real, strict=True))
        self.training = {
            space.name: scoring.embed_data(training, seen, seed, space.net, self.device)
            for space in spaces
        }
        self.diversities: dict[tuple[str, str], list[Tensor]] = {}

    def clouds(self, x: Tensor, which: int) -> list[Cloud]:
        """Compute the features of images in all spaces. which: As in `weights`."""
        drawn = weights(len(x), self.seed, which).to(self.device)
        found = {space.name: features.embed(x, space.net) for space in self.spaces}
        classes = self.classes(found)
        return [Cloud(values, drawn, classes) for values in found.values()]

    @torch.no_grad()
    def classes(self, found: Mapping[str, Tensor]) -> Tensor:
        """Return the classes that the first classifier sees; one class if there is none.

        Args:
            found: Name of a space -> features of the same samples, [N, D].
        """
        for space in self.spaces:
            if space.net.classes is not None:
                return space.net.head(found[space.name].float()).argmax(1)
        first = next(iter(found.values()))
        return torch.zeros(len(first), dtype=torch.int64, device=first.device)

    def add(self, model: str, x: Tensor) -> dict[str, dict[str, Any]]:
        """Measure a row.

        Args:
            model: Name of its model.
            x: Images [N, C, H, W] in [-1, 1].

        Returns:
            Name of a space -> measure -> `value`, `low` and `high`.
        """
        result = {}
        for space, cloud in zip(self.spaces, self.clouds(x, 0), strict=True):
            name = space.name
            found, spread = self.measures(self.real[name], cloud)
            found["nearest"] = interval(nearest(cloud, self.training[name]))
            self.diversities.setdefault((name, model), []).append(spread)
            result[name] = found
        return result

    @staticmethod
    def measures(real: Cloud, fake: Cloud) -> tuple[dict[str, Any], Tensor]:
        """Compute all measures but the distance to training images; and the diversity's resamples."""
        spread = diversity(fake)
        found = {"frechet": interval(frechet(real, fake), centred=True)}
        found |= {name: interval(values) for name, values in neighbourhoods(real, fake).items()}
        return found | {"diversity": interval(spread)}, spread

    def ratio(self, space: str, spread: Tensor) -> dict[str, float]:
        """Compare a diversity with that of the teacher's last row, which has to be measured before."""
        return interval(spread / self.diversities[space, "teacher"][-1].clamp(min=1e-12))

    def floor(self) -> dict[str, dict[str, Any]]:
        """Compare real images with real ones, as `scoring.Scorer.floor` chooses them.

        Returns:
            Name of a space -> the measures of `add`, and `samples`, the size of each set.
        """
        result = {}
        n = len(next(iter(self.real.values())).x)
        whole = not self.apart and len(next(iter(self.training.values()))) >= n
        n = n if whole else n // 2
        drawn = [weights(n, self.seed, which).to(self.device) for which in (0, 1)]
        known = self.classes({name: x[:n] for name, x in self.training.items()})
        for space in self.spaces:
            real, training = self.real[space.name], self.training[space.name]
            a = Cloud(real.x[:n], drawn[1], real.classes[:n])
            if whole:
                b = Cloud(training[:n], drawn[0], known)
            else:
                b = Cloud(real.x[n : 2 * n], drawn[0], real.classes[n : 2 * n])
            found, spread = self.measures(a, b)
            found["nearest"] = interval(nearest(real, training, self.apart))
            found["diversity_ratio"] = self.ratio(space.name, spread)
            result[space.name] = found | {"samples": n}
        return result

    def result(self, rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """Return the panel's part of metrics.json.

        Args:
            rows: Model -> a dict for each row: `steps`, and `panel`, what `add` returned for it.
        """
        floors = self.floor()
        found: dict[str, Any] = {"resamples": RESAMPLES, "neighbours": scoring.NEIGHBOURS}
        found["spaces"] = {}
        for space in self.spaces:
            name = space.name
            entry: dict[str, Any] = {**space.facts, "floor": floors[name]}
            for model, made in rows.items():
                entry[model] = [
                    {
                        "steps": row["steps"],
                        **row["panel"][name],
                        "diversity_ratio": self.ratio(name, spread),
                    }
                    for row, spread in zip(made, self.diversities[name, model], strict=True)
                ]
            found["spaces"][name] = entry
        return found
