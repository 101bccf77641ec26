"""Stochastic samplers: known answers, kept marginals, and a sample that is its own."""

import math

import numpy as np
import pytest
import torch

from flowmatch.config import UserError, validate
from flowmatch.flow import grids, noise, samplers, solvers, toy
from flowmatch.flow.config import SamplerConfig
from flowmatch.flow.samplers import FreshNoise

UNEQUAL = toy.GaussianMixture(
    [0.3, 0.7],
    [[2.0, -1.0], [-1.5, 1.5]],
    [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]],
)


def start(n, d=2, seed=0):
    return torch.from_numpy(noise.generator(seed, 0, noise.EVALUATION).standard_normal((n, d)))


def fast(seed=1):
    """Fresh noise for many samples at once: the law of FreshNoise, not its bits."""
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=rng)


# formulas: exact field, Gaussian target of std 1: generated std at N = 2, 4, 8, 16, 32
KNOWN = {
    "euler": [0.50, 0.72, 0.85, 0.92, 0.96],
    "ddpm": [0.50, 0.63, 0.77, 0.87, 0.93],
    "renoise": [0.50, 0.56, 0.62, 0.66, 0.68],
}


def exact_std(name, steps):
    """The variance is carried by each step in closed form: no sampling, no code of ours."""
    variance = 1.0
    for i in range(steps):
        t, s = i / steps, (i + 1) / steps
        c = t**2 + (1 - t) ** 2
        rho = {"euler": 1.0, "ddpm": t * (1 - s) / (s * (1 - t)), "renoise": 0.0}[name]
        variance *= (s * t / c + (1 - s) * rho * (1 - t) / c) ** 2
        variance += (1 - s) ** 2 * (1 - rho**2)
    return variance**0.5


@pytest.mark.parametrize("name", KNOWN)
def test_the_known_answers_are_reproduced(name):
    gaussian, n = toy.Gaussian([0.0, 0.0], torch.eye(2)), 40_000
    for steps, known in zip((2, 4, 8, 16, 32), KNOWN[name], strict=True):
        expected = exact_std(name, steps)
        assert expected == pytest.approx(known, abs=0.0051)
        grid = grids.uniform_grid(steps)
        if name == "euler":
            x = solvers.integrate(gaussian, start(n), grid)
        else:
            x = getattr(samplers, name)(gaussian, start(n), grid, fast())
        # four standard errors of a standard deviation of 2 n numbers
        assert x.std().item() == pytest.approx(expected, abs=4 * expected / math.sqrt(4 * n))


@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_ddim_without_noise_is_euler(steps):
    grid = grids.uniform_grid(steps)

    def direct(x):  # s D + (1 - s) N, from the oracle's own predictions
        for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            x = s * UNEQUAL.data_prediction(x, t) + (1 - s) * UNEQUAL.noise_prediction(x, t)
        return x

    def unused(x):
        raise AssertionError("eta = 0 draws nothing")

    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        x0 = start(300).to(dtype)
        euler = solvers.integrate(UNEQUAL, x0, grid)
        torch.testing.assert_close(direct(x0), euler, atol=tolerance, rtol=0)
        ddim = samplers.ddim(UNEQUAL, x0, grid, unused)
        torch.testing.assert_close(ddim, direct(x0), atol=tolerance, rtol=0)


def test_the_step_is_its_formula():
    x, z = start(20), start(20, seed=1)
    for t, s, rho in ((0.0, 0.3, 0.0), (0.2, 0.5, 0.7), (0.6, 0.9, 0.2)):
        d, n = UNEQUAL.data_prediction(x, t), UNEQUAL.noise_prediction(x, t)
        expected = s * d + (1 - s) * (rho * n + math.sqrt(1 - rho**2) * z)
        torch.testing.assert_close(samplers.step(x, d - n, t, s, rho, z), expected)


def test_the_samplers_reduce_to_one_another():
    x0, grid = start(50), grids.uniform_grid(12)
    same = samplers.ddim(UNEQUAL, x0, grid, fast(), eta=1.0)
    torch.testing.assert_close(same, samplers.ddpm(UNEQUAL, x0, grid, fast()))
    euler = solvers.integrate(UNEQUAL, x0, grid)
    still = samplers.sde(UNEQUAL, x0, grid, fast(), lambda t: 0.0)
    torch.testing.assert_close(still, euler, atol=1e-12, rtol=0)
    near = samplers.ddim(UNEQUAL, x0, grid, fast(), eta=1e-6)
    torch.testing.assert_close(near, euler, atol=1e-4, rtol=0)
    assert (samplers.ddim(UNEQUAL, x0, grid, fast(), eta=0.5) - euler).abs().max() > 0.1


