"""Path, times, losses and couplings against closed forms."""

import math

import numpy as np
import pytest
import torch

from flowmatch.config import UserError, validate
from flowmatch.flow import coupling, grids, losses, path, times
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig


def test_the_path_is_straight_and_its_derivative_is_the_velocity():
    x0, x1 = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    assert torch.equal(path.interpolate(x0, x1, 0.0), x0)
    assert torch.equal(path.interpolate(x0, x1, 1.0), x1)
    step = 1e-6
    slope = (path.interpolate(x0, x1, t + step) - path.interpolate(x0, x1, t)) / step
    torch.testing.assert_close(slope, path.velocity(x0, x1), atol=1e-8, rtol=1e-6)


def test_both_ends_are_recovered_from_any_point():
    x0, x1 = torch.randn(2, 6, 2, dtype=torch.float64)
    t = torch.tensor([0, 0.1, 0.5, 0.9, 1, 1], dtype=torch.float64)
    x, v = path.interpolate(x0, x1, t), path.velocity(x0, x1)
    torch.testing.assert_close(path.data_prediction(x, v, t), x1)
    torch.testing.assert_close(path.noise_prediction(x, v, t), x0)


CONFIGS = [
    TimesConfig(),
    TimesConfig(name="logit_normal", mean=0.5, std=0.8),
    TimesConfig(name="u_shape", a=4.0),
    TimesConfig(name="u_shape", a=4.0, zero=0.5),
    TimesConfig(name="noise_heavy"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.name}-{c.zero}")
def test_times_follow_their_density(config):
    n, bins = 400_000, 20
    u = torch.from_numpy(np.random.default_rng(0).random(n))
    t = times.sample(u, config)
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    at_zero = (t == 0).double().mean().item()
    assert at_zero == pytest.approx(config.zero, abs=0.003)
    share = torch.histc(t[t > 0].double(), bins, 0, 1) / n
    fine = (torch.arange(bins * 100, dtype=torch.float64) + 0.5) / (bins * 100)
    expected = times.density(fine, config).reshape(bins, 100).mean(1) / bins
    assert expected.sum().item() == pytest.approx(1 - config.zero, abs=1e-3)
    # five standard deviations of a binomial share
    assert (share - expected).abs().max() < 5 * math.sqrt(expected.max().item() / n)


def test_a_share_of_one_is_distillation():
    t = times.sample(torch.rand(100, dtype=torch.float64), TimesConfig(zero=1.0))
    assert (t == 0).all()


def test_the_times_of_few_steps_are_those_of_each_number_as_often():
    u = (torch.arange(1200, dtype=torch.float64) + 0.5) / 1200
    laid = [grids.uniform_grid(1), grids.uniform_grid(2), torch.tensor([0.0, 0.25, 0.5, 0.75, 1])]
    t, count = times.sample(u, laid).unique(return_counts=True)
    assert t.dtype == torch.float32
    assert t.tolist() == [0, 0.25, 0.5, 0.75]
    assert count.tolist() == [400 + 200 + 100, 100, 200 + 100, 100]
    assert (times.sample(u, laid[:1]) == times.sample(u, TimesConfig(zero=1.0))).all()


def test_losses_are_per_sample():
    v, target = torch.randn(2, 7, 3, 4)
    square = (v - target).square()
    mse = losses.mse(v, target)
    torch.testing.assert_close(mse, square.mean((1, 2)))
    huber = losses.pseudo_huber(v, target, 0.5)
    torch.testing.assert_close(huber, (square.sum((1, 2)) + 0.25).sqrt() - 0.5)
    assert (losses.pseudo_huber(v, v, 0.5) == 0).all()


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
def test_the_normalised_loss_divides_the_gradient(power):
    v, target = torch.randn(2, 7, 3, 4, dtype=torch.float64)
    v = v * torch.logspace(-2, 2, 7, dtype=torch.float64)[:, None, None]
    v.requires_grad_()
    constants = {"power": power, "eps": 1e-3}
    loss = losses.normalised(v, target, **constants)
    square = (v - target).square().sum((1, 2))
    (slope,) = torch.autograd.grad(loss.sum(), v)
    (expected,) = torch.autograd.grad((square / (square.detach() + 1e-3) ** power).sum(), v)
    torch.testing.assert_close(slope, expected)
    if power == 0.5:
        torch.testing.assert_close(loss, 2 * losses.pseudo_huber(v, target, 1e-3**0.5))
    assert (losses.normalised(target, target, **constants) == 0).all()
    # it falls with the error
    assert (losses.normalised(2 * v - target, target, **constants) > loss).all()


def test_a_power_without_its_loss_is_refused():
    with pytest.raises(
        UserError, match="power belongs to name=normalised and feature; with name=mse leave it"
    ):
        validate(LossConfig, {"power": 0.5})


@pytest.mark.parametrize("share", ["equal", "end"])
def test_a_share_without_its_objective_is_refused(share):
    with pytest.raises(UserError, match=f"{share} belongs to name=meanflow; with name=velocity"):
        validate(ObjectiveConfig, {share: 0.4})
    validate(ObjectiveConfig, ObjectiveConfig().model_dump())  # as config.yaml holds it
    validate(ObjectiveConfig, {"name": "meanflow", share: 0.4})


def features(dtype=torch.float64):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Tanh()).to(dtype)
    return net.requires_grad_(False)


