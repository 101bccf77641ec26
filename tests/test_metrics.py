"""Metrics: closed forms first, then what each distance must not depend on, then the refusals."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from flowmatch import data, metrics, sources
from flowmatch.config import UserError

FASHION = Path("/usr/share/datasets/fashion-mnist")


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
    assert metrics.frechet(a, b, None) == pytest.approx(truth, rel=1e-9)
    assert metrics.frechet(b, a, None) == pytest.approx(truth, rel=1e-9)
    assert metrics.frechet(a.float(), b.float(), None) == pytest.approx(truth, rel=1e-5)
    single = metrics.frechet(a.float(), b.float(), None)
    assert single == metrics.frechet(
        a.float().double(), b.float().double(), None
    )  # nothing rounded
    assert metrics.frechet(a, a, None) == pytest.approx(0, abs=1e-6)


class Fickle(nn.Module):
    """Features whose statistics show in which mode they were run: dropout in front of a batch norm."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=1.0)
        self.seen = []

    def forward(self, x):
        self.seen.append((len(x), self.training, torch.is_grad_enabled()))
        return self.norm(self.drop(2 * x.flatten(1)))[:, :, None, None]


def test_frechet_runs_features_in_eval_mode_in_batches_and_leaves_them_as_they_were():
    torch.manual_seed(0)
    a, b = torch.randn(50, 1, 1, 3), torch.randn(33, 1, 1, 3) + 1
    features = Fickle().train()
    before = metrics.module_digest(features)
    found = metrics.frechet(a, b, features, batch=20)
    assert found == pytest.approx(4 * metrics.frechet(a, b, None), rel=1e-4)
    assert [n for n, *_ in features.seen] == [20, 20, 10, 20, 13]
    assert not any(training or graded for _, training, graded in features.seen)
    assert features.training
    assert metrics.module_digest(features) == before
    assert metrics.frechet(a, b, features, batch=7) == pytest.approx(found, rel=1e-6)


def test_frechet_never_waits_for_other_ranks(monkeypatch):
    """torchmetrics gathers over the process group by default: a rank that scores alone would hang."""
    import torchmetrics.metric

    def gather(*args, **kwargs):
        raise AssertionError("a collective in a metric that one rank computes")

    monkeypatch.setattr(torchmetrics.metric, "jit_distributed_available", lambda: True)
    monkeypatch.setattr(torchmetrics.metric, "gather_all_tensors", gather)
    a = torch.randn(20, 2)
    assert metrics.frechet(a, a + 1, None) == pytest.approx(2, rel=1e-3)


def test_what_frechet_refuses():
    a = torch.randn(10, 3)
    for b, fault in [
        (torch.randn(10, 4), r"\[10, 3\] and \[10, 4\]"),
        (torch.randn(1, 3), "two or more samples"),
        (torch.full((5, 3), math.nan), "generated samples hold NaN"),
    ]:
        with pytest.raises(UserError, match=fault):
            metrics.frechet(a, b, None)
    wide = torch.zeros(3, 3, 64, 64)
    with pytest.raises(UserError, match="12288 values a sample; use a feature module"):
        metrics.frechet(wide, wide, None)


def test_the_floor_compares_disjoint_halves():
    real = torch.arange(11.0)[:, None]
    halves = []
    floor = metrics.floor(real, lambda a, b: halves.append((a, b)) or 0.5)
    assert floor == (0.5, 5)
    assert torch.cat(halves[0]).flatten().tolist() == list(range(10))


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
    with pytest.raises(UserError, match="as many samples in both"):
        metrics.sliced_wasserstein(a, b[:50])


@pytest.mark.parametrize(("n", "floor"), [(1000, 0.133), (5000, 0.056)])
def test_the_rings_floor_is_the_known_one(n, floor):
    found = []
    for seed in range(6):
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
    with pytest.raises(UserError, match="10 steps; use 50 or more"):
        metrics.straightness(v, x0, steps=10)


# ---- classifier


@pytest.fixture(scope="module")
def digits():
    return data.load(data.DataConfig(source="digits", labels=True))