def keeps_the_target(x):
    """Mean, covariance and mode weights within four standard errors of exact samples."""
    n, exact = len(x), UNEQUAL.samples(200_000, 5)
    gaps = exact - exact.mean(0)
    products = torch.einsum("bi,bj->bij", gaps, gaps)
    assert ((x.mean(0) - UNEQUAL.mean).abs() < 4 * exact.std(0) / math.sqrt(n)).all()
    error = (torch.cov(x.T) - UNEQUAL.covariance).abs()
    assert (error < 4 * products.std(0) / math.sqrt(n)).all()
    weight = UNEQUAL.responsibilities(exact)[:, 0]
    found = UNEQUAL.responsibilities(x)[:, 0].mean()
    assert abs(found - UNEQUAL.weights[0]) < 4 * weight.std() / math.sqrt(n)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_the_sde_keeps_mean_covariance_and_mode_weights(c):
    grid = grids.uniform_grid(256)
    keeps_the_target(samplers.sde(UNEQUAL, start(8000), grid, fast(), samplers.sqrt_diffusion(c)))


def test_the_sde_is_not_too_narrow_on_narrow_data():
    narrow = toy.Gaussian([0.0, 0.0], 0.05**2 * torch.eye(2))
    x = samplers.sde(narrow, start(15_000), grids.uniform_grid(16), fast())
    # .973 of the data's width; Euler gives .57, and a last step that keeps its score term .65
    assert x.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    "w2", [lambda t: (1 - t) ** 2, lambda t: 4 * t * (1 - t)], ids=["1 - t", "2 sqrt(t (1 - t))"]
)
def test_any_other_diffusion_keeps_them_too(w2):
    keeps_the_target(samplers.sde(UNEQUAL, start(8000), grids.uniform_grid(256), fast(), w2))


def test_a_constant_diffusion_keeps_the_marginal_where_it_stops():
    grid = 0.9 * grids.uniform_grid(200)
    x = samplers.sde(UNEQUAL, start(8000), grid, fast(), lambda t: 1.0)
    x = solvers.integrate(UNEQUAL, x, torch.linspace(0.9, 1, 20, dtype=torch.float64), "heun")
    keeps_the_target(x)


def test_ddpm_keeps_them_and_renoising_does_not():
    grid = grids.uniform_grid(512)
    keeps_the_target(samplers.ddpm(UNEQUAL, start(8000), grid, fast()))
    with pytest.raises(AssertionError):
        keeps_the_target(samplers.renoise(UNEQUAL, start(2000), grid, fast()))


def test_the_anchored_rule_is_exact_on_a_straight_flow_and_wrong_on_a_curved_one():
    x0, x1 = start(50), start(50, seed=2)
    for steps in (1, 2, 5):
        x = samplers.anchored(lambda x, t: x1 - x0, x0, grids.uniform_grid(steps))
        torch.testing.assert_close(x, x1, atol=1e-12, rtol=0)
    # a straight flow with an error where it starts: the rule forgives, Euler keeps it
    crooked = lambda x, t: x1 - x0 + (t == 0)  # noqa: E731
    grid = grids.uniform_grid(4)
    assert (samplers.anchored(crooked, x0, grid) - x1).abs().max() < 1e-12 + 1 / 4
    truth = solvers.integrate(UNEQUAL, x0, grids.uniform_grid(512), "rk4")
    errors = [
        (samplers.anchored(UNEQUAL, x0, grids.uniform_grid(n)) - truth).norm(dim=1).mean()
        for n in (64, 256)
    ]
    assert errors[1] > 0.5 * errors[0] > 0.05  # no order at all


