"""Metrics: closed forms first, then what each distance must not depend on, then the refusals."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from flowmatch.config import UserError
from flowmatch.data import sources
from flowmatch.evaluation import metrics
from flowmatch.models.digest import module_digest


def exact_normal(n, mean, covariance, seed):
    """Samples whose mean and covariance (n - 1) are exactly the given ones; float64 [n, D]."""
    z = np.random.default_rng(seed).normal(size=(n, len(mean)))
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T)).T)
    return torch.from_numpy(z @ np.linalg.cholesky(covariance).T + mean)


def random_covariance(d, seed):
    root = np.random.default_rng(seed).normal(size=(d, d))
    return root @ root.T / d + 0.1 * np.eye(d)


# ---- Frechet distance


@pytest.mark.parametrize("d", [2, 5])
def test_frechet_of_gaussians_is_the_closed_form(d):
    m1, m2 = np.linspace(0, 1, d), np.linspace(-1, 2, d)
    s1, s2 = random_covariance(d, 0), random_covariance(d, 1)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    truth = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    a, b = exact_normal(300, m1, s1, 2), exact_normal(500, m2, s2, 3)
    assert metrics.frechet(a, b) == pytest.approx(truth, rel=1e-9)
    assert metrics.frechet(b, a) == pytest.approx(truth, rel=1e-9)
    assert metrics.frechet(a.float(), b.float()) == pytest.approx(truth, rel=1e-5)
    single = metrics.frechet(a.float(), b.float())
    assert single == metrics.frechet(a.float().double(), b.float().double())  # nothing rounded
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)


class Identity(nn.Module):
    """Features that are computed already, as torchmetrics takes them of a module."""

    num_features = 6

    def forward(self, x):
        return x


@pytest.mark.parametrize(("n", "m"), [(300, 500), (40, 4)])  # 4: a singular covariance
def test_frechet_is_that_of_torchmetrics(n, m):
    from torchmetrics.image.fid import FrechetInceptionDistance

    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(k, 6)) @ rng.normal(size=(6, 6)) + 3) for k in (n, m))
    metric = FrechetInceptionDistance(Identity(), normalize=True)
    for x, real in ((a, True), (b, False)):
        for part in x.split(100):
            metric.update(part, real=real)
    # four samples have a singular covariance: the root of a rounded zero is 1e-8, and differs by CPU
    wide = 1e-9 if min(n, m) > 6 else 1e-8
    assert metrics.frechet(a, b) == pytest.approx(float(metric.compute()), rel=wide)
    assert metrics.frechet(a, b, batch=7) == pytest.approx(float(metric.compute()), rel=wide)


def test_what_frechet_refuses():
    a = torch.randn(10, 3)
    for b, fault in [
        (torch.randn(10, 4), r"\[10, 3\] and \[10, 4\]"),
        (torch.randn(1, 3), "two or more samples in each"),
        (torch.full((5, 3), math.nan), "generated samples contain NaN"),
    ]:
        with pytest.raises(UserError, match=fault):
            metrics.frechet(a, b)
    wide = torch.zeros(3, 12288)
    with pytest.raises(UserError, match="at most 4096 values per sample, not 12288; use"):
        metrics.frechet(wide, wide)


# ---- kernel distance, precision and recall, neighbours


def clouds(n=70, m=50, d=4):
    a = np.random.default_rng(0).normal(size=(n, d))
    b = np.random.default_rng(1).normal(size=(m, d)) + 0.4
    return torch.from_numpy(a), torch.from_numpy(b)


def test_the_kernel_distance_is_the_sum_over_all_pairs(monkeypatch):
    a, b = clouds()

    def k(x, y):
        return (x @ y / 4 + 1) ** 3

    def mean(x, y, apart):
        values = [k(u, v) for i, u in enumerate(x) for j, v in enumerate(y) if not apart or i != j]
        return float(np.mean(values))

    truth = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert metrics.kernel(a, b) == pytest.approx(truth, rel=1e-9)
    assert metrics.kernel(a, b, metrics.kernel_within(a)) == metrics.kernel(a, b)
    monkeypatch.setattr(metrics, "PANEL", 120)  # two or three rows at a time
    assert metrics.kernel(a, b) == pytest.approx(truth, rel=1e-9)


def test_the_kernel_distance_is_that_of_torchmetrics_on_one_subset_of_everything():
    from torchmetrics.image.kid import poly_mmd

    a, b = clouds(60, 60)
    assert metrics.kernel(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_the_kernel_distance_has_no_bias():
    """Two samples of one distribution are at distance 0 on average, whatever their number."""
    found = []
    for seed in range(300):
        x = torch.from_numpy(np.random.default_rng(seed).normal(size=(20, 3)))
        found.append(metrics.kernel(x[:8], x[8:]))
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))
    assert min(found) < 0


def test_radii_and_neighbours_are_those_of_all_distances(monkeypatch):
    from scipy.spatial.distance import cdist

    a, b = clouds()
    apart = cdist(a, a)
    np.fill_diagonal(apart, np.inf)
    for panel in (1 << 24, 200):
        monkeypatch.setattr(metrics, "PANEL", panel)
        assert np.allclose(metrics.radii(a, 5), np.sort(apart, 1)[:, 4])
        assert metrics.nearest(b, a) == pytest.approx(np.sort(cdist(b, a).min(1))[24])
        head = np.sort(apart[:30].min(1))[14]  # the lower median
        assert metrics.nearest(a[:30], a, apart=True) == pytest.approx(head)
        assert metrics.nearest(a[:30], a) < 1e-6
    with pytest.raises(UserError, match="5 samples cannot have 5 neighbours each; use 6 or more"):
        metrics.radii(a[:5], 5)


def test_precision_and_recall_count_what_lies_within_the_radii():
    """Points on a line: real at 0, 1, 2, ..., 9, so that every radius is 1 with one neighbour."""
    real = torch.arange(10.0).double()[:, None]
    fake = torch.tensor([[0.5], [9.9], [10.5], [40.0], [41.0], [300.0]]).double()
    assert metrics.covered(fake, real, metrics.radii(real, 1)) == pytest.approx(2 / 6)
    # radii of the fake: 9.4, 0.6, 0.6, 1, 1, 259; the last covers 41 and more, but no real point
    assert metrics.covered(real, fake, metrics.radii(fake, 1)) == pytest.approx(10 / 10)
    one_place = torch.full((6, 1), 3.2).double()
    assert metrics.covered(one_place, real, metrics.radii(real, 1)) == 1
    assert metrics.covered(real, one_place, metrics.radii(one_place, 1)) == 0  # nothing varies


# ---- sliced Wasserstein


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    """|<u, d>| averaged in square over directions u is |d| / sqrt(D)."""
    a = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 0, 4])
    found = metrics.sliced_wasserstein(a, a[torch.randperm(200)] + shift, projections=4000)
    assert found == pytest.approx(5 / math.sqrt(3), rel=0.03)
    assert metrics.sliced_wasserstein(a, a.flip(0)) == 0


def test_sliced_wasserstein_in_one_dimension_is_exact():
    a, b = torch.tensor([[0.0], [1], [5]]), torch.tensor([[2.0], [7], [1]])
    assert metrics.sliced_wasserstein(a, b, 8) == pytest.approx(math.sqrt((1 + 1 + 4) / 3))


def test_sliced_wasserstein_depends_on_its_seed_alone():
    a, b = torch.randn(100, 4), torch.randn(100, 4) + 1
    one = metrics.sliced_wasserstein(a, b, seed=1)
    torch.manual_seed(7)
    assert metrics.sliced_wasserstein(a, b, seed=1) == one
    assert metrics.sliced_wasserstein(a, b, seed=2) != one
    images = metrics.sliced_wasserstein(a.reshape(100, 1, 2, 2), b.reshape(100, 1, 2, 2), seed=1)
    assert images == one
    with pytest.raises(UserError, match="two sets of the same size and shape"):
        metrics.sliced_wasserstein(a, b[:50])


@pytest.mark.parametrize(("n", "floor"), [(1000, 0.133), (5000, 0.056)])
def test_the_rings_floor_is_the_known_one(n, floor):
    found = []
    for seed in range(6 if n == 1000 else 3):
        points = torch.from_numpy(sources.ring_samples(np.arange(2 * n), seed)[0])
        found.append(metrics.sliced_wasserstein(points[:n], points[n:]))
    assert 0.6 * floor < np.mean(found) < 1.5 * floor


# ---- straightness


def gaussian(mean, scale):
    """The marginal velocity to N(mean, diag(scale^2)) under independent coupling (closed form)."""

    def v(x, t):
        c = t**2 * scale**2 + (1 - t) ** 2
        return mean + (t * scale**2 - (1 - t)) / c * (x - t * mean)

    return v


def test_straightness_of_the_gaussian_oracle_is_the_closed_form():
    scale, mean = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 0, -3])
    x0 = torch.randn(8000, 3, generator=torch.Generator().manual_seed(0)).double()
    found = metrics.straightness(gaussian(mean, scale), x0, steps=400, batch=3000)
    truth = (2 - math.pi / 2) * float(scale.sum())
    assert found["straightness"] == pytest.approx(truth, rel=0.03)
    distance = float(((scale - 1) ** 2).sum() + mean.square().sum())
    assert found["normalised"] == pytest.approx(truth / distance, rel=0.04)


def test_straight_flows_have_straightness_zero():
    x0 = torch.randn(100, 1, 2, 2)
    still = metrics.straightness(lambda x, t: torch.ones_like(x), x0)
    assert still == {"straightness": 0, "normalised": 0}
    assert metrics.straightness(lambda x, t: 0 * x, x0)["normalised"] == 0
    scale, mean = torch.tensor(3.0), torch.tensor(100.0)  # far away: cancellation would show

    def reflowed(x, t):  # the straight flow x1 = mean + scale x0
        return mean + (scale - 1) * (x - t * mean) / (1 - t + t * scale)

    found = metrics.straightness(reflowed, x0)
    assert found["straightness"] < 1e-6
    assert found["normalised"] < 1e-9


def test_straightness_is_the_mean_gap_to_the_models_own_end():
    """The estimator of the definition, by two passes over the stored path."""
    v, steps = gaussian(torch.tensor([1.0, 2]), torch.tensor([0.3, 1.5])), 50
    x0 = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    x, velocities = x0, []
    for i in range(steps):
        velocities.append(v(x, i / steps))
        x = x + velocities[-1] / steps
    gaps = [(x - x0 - velocity).square().sum(1).mean() for velocity in velocities]
    found = metrics.straightness(v, x0, batch=10)
    assert found["straightness"] == pytest.approx(float(torch.stack(gaps).mean()), rel=1e-4)


def test_straightness_hands_each_sample_its_label():
    x0, label = torch.randn(10, 2), torch.arange(10)

    def v(x, t, cond):
        assert len(cond["label"]) == len(x) <= 4
        return cond["label"].float()[:, None] * torch.tensor([1.0, 0]) + (t >= 0.5) * torch.tensor(
            [0.0, 2]
        )

    found = metrics.straightness(v, x0, {"label": label}, batch=4)
    assert found["straightness"] == pytest.approx(1)  # 2 half of the time: variance 1
    assert found["normalised"] == pytest.approx(1 / (float((label**2).sum()) / 10 + 1))
    with pytest.raises(UserError, match="from 10 steps; use 50 or more"):
        metrics.straightness(v, x0, steps=10)


# ---- digests


def test_a_module_digest_sees_names_types_shapes_and_bytes():
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    first = module_digest(layer)
    assert first == module_digest(layer)
    seen = {first}
    with torch.no_grad():
        layer.weight[0, 0] += 1e-7
    seen.add(module_digest(layer))
    seen.add(module_digest(layer.bfloat16()))
    seen.add(module_digest(nn.Sequential(layer)))
    norms = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    norms[1].num_batches_tracked += 1
    seen |= {module_digest(norm) for norm in norms}
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32)]
    for zero in zeros:
        module = nn.Module()
        module.register_buffer("a", zero)
        seen.add(module_digest(module))
    assert len(seen) == 9