@pytest.fixture(scope="module")
def trained(digits):
    return metrics.train_classifier(digits, 0, steps=400)


def test_the_classifier_learns_the_digits(digits, trained):
    net, accuracy = trained
    assert accuracy >= 0.97
    assert not net.training
    assert net.num_features == net(digits.batch(np.arange(5))["x1"]).shape[1] == 64


def test_the_classifier_depends_on_data_and_seed_alone(digits):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one, _ = metrics.train_classifier(digits, 0, steps=20)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    two, _ = metrics.train_classifier(digits, 0, steps=20)
    other, _ = metrics.train_classifier(digits, 1, steps=20)
    assert metrics.module_digest(one) == metrics.module_digest(two)
    assert metrics.module_digest(one) != metrics.module_digest(other)


def test_held_out_images_are_not_trained_on(digits, monkeypatch):
    """Nor is any of their mirror images."""
    seen, scored = set(), []
    both = data.load(data.DataConfig(source="digits", labels=True, flip=True))
    read = both.read
    monkeypatch.setattr(metrics, "accuracy", lambda net, found, ids: scored.extend(ids) or 0.5)
    object.__setattr__(both, "read", lambda ids: seen.update(ids.tolist()) or read(ids))
    metrics.train_classifier(both, 0, steps=60)
    assert len(scored) == len(set(scored)) == 1797 // 5
    assert seen.isdisjoint(scored)
    assert seen | set(scored) == set(range(1797))


def test_its_features_tell_digits_from_their_likes(digits, trained):
    net, _ = trained
    real = data.reference(digits, 1797, 0)["x1"]

    def distance(a, b):
        return metrics.frechet(a, b, net)

    floor, n = metrics.floor(real, distance)
    half = real[:n]
    blurred = nn.functional.avg_pool2d(half, 3, 1, 1)
    assert n == 898
    assert 0 < floor < 20
    assert distance(real, half.mean(0).expand_as(half)) > 30 * floor  # the one-step teacher
    assert distance(real, blurred) > 10 * floor


def test_the_classifier_needs_labelled_images():
    for config in ({"source": "digits"}, {"source": "ring", "labels": True, "samples": 9}):
        with pytest.raises(UserError, match="images with labels"):
            metrics.train_classifier(data.load(data.DataConfig(**config)), 0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 20), (3, 64, 64), (3, 1, 1)])
def test_the_classifier_takes_any_size(shape):
    net = metrics.Classifier(shape, 7)
    assert net(torch.zeros(2, *shape)).shape == (2, 64)
    assert net.logits(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_classifier_learns_fashion_mnist():
    found = data.load(data.DataConfig(source="idx", path=str(FASHION), labels=True))
    _, accuracy = metrics.train_classifier(found, 0)
    assert accuracy >= 0.90


def test_a_module_digest_sees_names_types_shapes_and_bytes():
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    first = metrics.module_digest(layer)
    assert first == metrics.module_digest(layer)
    seen = {first}
    with torch.no_grad():
        layer.weight[0, 0] += 1e-7
    seen.add(metrics.module_digest(layer))
    seen.add(metrics.module_digest(layer.bfloat16()))
    seen.add(metrics.module_digest(nn.Sequential(layer)))
    norms = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    norms[1].num_batches_tracked += 1
    seen |= {metrics.module_digest(norm) for norm in norms}
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32)]
    for zero in zeros:
        module = nn.Module()
        module.register_buffer("a", zero)
        seen.add(metrics.module_digest(module))
    assert len(seen) == 9


def test_inception_is_used_only_where_its_weights_are_given(tmp_path):
    with pytest.raises(UserError, match="inception_weights=nowhere: no such file"):
        metrics.Inception("nowhere")
    (tmp_path / "weights.pth").write_bytes(b"")
    if importlib.util.find_spec("torch_fidelity") is None:
        with pytest.raises(UserError, match="needs torch-fidelity"):
            metrics.Inception(str(tmp_path / "weights.pth"))