@pytest.mark.parametrize("name", samplers.STOCHASTIC)
def test_a_sample_does_not_depend_on_its_batch(name):
    config = SamplerConfig(name=name, eta=0.8) if name == "ddim" else SamplerConfig(name=name)
    ids = np.arange(100, 130)
    x0 = start(30).float()

    def some(rows):
        return samplers.sample(UNEQUAL, x0[rows], config, 6, seed=3, ids=ids[rows])

    whole = some(np.arange(30))
    part = np.array([29, 4, 17])
    torch.testing.assert_close(some(part), whole[part], atol=1e-5, rtol=0)
    other = samplers.sample(UNEQUAL, x0, config, 6, seed=4, ids=ids)
    assert (other - whole).abs().max() > 0.1


def test_fresh_noise_is_normal_and_never_repeats():
    draw = FreshNoise(0, range(3000))
    first, second = draw(torch.zeros(3000, 4)), draw(torch.zeros(3000, 4))
    assert torch.equal(first, FreshNoise(0, range(3000))(torch.zeros(3000, 4)))
    assert abs(first.mean()) < 0.04
    assert abs(first.std() - 1) < 0.03
    assert abs((first * second).mean()) < 0.04
    starts = noise.normal(0, range(3000), (4,), noise.EVALUATION)  # another stream
    assert abs(np.mean(first.numpy() * starts)) < 0.04


@pytest.mark.parametrize("name", SamplerConfig.model_fields["name"].annotation.__args__)
def test_every_name_samples_a_straight_flow_exactly_or_with_its_noise(name):
    x0, x1 = start(8), start(8, seed=2)
    config = validate(SamplerConfig, {"name": name, "grid": "sigmoid"})
    x = samplers.sample(lambda x, t: x1 - x0, x0, config, 5, seed=0, ids=range(8))
    assert x.dtype == torch.float64
    if name not in samplers.STOCHASTIC or name == "ddim":
        torch.testing.assert_close(x, x1, atol=1e-12, rtol=0)
    else:
        assert (x - x1).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "round_", "message"),
    [
        ("sde", 1, "solver.name=sde: the model is of reflow round 1; after reflow"),
        ("ddim", 1, "the score that this sampler needs does not follow"),
        ("ddpm", 2, "round 2"),
        ("anchored", 0, "before reflow; its paths are curved"),
    ],
)
def test_a_sampler_that_is_invalid_for_a_model_is_refused_with_the_reason(name, round_, message):
    with pytest.raises(UserError, match=message):
        samplers.check(name, round_, "solver.name")
    for valid, k in (("sde", 0), ("ddim", 0), ("ddpm", 0), ("anchored", 1), ("heun", 2)):
        samplers.check(valid, k, "solver.name")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, g: samplers.sde(UNEQUAL, x, g, fast(), lambda t: 9.0), "beyond 2"),
        (lambda x, g: samplers.sde(UNEQUAL, x, g, fast(), lambda t: -1.0), "finite number >= 0"),
        (lambda x, g: samplers.sde(UNEQUAL, x, g.flip(0), fast()), "expected a rising grid"),
        (lambda x, g: samplers.ddim(UNEQUAL, x, g, fast(), eta=1.1), "eta=1.1"),
        (lambda x, g: samplers.ddpm(UNEQUAL, x, g + 0.5, fast()), "times in"),
        (lambda x, g: samplers.ddpm(UNEQUAL, x.half(), g, fast()), "float32 or float64"),
        (lambda x, g: samplers.ddpm(lambda x, t: x[:1], x, g, fast()), "expected the same shape"),
        (lambda x, g: samplers.ddpm(UNEQUAL, x, g, FreshNoise(0, [1])), "4 samples; the noise is"),
        (lambda x, g: samplers.anchored(UNEQUAL, x, g[1:]), "expected a grid from 0"),
        (
            lambda x, g: samplers.sde(
                UNEQUAL, x, g, fast(), lambda t: 2 * (1 - t) / t if t else math.inf
            ),
            "w\\^2 is inf at t = 0",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call(start(4), grids.uniform_grid(8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "euler", "c": 0.5},
            "c belongs to name=sde; with name=euler leave it out, or at 1.0",
        ),
        ({"name": "sde", "eta": 0.5}, "eta belongs to name=ddim; with name=sde"),
        ({"name": "sde", "c": 3.0}, "less than or equal to 2"),
        ({"name": "dopri5"}, "'anchored'"),
        ({"name": "renoise"}, "'ddpm' or 'anchored'"),
    ],
)
def test_refused_configs_name_the_reason(values, message):
    with pytest.raises(UserError, match=message):
        validate(SamplerConfig, values)
