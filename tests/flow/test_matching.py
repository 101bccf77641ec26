"""Distributions are matched: no force where they are equal, the gradient of the distance elsewhere."""

import pytest
import torch

from flowmatch.flow import dmd, path, toy
from flowmatch.flow.energy import Energy
from flowmatch.flow.moments import Moments

COVARIANCE = torch.tensor([[2.0, 0.6], [0.6, 0.5]])


def normal(n, seed, mean=(0.0, 0.0), covariance=COVARIANCE):
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(mean) + z @ torch.linalg.cholesky(covariance).T


def frechet(f, mean, covariance):
    """|m - n|^2 + tr(S + R - 2 (S R)^1/2) of the samples' own moments, by other words than the code."""
    m = f.mean(0)
    s = (f - m).T @ (f - m) / len(f)
    root = torch.linalg.det(s @ covariance).sqrt()
    product = s @ covariance
    trace = (product.trace() + 2 * root).sqrt()  # of the root of a 2x2 matrix
    return (m - mean).square().sum() + s.trace() + covariance.trace() - 2 * trace


def test_moments_have_the_value_and_the_gradient_of_the_frechet_distance():
    target, f = normal(4000, 0).double(), normal(300, 1, (1.0, -0.5), torch.eye(2)).double()
    matcher = Moments([target[:1000], target[1000:]], 100)
    matcher.ridge = torch.zeros(2, 2, dtype=torch.float64)
    m = target.mean(0)
    r = (target - m).T @ (target - m) / len(target)
    values, vectors = torch.linalg.eigh(r)
    matcher.root = vectors * values.sqrt() @ vectors.T
    matcher.fill(f)
    f.requires_grad_()
    own, truth = matcher.errors(f).mean(), frechet(f, m, r) / r.trace()
    assert own.item() == pytest.approx(truth.item(), rel=1e-6)
    (slope,), (expected,) = torch.autograd.grad(own, f), torch.autograd.grad(truth, f)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-10)
    assert slope.abs().max() > 1e-3


@pytest.mark.parametrize("kind", [Moments, Energy])
def test_there_is_no_force_between_equal_distributions_and_descent_between_others(kind):
    target = normal(8000, 0)
    matcher = kind([target], 4096)
    matcher.fill(normal(4096, 1))
    f = normal(4096, 2).requires_grad_()
    equal = matcher.errors(f).mean()
    (slope,) = torch.autograd.grad(equal, f)
    near = slope.mean(0).norm() * len(f)
    assert abs(equal.item()) < 0.01

    far = kind([target], 1024)
    f = normal(4096, 3, (0.7, 0.0), 0.3 * torch.eye(2))
    far.fill(f)
    begin = far.errors(f).mean().item()
    f.requires_grad_()
    (slope,) = torch.autograd.grad(far.errors(f).mean(), f)
    assert slope.mean(0).norm() * len(f) > 10 * near
    assert begin > 0.05
    scale, shift = torch.eye(2).requires_grad_(), torch.zeros(2).requires_grad_()
    optimizer = torch.optim.Adam([scale, shift], 0.02)
    for step in range(400):
        z = normal(256, 10 + step, covariance=torch.eye(2))
        f = z @ scale + shift
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        optimizer.zero_grad()
        far.errors(f).mean().backward()
        optimizer.step()
        far.add(f.detach())
    made = normal(20000, 5, covariance=torch.eye(2)) @ scale.detach() + shift.detach()
    assert made.mean(0).norm() < 0.12
    torch.testing.assert_close(made.T.cov(), COVARIANCE, atol=0.2, rtol=0)


@pytest.mark.parametrize("kind", [Moments, Energy])
def test_matchers_go_on_from_what_they_saved_and_keep_what_is_finite(kind):
    target, f = normal(500, 0), normal(64, 2)
    one, other = kind([target], 128), kind([target], 128)
    one.fill(normal(128, 1))
    one.add(normal(64, 3))
    kept = one.errors(f)
    one.add(normal(64, 4))
    assert not torch.equal(one.errors(f), kept)
    other.restore({name: tensor.clone() for name, tensor in one.tensors().items()})
    assert torch.equal(other.errors(f), one.errors(f))
    f, before = normal(16, 5), other.tensors()
    other.add(f)
    if kind is Moments:
        mean = torch.lerp(before["mean"], f.double().mean(0), 0.125)
        torch.testing.assert_close(other.mean, mean)
    else:
        assert torch.equal(other.newest, torch.cat([before["newest"][16:], f]))
    before = one.tensors()
    one.add(torch.full((64, 2), float("nan")))
    for name in ("mean", "second", "newest"):
        if name in before:
            assert torch.equal(one.tensors()[name], before[name])


def test_dmd_has_no_force_at_the_true_distribution_and_leads_there_from_others():
    """The velocities of two normal distributions are linear: those of the closed form."""
    real = toy.Gaussian([1.0, -0.5], COVARIANCE)
    generator = torch.Generator().manual_seed(0)

    def step(scale, shift, n):
        z, noise = torch.randn(2, n, 2, dtype=torch.float64, generator=generator)
        x = z @ scale + shift
        t = dmd.times(torch.rand(n, dtype=torch.float64, generator=generator))
        y = path.interpolate(noise, x.detach(), t)
        fake = toy.Gaussian(shift.detach(), scale.detach().T @ scale.detach())
        return x, dmd.direction(x.detach(), y, t, real(y, t), fake(y, t))

    root = torch.linalg.cholesky(COVARIANCE.double()).T.contiguous()
    _, ascent = step(root, torch.tensor([1.0, -0.5], dtype=torch.float64), 1000)
    assert ascent.abs().max() < 1e-10
    scale = torch.eye(2, dtype=torch.float64).requires_grad_()
    shift = torch.zeros(2, dtype=torch.float64).requires_grad_()
    x, ascent = step(scale, shift, 1000)
    assert ascent.norm(dim=1).mean() > 0.1
    (slope,) = torch.autograd.grad(dmd.errors(x, ascent).sum(), x)
    torch.testing.assert_close(slope, ascent / 2**0.5)
    optimizer = torch.optim.Adam([scale, shift], 0.02)
    for number in range(500):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - number / 500)
        x, ascent = step(scale, shift, 256)
        optimizer.zero_grad()
        dmd.errors(x, ascent).mean().backward()
        optimizer.step()
    torch.testing.assert_close(shift.float(), torch.tensor([1.0, -0.5]), atol=0.05, rtol=0)
    torch.testing.assert_close((scale.T @ scale).float(), COVARIANCE, atol=0.1, rtol=0)
