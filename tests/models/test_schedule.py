"""What a diffusion's network predicts, and the velocity of the flow through the same noise and data."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from flowmatch.models.schedule import Schedule, ZeroTerminal, betas_of

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = DDIMScheduler(**LEVELS)
KINDS = ["epsilon", "sample", "v_prediction"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_prediction_is_an_exact_velocity(kind):
    schedule = Schedule(SCHEDULER.alphas_cumprod.double(), kind)
    x0, x1 = torch.randn(2, 6, 3, dtype=torch.float64).unbind()
    steps = torch.tensor([999, 700, 500, 20, 3, 1])
    t = schedule.times[999 - steps]
    x = (1 - t)[:, None] * x0 + t[:, None] * x1
    noisy = SCHEDULER.add_noise(x1, x0, steps)
    assert torch.allclose(schedule.scaled(x, t), noisy, rtol=1e-6)
    v_prediction = SCHEDULER.get_velocity(x1, x0, steps)
    out = {"epsilon": x0, "sample": x1, "v_prediction": v_prediction}[kind]
    assert torch.allclose(schedule.velocity(x, t, out), x1 - x0, atol=1e-5)
    assert torch.equal(schedule.timestep(t), steps.double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_squared_error_of_the_prediction(kind):
    schedule = Schedule(SCHEDULER.alphas_cumprod.double(), kind)
    x0, x1, wrong = torch.randn(3, 5, 7, dtype=torch.float64).unbind()
    shares = torch.rand(5, dtype=torch.float64)
    seen = {}

    def v(x, t, cond):
        a = SCHEDULER.alphas_cumprod.double()[schedule.timestep(t).long()].sqrt()[:, None]
        s = (1 - a**2).sqrt()
        seen["right"] = {"epsilon": x0, "sample": x1, "v_prediction": a * x0 - s * x1}[kind]
        return schedule.velocity(x, t, wrong)

    error = schedule.objective()(v, v, x0, x1, shares, shares, None, 0)
    expected = (wrong - seen["right"]).square().mean(1)
    assert torch.allclose(error, expected, rtol=1e-6)


def test_shares_of_the_timesteps_are_their_times():
    schedule = Schedule(SCHEDULER.alphas_cumprod.double(), "epsilon")
    shares = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(schedule.spread(shares), schedule.times)
    assert schedule.spread(torch.ones(1)).item() == pytest.approx(schedule.times[-1].item())


def test_timesteps_between_two_are_linear_in_t():
    schedule = ZeroTerminal(betas_of(SCHEDULER))
    assert schedule.times[0] == 0
    t = torch.rand(200, dtype=torch.float64)
    steps = np.arange(1000)[::-1]
    expected = np.interp(t.numpy(), schedule.times.numpy(), steps)
    assert np.allclose(schedule.timestep(t).numpy(), expected, atol=1e-9)
    assert schedule.grid(4).tolist() == [*schedule.times[[0, 250, 500, 750]].tolist(), 1.0]
