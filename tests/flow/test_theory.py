"""What the theory promises, measured with our own functions on closed forms (Liu et al. 2022)."""

import math
from functools import partial

import pytest
import torch

from flowmatch.evaluation import metrics
from flowmatch.flow import grids, losses, path, solvers, times, toy
from flowmatch.flow.config import FIXED, TimesConfig
from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.models.velocity import Velocity

RING = toy.ring()


def normal(n, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, dtype=torch.float64, generator=rng)


def uniform(n, seed):
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matching_loss(v, x0, x1, t):
    """E|x1 - x0 - v(x_t, t)|^2, summed over dimensions."""
    x = path.interpolate(x0, x1, t)
    return (path.velocity(x0, x1) - v(x, t)).square().sum(1).mean().item()


def train(batch_at, steps, t_config, distance, lr=3e-3, hidden=128):
    """Train a 3-layer MLP by Adam with a cosine schedule: batch_at(rng) -> x0, x1."""
    net = networks.build(NetConfig(name="VelocityMLP", hidden=hidden, layers=3), (2,), None, 0)
    v, rng = Velocity(net), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        x0, x1 = batch_at(rng)
        t = times.sample(torch.rand(len(x0), dtype=torch.float64, generator=rng), t_config)
        guess = v(path.interpolate(x0, x1, t), t)
        loss = distance(guess, path.velocity(x0, x1))
        adam.zero_grad()
        loss.mean().backward()
        adam.step()
        schedule.step()
    return v


GAUSSIAN = toy.Gaussian([0.5, -1.0], [[1.5, 0.6], [0.6, 0.8]])


def test_the_exact_velocity_of_a_gaussian_has_the_smallest_loss():
    n = 400_000
    found = matching_loss(GAUSSIAN, normal(n, 0), GAUSSIAN.samples(n, 0), uniform(n, 1))
    assert found == pytest.approx(GAUSSIAN.loss_floor, rel=0.01)


def test_training_reaches_the_smallest_loss():
    data = GAUSSIAN.samples(200_000, 1).float()

    def batch_at(rng):
        rows = torch.randint(len(data), (1024,), generator=rng)
        return torch.randn(1024, 2, generator=rng), data[rows]

    v = train(batch_at, 600, TimesConfig(), losses.mse, hidden=64)
    n = 400_000
    with torch.no_grad():
        x1 = GAUSSIAN.samples(n, 0).float()
        found = matching_loss(v, normal(n, 0).float(), x1, uniform(n, 1).float())
    assert found == pytest.approx(GAUSSIAN.loss_floor, rel=0.02)


def test_a_gaussian_has_the_straightness_of_its_closed_form():
    found = metrics.straightness(GAUSSIAN, normal(20_000, 0), steps=200, batch=20_000)
    assert found["straightness"] == pytest.approx(GAUSSIAN.straightness, rel=0.03)


def test_one_euler_step_is_exact_after_perfect_reflow_of_a_gaussian():
    x0 = normal(1000, 0)
    x1 = GAUSSIAN.flow(x0)
    # pairs of the flow are the optimal map, so the line x_t = (1-t) x0 + t x1 tells x0
    line = torch.linalg.inv(GAUSSIAN.root)

    def reflowed(x, t):
        mix = (1 - t) * line + t * torch.eye(2, dtype=torch.float64)
        start = (x - t * GAUSSIAN.means[0]) @ torch.linalg.inv(mix) @ line
        return GAUSSIAN.means[0] + start @ GAUSSIAN.root - start

    for steps in (1, 3):
        for solver in FIXED:
            x = solvers.integrate(reflowed, x0, grids.uniform_grid(steps), solver)
            torch.testing.assert_close(x, x1, atol=1e-9, rtol=0)


def test_the_cost_of_a_coupling_is_what_remains_and_what_was_not_straight():
    # E|X1 - X0|^2 = E|Z1 - Z0|^2 + S(Z) + V(X) for any target (Liu et al. 2022)
    n = 10_000
    x0, x1 = normal(n, 0), RING.samples(n, 0)
    before = (x1 - x0).square().sum(1).mean().item()
    z1 = solvers.integrate(RING, x0, grids.uniform_grid(50), "rk4")
    after = (z1 - x0).square().sum(1).mean().item()
    crooked = metrics.straightness(RING, x0, steps=100, batch=n)["straightness"]
    crossing = matching_loss(RING, x0, x1, uniform(n, 1))
    assert before == pytest.approx(after + crooked + crossing, rel=0.02)
    assert crooked > 1  # each term has a say
    assert crossing > 1


COSTS = {
    "|.|": lambda gap: gap.norm(dim=1),
    "|.|^2": lambda gap: gap.square().sum(1),
    "|.|^4": lambda gap: gap.square().sum(1) ** 2,
}


def falls(after, before, slack=0.0):
    """Each convex cost falls, to three standard errors of the difference of two sets."""
    for name, cost in COSTS.items():
        a, b = cost(after), cost(before)
        error = math.sqrt(a.var() / len(a) + b.var() / len(b))
        assert a.mean() < b.mean() * (1 + slack) + 3 * error, name


def test_convex_costs_do_not_rise_along_the_exact_flow():
    n = 10_000
    x0 = normal(n, 0)
    z1 = solvers.integrate(RING, x0, grids.uniform_grid(50), "rk4")
    falls(z1 - x0, RING.samples(n, 0) - x0)
    before = COSTS["|.|^2"](RING.samples(n, 0) - x0).mean()
    assert COSTS["|.|^2"](z1 - x0).mean() < 0.75 * before


@pytest.mark.slow
def test_reflow_straightens_the_ring_a_thousandfold():
    n = 50_000
    x0 = normal(n, 0)
    x1 = solvers.integrate(RING, x0, grids.uniform_grid(50), "rk4")
    pairs = torch.stack([x0, x1]).float()

    def batch_at(rng):
        return pairs[:, torch.randint(n, (1024,), generator=rng)]

    v = train(
        batch_at,
        4000,
        TimesConfig(name="u_shape", a=4.0, zero=0.5),
        partial(losses.pseudo_huber, c=0.1),
    )
    fresh = normal(10_000, 2)
    teacher = metrics.straightness(RING, fresh, batch=10_000)["straightness"]
    with torch.no_grad():
        student = metrics.straightness(v, fresh.float(), batch=10_000)["straightness"]
        one = solvers.integrate(v, fresh.float(), grids.uniform_grid(1))
        many = solvers.integrate(v, fresh.float(), grids.uniform_grid(64), "heun")
    truth = solvers.integrate(RING, fresh, grids.uniform_grid(50), "rk4")
    print(f"straightness {teacher:.3f} -> {student:.6f}, {teacher / student:.0f} times less")
    assert student < teacher / 1000
    # the student moves no further than its pairs, within a hundredth for what it did not learn
    falls(many - fresh, truth - fresh, slack=0.01)
    falls(one - fresh, truth - fresh, slack=0.01)
    rmse = (one - truth).square().mean().sqrt().item()
    print(f"one Euler step against the exact map: RMSE {rmse:.4f}")
    assert rmse < 0.1
