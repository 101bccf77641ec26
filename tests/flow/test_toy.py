"""The oracles against independent routes: Monte Carlo, derivatives, and each other's identities."""

import math

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.flow import path, toy

SKEW = toy.GaussianMixture(
    [0.3, 0.7],
    [[1.0, -1.0], [-0.5, 2.0]],
    [[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.2]]],
)
A = torch.tensor([[1.0, 0.4, -0.3], [0.0, 0.6, 0.5], [0.2, 0.0, 0.8]], dtype=torch.float64)
SOLID = toy.GaussianMixture(
    [1.0, 1.0], [[0.0, 1.0, 0.5], [1.0, 0.0, -1.0]], torch.stack([A @ A.T, A.T @ A])
)
TIMES = [0.0, 0.2, 0.5, 0.9, 1.0]


def log_density(mixture, x, t):
    """log p_t by torch's own distributions: no code of ours."""
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(
        t * mixture.means, t**2 * mixture.covariances + (1 - t) ** 2 * eye
    )
    mix = torch.distributions.Categorical(mixture.weights)
    return torch.distributions.MixtureSameFamily(mix, parts).log_prob(x)


def points(n=40, d=2):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("mixture", [SKEW, SOLID], ids=["plane", "space"])
@pytest.mark.parametrize("t", TIMES)
def test_the_score_is_the_gradient_of_the_log_density(mixture, t):
    x = points(d=mixture.means.shape[1]).requires_grad_()
    (expected,) = torch.autograd.grad(log_density(mixture, x, t).sum(), x)
    torch.testing.assert_close(mixture.score(x.detach(), t), expected)


@pytest.mark.parametrize("t", TIMES)
def test_velocity_score_and_predictions_are_one_thing(t):
    x = points()
    v, d, n = SKEW.velocity(x, t), SKEW.data_prediction(x, t), SKEW.noise_prediction(x, t)
    torch.testing.assert_close(v, d - n)
    torch.testing.assert_close(path.data_prediction(x, v, t), d)
    torch.testing.assert_close(path.noise_prediction(x, v, t), n)
    torch.testing.assert_close(-(1 - t) * SKEW.score(x, t), n)


def test_the_velocity_is_the_regression_of_x1_minus_x0():
    # E[v(x_t)] f(x_t) = E[(x1 - x0) f(x_t)] for any f: five standard errors of a million draws
    n = 1_000_000
    x1 = SKEW.samples(n, 0)
    x0 = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for t in (0.0, 0.3, 0.8, 1.0):
        x = path.interpolate(x0, x1, t)
        gap = x1 - x0 - SKEW.velocity(x, t)
        for f in (torch.ones_like(x), x, x.flip(1), x.square(), torch.sin(2 * x)):
            product = gap * f
            assert (product.mean(0).abs() < 5 * product.std(0) / math.sqrt(n)).all()


def test_the_velocity_moves_the_density():
    # the continuity equation, d p/dt + div(p v) = 0, by differences
    x, h = points(), 1e-5
    for t in (0.2, 0.5, 0.8):
        change = (log_density(SKEW, x, t + h).exp() - log_density(SKEW, x, t - h).exp()) / (2 * h)
        flux = torch.zeros(len(x), dtype=torch.float64)
        for d in range(2):
            step = torch.zeros(2, dtype=torch.float64)
            step[d] = h
            for sign in (1, -1):
                y = x + sign * step
                flux += sign * log_density(SKEW, y, t).exp() * SKEW.velocity(y, t)[:, d] / (2 * h)
        torch.testing.assert_close(change, -flux, atol=1e-8, rtol=1e-5)


def test_samples_have_the_moments_and_weights():
    n = 400_000
    x = SKEW.samples(n, 3)
    assert x.dtype == torch.float64
    assert (
        x.mean(0) - SKEW.mean
    ).abs().max() < 5 * SKEW.covariance.diagonal().sqrt().max() / n**0.5
    torch.testing.assert_close(torch.cov(x.T), SKEW.covariance, atol=0.01, rtol=0.01)
    assert abs(SKEW.responsibilities(x).mean(0)[0] - 0.3) < 0.005
    assert torch.equal(x, SKEW.samples(n, 3))
    assert not torch.equal(x[:10], SKEW.samples(n, 4)[:10])


def test_a_gaussian_flows_linearly():
    gaussian = toy.Gaussian([0.5, -1.0], [[1.5, 0.6], [0.6, 0.8]])
    x0, h = points(), 1e-6
    torch.testing.assert_close(gaussian.flow(x0, 0.0), x0)
    root = gaussian.root
    torch.testing.assert_close(root @ root, gaussian.covariances[0])
    torch.testing.assert_close(gaussian.flow(x0), gaussian.means[0] + x0 @ root)
    for t in (0.1, 0.5, 0.9):  # d x_t / dt = v(x_t, t)
        slope = (gaussian.flow(x0, t + h) - gaussian.flow(x0, t - h)) / (2 * h)
        torch.testing.assert_close(gaussian(gaussian.flow(x0, t), t), slope, atol=1e-7, rtol=1e-6)


def test_times_shapes_and_dtypes():
    x = points(5)
    t = torch.tensor(TIMES, dtype=torch.float64)
    each = torch.cat([SKEW(x[i : i + 1], t[i].item()) for i in range(5)])
    torch.testing.assert_close(SKEW(x, t), each)
    assert SKEW(x.float(), t.float()).dtype == torch.float32
    assert toy.ring()(x, 0.0).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SKEW(points(), 1.01), "expected times in"),
        (lambda: SKEW(points(), float("nan")), "expected times in"),
        (lambda: SKEW(torch.zeros(3, 5), 0.5), r"x is \[3, 5\]; expected \[B, 2\]"),
        (lambda: toy.GaussianMixture([1.0], [[0.0, 0.0]], torch.eye(2)), "expected"),
        (lambda: toy.GaussianMixture([-1.0], [[0.0, 0.0]], torch.eye(2)[None]), "must be > 0"),
        (lambda: toy.Gaussian([0.0, 0.0], -torch.eye(2)), "must be > 0"),
        (lambda: toy.Gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