HUBER = 0.3
SEEN = LossConfig(name="feature", features="runs/x/classifier", c=HUBER)


def test_the_feature_loss_is_its_formula_and_finite_at_both_ends():
    x0, x1, v = torch.randn(3, 6, 1, 5, 5, dtype=torch.float64)
    t = torch.tensor([0, 0.2, 0.5, 0.9, 0.98, 1], dtype=torch.float64)
    x, net, c = path.interpolate(x0, x1, t), features(), HUBER
    loss = losses.feature_loss(v, x, x0, x1, t, net, c=c)
    h = ((v - (x1 - x0)).square().sum((1, 2, 3)) + c**2).sqrt() - c
    end = x + (1 - t)[:, None, None, None] * v
    f = ((net(end) - net(x1)).square().sum((1, 2, 3)) + c**2).sqrt() - c
    torch.testing.assert_close(loss[:-1], (t * h + f / (1 - t))[:-1])
    torch.testing.assert_close(loss[-1], h[-1])  # at t = 1 the prediction is the data
    at_truth = (x1 - x0).requires_grad_()
    loss = losses.feature_loss(at_truth, x, x0, x1, t, net, c=c)
    assert loss.abs().max() < 1e-12
    (slope,) = torch.autograd.grad(loss.sum(), at_truth)
    assert slope.abs().max() < 1e-9
    v.requires_grad_()
    (slope,) = torch.autograd.grad(losses.feature_loss(v, x, x0, x1, t, net, c=c).sum(), v)
    assert slope.isfinite().all()
    assert (slope.flatten(1).norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_power_weighs_the_feature_loss_as_a_whole(power):
    x0, x1, v = torch.randn(3, 6, 1, 5, 5, dtype=torch.float64)
    t = torch.tensor([0, 0.2, 0.5, 0.9, 0.98, 1], dtype=torch.float64)
    x, net = path.interpolate(x0, x1, t), features()
    end = x + (1 - t)[:, None, None, None] * v
    square = (net(end) - net(x1)).square().sum((1, 2, 3)) / (1 - t).clamp(min=1e-2) ** 2
    square = square + t * (v - (x1 - x0)).square().sum((1, 2, 3))
    eps = 1e-3
    loss = losses.feature_loss(v, x, x0, x1, t, net, power=power, eps=eps)
    whole = (1 + square / eps).log() if power == 1 else 2 * ((square + eps) ** 0.5 - eps**0.5)
    torch.testing.assert_close(loss, whole)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_gradient_of_the_feature_loss_is_its_slope(power):
    """Central differences, in float64, through the frozen module."""
    x0, x1, v, direction = torch.randn(4, 5, 1, 5, 5, dtype=torch.float64)
    t = torch.tensor([0, 0.2, 0.5, 0.9, 1], dtype=torch.float64)
    net = features()
    loss = losses.build(SEEN.model_copy(update={"power": power}), net)

    def total(v):
        return loss(v, path.interpolate(x0, x1, t), x0, x1, t).sum()

    v.requires_grad_()
    (slope,) = torch.autograd.grad(total(v), v)
    step = 1e-6 * direction
    difference = (total(v + step) - total(v - step)) / 2e-6
    torch.testing.assert_close((slope * direction).sum(), difference, rtol=1e-7, atol=0)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "feature"}, "name=feature needs the sealed folder of a train_classifier"),
        ({"name": "mse", "features": "x"}, "features belongs to name=feature; with name=mse"),
    ],
)
def test_feature_loss_and_features_come_together(values, message):
    with pytest.raises(UserError, match=message):
        validate(LossConfig, values)


def test_the_feature_loss_refuses_what_does_not_fit():
    x, t = torch.randn(4, 1, 5, 5), torch.full((4,), 0.5)
    net = features(torch.float32)
    with pytest.raises(UserError, match="expected one shape"):
        losses.feature_loss(x, x, x[:3], x, t, net)
    with pytest.raises(UserError, match="expected one shape"):
        losses.feature_loss(x, x, x, x, t[:1], net)
    with pytest.raises(UserError, match=r"the feature module returns \[2, 50\]"):
        losses.feature_loss(x, x, x, x, t, Halves())


class Halves(torch.nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


def test_couplings():
    batch = {"x0": torch.zeros(4, 2), "x1": torch.ones(4, 2)}
    drawn = coupling.independent(batch, lambda shape: torch.full((4, *shape), 7.0))
    assert (drawn[0] == 7).all()
    assert (drawn[1] == 1).all()

    def refuse(shape):
        raise AssertionError("stored pairs need no noise")

    assert coupling.stored(batch, refuse) == (batch["x0"], batch["x1"])
