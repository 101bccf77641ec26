"""Distances between sets of samples, and the straightness of a flow.

Two independent, exact sets already differ. Compare every distance with that between real data and real
data (`scoring.Scorer.floor`). Distances between features take the output of `features.embed`: float64
matrices [N, num_features].
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from flowmatch.config import UserError
from flowmatch.flow import noise

WIDEST = 4096  # features of a Frechet distance: its time grows with the cube of their number
PANEL = 1 << 24  # values of a matrix of distances, or of a kernel, held in memory at a time


def check(real: Tensor, fake: Tensor) -> None:
    """Check that two sets of features can be compared.

    Args:
        real: [N, D].
        fake: [M, D].

    Raises:
        UserError: Unless both are matrices of finite values with one width and at least two rows.
    """
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) < 2:
        raise UserError(
            f"cannot compare features {list(real.shape)} and {list(fake.shape)}; expected two or more "
            "samples in each set, all of one shape"
        )
    for name, x in (("real", real), ("generated", fake)):
        if not x.isfinite().all():
            raise UserError(f"the features of the {name} samples contain NaN or inf")


def frechet(real: Tensor, fake: Tensor, batch: int = 256) -> float:
    """Compute the Frechet distance between Gaussian fits of two sets of features, in float64.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6). The
    trace of the root is the sum of the roots of the eigenvalues of S1 S2. The operations and their
    order are those of torchmetrics' FrechetInceptionDistance, whose import costs seconds.

    Args:
        real: [N, D].
        fake: [M, D].
        batch: Rows summed at a time.

    Returns:
        The squared distance, at least 0.

    Raises:
        UserError: For sets that `check` rejects, and for more than WIDEST features.
    """
    check(real, fake)
    width = real.shape[1]
    if width > WIDEST:
        raise UserError(
            f"a Frechet distance takes at most {WIDEST} values per sample, not {width}; use a feature "
            "network"
        )
    m1, s1 = _moments(real, batch)
    m2, s2 = _moments(fake.to(real.device), batch)
    root = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    return max(0.0, float((m1 - m2).square().sum() + (s1.trace() + s2.trace()) - 2 * root))


def _moments(x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D] of the rows of x, in float64."""
    n, width = x.shape
    total = torch.zeros(width, dtype=torch.float64, device=x.device)
    products = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    for part in x.double().split(batch):
        total += part.sum(dim=0)
        products += part.T @ part
    mean = total / n
    return mean, (products - n * (mean[:, None] @ mean[None])) / (n - 1)


def kernel(real: Tensor, fake: Tensor, within_real: float | None = None) -> float:
    """Compute the kernel distance (KID) between two sets of features, in float64.

    The unbiased squared maximum mean discrepancy (Binkowski et al. 2018, arXiv 1801.01401, eq. 4) for
    k(a, b) = (a.b / D + 1)^3, over all pairs instead of random subsets. Unbiased, so values below 0
    occur.

    Args:
        real: [N, D].
        fake: [M, D].
        within_real: `kernel_within(real)`, if it is known already.

    Raises:
        UserError: For sets that `check` rejects.
    """
    check(real, fake)
    within = kernel_within(real) if within_real is None else within_real
    between = 2 * _kernel_sum(real.double(), fake.double()) / (len(real) * len(fake))
    return within + kernel_within(fake) - between


def kernel_within(x: Tensor) -> float:
    """Compute the mean of the kernel of `kernel` over all pairs of different rows. x: [N, D]."""
    x = x.double()
    own = float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())
    return (_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    rows = max(1, PANEL // len(b))
    return sum(float(((part @ b.T) / a.shape[1] + 1).pow(3).sum()) for part in a.split(rows))


def radii(x: Tensor, k: int) -> Tensor:
    """Compute the distance of each sample to its k-th nearest neighbour in the set.

    Args:
        x: [N, D].
        k: Below N; a sample is not its own neighbour.

    Returns:
        [N].

    Raises:
        UserError: For k samples or fewer.
    """
    if len(x) <= k:
        raise UserError(f"{len(x)} samples cannot have {k} neighbours each; use {k + 1} or more")
    found = [d.topk(k, largest=False).values[:, -1] for d in _distances(x, x, apart=True)]
    return torch.cat(found)


def covered(x: Tensor, centres: Tensor, radius: Tensor) -> float:
    """Compute the share of samples within the radius of at least one centre.

    Precision is covered(fake, real, radii(real, k)), recall covered(real, fake, radii(fake, k))
    (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 to 3).

    Args:
        x: Samples [N, D].
        centres: [M, D].
        radius: Of each centre, [M].

    Returns:
        A number in [0, 1].
    """
    inside = [(d <= radius).any(dim=1) for d in _distances(x, centres)]
    return float(torch.cat(inside).double().mean())


def nearest(x: Tensor, among: Tensor, apart: bool = False) -> float:
    """Compute the median distance of samples to their nearest neighbour in a set.

    Args:
        x: Samples [N, D].
        among: The set, [M, D].
        apart: Whether x is the beginning of `among`; a sample is then not its own neighbour.

    Returns:
        The lower median.
    """
    found = [d.min(dim=1).values for d in _distances(x, among, apart)]
    return float(torch.cat(found).median())


def _distances(a: Tensor, b: Tensor, apart: bool = False) -> Iterator[Tensor]:
    """Yield the Euclidean distances of some rows of a to all rows of b: [rows, len(b)].

    apart: a is the beginning of b; the distance of a row to itself counts as infinite.
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
    """Compute the sliced Wasserstein-2 distance between two sets, in float64.

    The root of the mean square over random directions (Bonneel et al. 2015, Sliced and Radon
    Wasserstein barycenters of measures).

    Args:
        a: [N, ...].
        b: The same shape as a.
        projections: Number of directions.
        seed: The directions depend on it alone.

    Raises:
        UserError: For sets of different shapes, and for empty ones.
    """
    if a.shape != b.shape or not len(a):
        raise UserError(
            f"cannot compute a sliced Wasserstein distance between {list(a.shape)} and "
            f"{list(b.shape)}; expected two sets of the same size and shape"
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
    """Estimate how far the paths of a flow are from straight lines; 0 is straight.

    S = mean_i E|(x1 - x0) - v(x_ti, ti)|^2 over an Euler path of uniform steps (Liu et al. 2022, arXiv
    2209.03003, section 2.2).

    Args:
        v: v(x, t), or v(x, t, cond) if cond is given.
        x0: Noise [N, ...].
        cond: Tensors [N].
        steps: Steps of the path, at least 50.
        batch: Samples integrated together.
        span: Times between which v is valid.

    Returns:
        `straightness`: S, summed over the values of a sample; `normalised`: S / E|x1 - x0|^2.

    Raises:
        UserError: For fewer than 50 steps.
    """
    if steps < 50:
        raise UserError(f"straightness cannot be estimated from {steps} steps; use 50 or more")
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
