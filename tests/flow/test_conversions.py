"""Conversions against the mixture oracle, round trips, and both ends."""

import math

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.flow import conversions, grids, path, solvers, toy

MIX = toy.GaussianMixture(
    [0.4, 0.6], [[1.5, 0.0], [-1.0, 1.0]], [[[0.5, 0.1], [0.1, 0.3]], [[0.4, 0.0], [0.0, 0.9]]]
)
INSIDE = torch.linspace(0.01, 0.99, 30, dtype=torch.float64)


def points(n=30):
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def oracle(x, t):
    names = ("velocity", "score", "data_prediction", "noise_prediction")
    return tuple(getattr(MIX, name)(x, t) for name in names)


def test_every_conversion_is_the_oracle():
    x, t = points(), INSIDE
    v, s, d, n = oracle(x, t)
    for found, expected in (
        (conversions.score_from_velocity(x, v, t), s),
        (conversions.velocity_from_score(x, s, t), v),
        (conversions.noise_from_score(s, t), n),
        (conversions.score_from_noise(n, t), s),
        (conversions.data_from_score(x, s, t), d),
        (conversions.velocity_from_data(x, d, t), v),
        (conversions.velocity_from_noise(x, n, t), v),
        (conversions.velocity_from_ends(d, n), v),
        (path.data_prediction(x, v, t), d),
        (path.noise_prediction(x, v, t), n),
    ):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trips_return_the_velocity(dtype):
    x, v = points().to(dtype), points().flip(0).to(dtype)  # any v, not a marginal one
    t = INSIDE.to(dtype)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {}
    d, n = path.data_prediction(x, v, t), path.noise_prediction(x, v, t)
    s = conversions.score_from_velocity(x, v, t)
    for back in (
        conversions.velocity_from_score(x, s, t),
        conversions.velocity_from_data(x, d, t),
        conversions.velocity_from_noise(x, n, t),
        conversions.velocity_from_ends(d, n),
        conversions.velocity_from_noise(x, conversions.noise_from_score(s, t), t),
        conversions.velocity_from_data(x, conversions.data_from_score(x, s, t), t),
    ):
        torch.testing.assert_close(back, v, **(tolerance or {"atol": 1e-10, "rtol": 1e-10}))


def test_both_ends_are_closed_forms_where_there_is_one():
    x = points()
    v, s, d, n = oracle(x, 0.0)
    assert torch.equal(conversions.score_from_velocity(x, v, 0.0), -x)
    torch.testing.assert_close(conversions.score_from_noise(n, 0.0), s)
    torch.testing.assert_close(conversions.velocity_from_data(x, d, 0.0), v)
    v, s, d, n = oracle(x, 1.0)
    torch.testing.assert_close(conversions.velocity_from_score(x, s, 1.0), x)
    torch.testing.assert_close(conversions.data_from_score(x, s, 1.0), d)
    torch.testing.assert_close(conversions.velocity_from_noise(x, n, 1.0), x - n)
    assert (conversions.noise_from_score(s, 1.0) == 0).all()


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("score_from_velocity", 1.0),
        ("velocity_from_score", 0.0),
        ("data_from_score", 0.0),
        ("velocity_from_data", 1.0),
        ("velocity_from_noise", 0.0),
    ],
)
def test_the_other_end_is_refused_with_the_reason(name, end):
    x, convert = points(3), getattr(conversions, name)
    for t in (end, torch.tensor([0.5, end, 0.2])):
        with pytest.raises(UserError, match=f"t = {end:g}: .*does not follow from"):
            convert(x, x, t)
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match="expected times in"):
            convert(x, x, t)
    assert convert(x, x, 1 - end).isfinite().all()
    with pytest.raises(UserError, match="the score of the data does not follow"):
        conversions.score_from_noise(x, 1.0)


def edm_denoiser(y, sigma):
    """E[x1 | x1 + sigma x0 = y], from torch's Gaussians alone."""
    eye = torch.eye(2, dtype=y.dtype)
    total = MIX.covariances + sigma[:, None, None, None] ** 2 * eye  # [B, K, 2, 2]
    gap = y[:, None] - MIX.means
    solved = torch.linalg.solve(total, gap[..., None])
    means = MIX.means + (MIX.covariances @ solved)[..., 0]
    log = torch.distributions.MultivariateNormal(MIX.means, total).log_prob(y[:, None])
    return ((log + MIX.weights.log()).softmax(1)[..., None] * means).sum(1)


def foreign(kind, scaled):
    def model(y, sigma):
        if scaled:
            y = y * (1 + sigma[:, None] ** 2).sqrt()
        d = edm_denoiser(y, sigma)
        return d if kind == "data" else (y - d) / sigma[:, None]

    return conversions.Foreign(
        model, kind, sigma_min=0.002, sigma_max=80.0, variance_preserving=scaled
    )


@pytest.mark.parametrize("kind", ["data", "noise"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_foreign_model_becomes_the_velocity_within_its_range(kind, scaled):
    v, x = foreign(kind, scaled), points()
    t = torch.linspace(v.t_min, v.t_max, 30, dtype=torch.float64)
    torch.testing.assert_close(v(x, t), MIX(x, t), atol=1e-8, rtol=1e-8)
    assert (v.t_min, v.t_max) == (pytest.approx(1 / 81), pytest.approx(1 / 1.002))
    for outside in (0.0, 1.0, v.t_min - 1e-4, v.t_max + 1e-4, math.nan):
        with pytest.raises(UserError, match=r"t in \[0.0123457, 0.998004\] only"):
            v(x, outside)
    # from start to finish: where the flow of the mixture leads
    x = solvers.integrate(
        v, v.start(points()), grids.squeeze(grids.sigmoid_grid(60, 6.0), (v.t_min, v.t_max)), "rk4"
    )
    truth = solvers.integrate(MIX, points(), grids.uniform_grid(200), "rk4")
    assert (v.finish(x) - truth).norm(dim=1).median() < 0.02


def test_bad_foreign_models_are_refused():
    for values, message in (
        ({"kind": "velocity", "sigma_min": 0.1, "sigma_max": 1.0}, "expected data or noise"),
        ({"kind": "data", "sigma_min": 0.0, "sigma_max": 1.0}, "expected 0 < sigma_min"),
        ({"kind": "data", "sigma_min": 2.0, "sigma_max": 1.0}, "expected 0 < sigma_min"),
    ):
        with pytest.raises(UserError, match=message):
            conversions.Foreign(edm_denoiser, **values)
