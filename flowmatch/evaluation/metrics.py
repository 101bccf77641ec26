"""Distances between sets of samples, and how straight a flow is.

Two exact, independent sets already differ: every distance here is to be read beside the distance of
real data to real data (`scoring.Scorer.floor`). Those of features take what
`features.embed` gives: float64 matrices, [N, num_features].
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowmatch.config import UserError
from flowmatch.flow import noise

WIDEST = 4096  # features of a Frechet distance: their covariance matrix takes a cubic time
PANEL = 1 << 24  # values of a matrix of distances, or of a kernel, that are held at a time


class _Matrix(nn.Module):
    """Features as torchmetrics wants them of a module, where they are computed already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def check(real: Tensor, fake: Tensor) -> None:
    """Raise UserError unless both are matrices of finite features, of one width, two rows or more."""
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) < 2:
        raise UserError(
            f"a distance between features {list(real.shape)} and {list(fake.shape)}; expected two or "
            "more samples each, of one shape"
        )
    for name, x in (("real", real), ("generated", fake)):
        if not x.isfinite().all():
            raise UserError(f"the features of the {name} samples hold NaN or inf")


def frechet(real: Tensor, fake: Tensor, batch: int = 256) -> float:
    """Measure the Frechet distance between Gaussian fits of two sets of features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6), in
    float64 by torchmetrics. real, fake: [N, D]. Raises UserError for what `check` refuses, and for
    too many features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    check(real, fake)
    width = real.shape[1]
    if width > WIDEST:
        raise UserError(f"a Frechet distance on {width} values a sample; use a feature module")
    # No sync: one rank may score alone while others of its process group do something else.
    metric = FrechetInceptionDistance(_Matrix(width), normalize=True, sync_on_compute=False)
    metric.to(real.device).eval()
    for x, is_real in ((real, True), (fake, False)):
        for part in x.double().split(batch):
            metric.update(part.to(real.device), real=is_real)
    return max(0.0, float(metric.compute()))


def kernel(real: Tensor, fake: Tensor) -> float:
    """Measure the kernel distance (KID) of two sets of features; below 0 by chance at times.

    The unbiased squared maximum mean discrepancy under k(a, b) = (a.b / D + 1)^3 (Binkowski et al.
    2018, arXiv 1801.01401, eq. 4), over all pairs rather than random subsets, in float64. real,
    fake: [N, D]. Raises UserError for what `check` refuses.
    """
    check(real, fake)
    real, fake = real.double(), fake.double()

    def total(a: Tensor, b: Tensor) -> float:
        rows = max(1, PANEL // len(b))
        return sum(float(((c @ b.T) / a.shape[1] + 1).pow(3).sum()) for c in a.split(rows))

    def within(a: Tensor) -> float:  # the mean over pairs of different rows
        own = float((a.square().sum(1) / a.shape[1] + 1).pow(3).sum())
        return (total(a, a) - own) / (len(a) * (len(a) - 1))

    return within(real) + within(fake) - 2 * total(real, fake) / (len(real) * len(fake))


def radii(x: Tensor, k: int) -> Tensor:
    """Measure the distance of each sample to its k-th neighbour in its own set. x: [N, D] -> [N]."""
    if len(x) <= k:
        raise UserError(f"{k} neighbours among {len(x)} samples; take {k + 1} or more")
    found = [d.topk(k, largest=False).values[:, -1] for d in _distances(x, x, apart=True)]
    return torch.cat(found)


def covered(x: Tensor, centres: Tensor, radius: Tensor) -> float:
    """Give the share of samples that lie within the radius of at least one centre.

    Precision is covered(fake, real, radii(real, k)), recall covered(real, fake, radii(fake, k))
    (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 to 3). x: [N, D]; centres: [M, D]; radius: [M].
    """
    inside = [(d <= radius).any(dim=1) for d in _distances(x, centres)]
    return float(torch.cat(inside).double().mean())


def nearest(x: Tensor, among: Tensor, apart: bool = False) -> float:
    """Give the median distance of samples to the nearest of a set. x: [N, D]; among: [M, D].

    apart: x is the beginning of `among`, and no sample is its own neighbour.
    """
    found = [d.min(dim=1).values for d in _distances(x, among, apart)]
    return float(torch.cat(found).median())


def _distances(a: Tensor, b: Tensor, apart: bool = False) -> Iterator[Tensor]:
    """Yield the Euclidean distances of some rows of a to all of b: [rows, len(b)].

    apart: a is the beginning of b; what a row is from itself counts as infinite.
    """
    start = 0
    for part in a.split(max(1, PANEL // len(b))):
        d = torch.cdist(part, b)
        if apart:
            rows = torch.arange(len(part), device=d.device)
            d[rows, start + rows] = torch.inf
        start += len(part)
        yield d


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Measure the sliced Wasserstein-2 distance of two sets: the root of the mean square.

    (Bonneel et al. 2015, Sliced and Radon Wasserstein barycenters of measures.) a, b: [N, ...] with the
    same N; the directions depend on seed alone. Float64. Raises UserError for unequal shapes.
    """
    if a.shape != b.shape or not len(a):
        raise UserError(
            f"a sliced Wasserstein distance between {list(a.shape)} and {list(b.shape)}; expected as "
            "many samples in both, of one shape"
        )
    a, b = a.flatten(1).double(), b.flatten(1).double()
    drawn = noise.normal(seed, range(projections), (a.shape[1],), noise.DIRECTIONS)
    directions = functional.normalize(torch.from_numpy(drawn).double(), dim=1).to(a.device)
    total = 0.0
    for part in directions.split(32):  # 32 columns of N values at a time
        gap = (a @ part.T).sort(dim=0).values - (b @ part.T).sort(dim=0).values
        total += float(gap.square().mean(dim=0).sum())
    return (total / projections) ** 0.5


@torch.no_grad()
def straightness(
    v: Callable[..., Tensor],
    x0: Tensor,
    cond: dict[str, Tensor] | None = None,
    *,
    steps: int = 50,
    batch: int = 256,
    span: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """Estimate how far a flow's own paths are from straight lines; 0 is straight.

    span: the times between which v is valid, if not all.

    S = mean_i E|(x1 - x0) - v(x_ti, ti)|^2 over an Euler path of `steps` uniform steps (arXiv
    2209.03003, section 2.2). v(x, t), or v(x, t, cond) where cond is given; x0: [N, ...] noise; cond:
    tensors [N]. Returns `straightness`, summed over a sample's values, and `normalised`, divided by
    E|x1 - x0|^2. Raises UserError for fewer than 50 steps.
    """
    if steps < 50:
        raise UserError(f"straightness on a path of {steps} steps; use 50 or more")
    variance = distance = 0.0
    for start in range(0, len(x0), batch):
        x = (1 - span[0]) * x0[start : start + batch]
        given = () if cond is None else ({k: c[start : start + batch] for k, c in cond.items()},)
        # x1 - x0 is the mean of the path's velocities, S their variance: Welford's running moments
        mean, moment = torch.zeros_like(x, dtype=torch.float64), 0.0
        for i in range(steps):
            velocity = v(x, span[0] + (span[1] - span[0]) * i / steps, *given)
            gap = velocity.double() - mean
            mean += gap / (i + 1)
            moment += float((gap * (velocity.double() - mean)).sum())
            x = x + (span[1] - span[0]) * velocity / steps
        variance += moment / steps
        distance += float(mean.square().sum())
    return {
        "straightness": variance / len(x0),
        "normalised": variance / distance if distance else 0.0,
    }
