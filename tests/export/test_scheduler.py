"""RectifiedFlowScheduler against the stock class, closed forms and our own solvers."""

import ast
import functools
import json
import logging
from math import inf, nan

import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor

import flowmatch
from flowmatch.export.pipeline import ReflowPipeline
from flowmatch.export.scheduler import OTHERS, SOLVERS, USUAL, RectifiedFlowScheduler
from flowmatch.flow import grids, samplers, solvers

torch.set_num_threads(1)


def output(x, t):
    """A smooth, curved noise - data."""
    sigma = t / 1000
    return torch.cos(2 * x) * (1 + sigma) + 0.5 * x * sigma


def run(scheduler, x, net=output, generator=None):
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x, generator=generator).prev_sample
    return x


def sample(grid, solver, x, net=output, generator=None, **config):
    """Sample by the scheduler. grid: a number of steps, or sigmas."""
    scheduler = RectifiedFlowScheduler(solver=solver, **config)
    if isinstance(grid, int):
        scheduler.set_timesteps(grid)
    else:
        scheduler.set_timesteps(sigmas=grid)
    return run(scheduler, x, net, generator)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def velocity(net):
    """Give the math's v(x, t) of a net in diffusers' terms."""
    return lambda x, t: -net(x, torch.tensor(1000 * (1 - t), dtype=torch.float64))


def expected(grid, solver, x, net=output):
    """Sample by our own solvers, in the math's time."""
    return solvers.integrate(velocity(net), x, times_of(grid), solver)


def times_of(grid):
    """List the math's times, 0 to 1, of a number of steps or of sigmas."""
    sigmas = [1 - i / grid for i in range(grid)] if isinstance(grid, int) else grid
    return torch.tensor([*(1 - sigma for sigma in sigmas), 1.0], dtype=torch.float64)


class Mixture:
    """Noise - data for data in a mixture of pi_k N(mu_k, s_k^2 I), exact."""

    pi = torch.tensor([0.4, 0.6], dtype=torch.float64)
    mu = torch.tensor([[1.5, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    var = torch.tensor([0.5, 0.8], dtype=torch.float64) ** 2

    def __call__(self, x, timestep):
        sigma = timestep.double() / 1000
        t = 1 - sigma
        c = t**2 * self.var + sigma**2  # [K]
        apart = x[:, None] - t * self.mu  # [B, K, D]
        log = self.pi.log() - apart.square().sum(-1) / (2 * c) - c.log() * x.shape[1] / 2
        gamma = log.softmax(-1)[..., None]
        slope = ((t * self.var - sigma) / c)[:, None]
        return -(gamma * (self.mu + slope * apart)).sum(1)


def gaussian(std):
    """Noise - data for data in N(0, std^2), exact, float64."""

    def net(x, timestep):
        sigma = timestep.double() / 1000
        t = 1 - sigma
        return (sigma - t * std**2) / (t**2 * std**2 + sigma**2) * x

    return net


def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def lost(lines):
    """List the config keys that diffusers says it ignores, without those that flow classes imply."""
    dicts = [ast.literal_eval(line[line.index("{") : line.index("}") + 1]) for line in lines]
    return {key for each in dicts for key in each} - {*OTHERS, "flow_shift"}


def tiny_unet(**kwargs):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **kwargs,
    ).eval()


@pytest.fixture
def diffusers_log():
    """What diffusers logs, warnings and above (its loggers do not propagate)."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_default_grid_is_uniform(steps):
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(steps)
    expected = torch.tensor([*(1 - i / steps for i in range(steps)), 0.0])
    assert torch.equal(scheduler.sigmas, expected)
    assert torch.equal(scheduler.timesteps, 1000 * expected[:-1])
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.num_inference_steps == steps
    assert len(scheduler) == 1000


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 10])
def test_euler_is_bit_for_bit_the_stock_class_with_explicit_sigmas(steps):
    stock, ours = FlowMatchEulerDiscreteScheduler(), RectifiedFlowScheduler()
    stock.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    ours.set_timesteps(steps)
    assert torch.equal(ours.timesteps, stock.timesteps)
    x = noise(4, 3, 8, 8)
    assert torch.equal(run(ours, x), run(stock, x))
    if steps == 2:  # and the stock default is another, one-step sampler: the reason for this class
        stock.set_timesteps(2)
        assert (run(stock, x) - sample(2, "euler", x)).abs().max() > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_straight_flow_is_exact(solver, steps):
    x, data = noise(5, 2, dtype=torch.float64), torch.arange(10.0).reshape(5, 2).double()
    end = sample(steps, solver, x, lambda _, t: x - data)
    assert end.dtype == torch.float64
    torch.testing.assert_close(end, data, rtol=0, atol=1e-13)
    end = sample(steps, solver, x.float(), lambda _, t: (x - data).float())
    torch.testing.assert_close(end, data.float(), rtol=0, atol=1e-5)


UNEVEN = [0.96875, 0.75, 0.6875, 0.25, 0.125]  # dyadic, so that float32 holds every time


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", [1, 2, 4, 5, 8, 16, UNEVEN], ids=str)
def test_it_gives_what_our_own_solvers_give(solver, grid):
    x = noise(6, 2, dtype=torch.float64)
    # timesteps are float32, whence 1e-7 where N is no power of two
    tolerance = 1e-7 if grid == 5 else 1e-13
    got = sample(grid, solver, x)
    torch.testing.assert_close(got, expected(grid, solver, x), rtol=0, atol=tolerance)
    if grid not in (5, UNEVEN):  # bit for bit
        assert torch.equal(sample(grid, solver, x.float()), expected(grid, solver, x.float()))


@pytest.fixture(scope="module")
def mixture_end():
    return expected(1024, "rk4", noise(100, 2, dtype=torch.float64), Mixture())


@pytest.mark.parametrize(
    ("solver", "order", "slack"),
    [("euler", 1, 0.1), ("midpoint", 2, 0.1), ("heun", 2, 0.1), ("ab2", 2, 0.1), ("rk4", 4, 0.2)],
)
def test_order_of_convergence(mixture_end, solver, order, slack):
    x, net = noise(100, 2, dtype=torch.float64), Mixture()
    errors = [(sample(n, solver, x, net) - mixture_end).norm(dim=1).median() for n in (64, 256)]
    measured = (errors[0] / errors[1]).log2() / 2
    assert measured == pytest.approx(order, abs=slack)


def test_heun_lists_every_evaluation():
    scheduler = RectifiedFlowScheduler(solver="heun")
    scheduler.set_timesteps(2)
    assert scheduler.order == 2
    assert scheduler.timesteps.tolist() == [1000, 500, 500, 0]
    assert scheduler.sigmas.tolist() == [1, 0.5, 0.5, 0, 0]
    assert scheduler.sigmas[:: scheduler.order].tolist() == [1, 0.5, 0]
    assert scheduler.index_for_timestep(torch.tensor(500.0)) == 2  # where a step begins


@pytest.mark.parametrize(
    ("solver", "times", "evaluations"),
    [
        ("midpoint", [1000, 750, 500, 250], 2),
        ("rk4", [1000, 750, 750, 500, 500, 250, 250, 0], 4),
        ("ab2", [1000, 500], 1),
    ],
)
def test_stages_lie_inside_their_step(solver, times, evaluations):
    scheduler = RectifiedFlowScheduler(solver=solver)
    scheduler.set_timesteps(2)
    assert scheduler.order == evaluations
    assert scheduler.timesteps.tolist() == times
    assert (1000 * scheduler.sigmas).tolist() == [*times, 0]
    assert scheduler.sigmas[:: scheduler.order].tolist() == [1, 0.5, 0]


def test_ab2_forgets_the_last_sample():
    scheduler, x = RectifiedFlowScheduler(solver="ab2"), noise(3, 2)
    for _ in range(2):
        scheduler.set_timesteps(4)
        assert torch.equal(run(scheduler, x), sample(4, "ab2", x))


@pytest.mark.parametrize("grid", [1, 2, 8, UNEVEN], ids=str)
@pytest.mark.parametrize(
    "config",
    [{"eta": 0.3}, {"eta": 1.0}, {"churn": 0.5}, {"churn": 2.0}],
    ids=str,
)
def test_it_gives_what_our_own_samplers_give(grid, config):
    x, net, rng = noise(6, 2, dtype=torch.float64), Mixture(), seeded()

    def draw(x):
        return torch.randn(x.shape, generator=rng, dtype=x.dtype)

    if "eta" in config:
        wanted = samplers.ddim(velocity(net), x, times_of(grid), draw, config["eta"])
    else:
        w2 = samplers.sqrt_diffusion(config["churn"])
        wanted = samplers.sde(velocity(net), x, times_of(grid), draw, w2)
    got = sample(grid, "euler", x, net, seeded(), **config)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_without_noise_the_samplers_are_euler():
    start = noise(6, 2)
    plain = sample(8, "euler", start)
    assert torch.equal(sample(8, "euler", start, eta=0, churn=0), plain)
    assert not torch.equal(sample(8, "euler", start, eta=0.3), plain)


@pytest.mark.parametrize(
    ("config", "table"),
    [
        ({}, [0.50, 0.72, 0.85, 0.92, 0.96]),
        ({"eta": 1.0}, [0.50, 0.63, 0.77, 0.87, 0.93]),
    ],
    ids=["euler", "ddpm"],
)
def test_known_answers_on_a_gaussian(config, table):
    x = noise(200_000, dtype=torch.float64)
    stds = [
        sample(n, "euler", x, gaussian(1.0), seeded(), **config).std() for n in (2, 4, 8, 16, 32)
    ]
    assert torch.stack(stds).tolist() == pytest.approx(table, abs=0.009)


@pytest.fixture(scope="module")
def ode_ends():
    x = noise(50_000, dtype=torch.float64)
    return functools.cache(lambda std: sample(128, "euler", x, gaussian(std)))


@pytest.mark.parametrize(
    "config", [{"eta": 0.5}, {"eta": 1}, {"churn": 0.5}, {"churn": 2}], ids=str
)
@pytest.mark.parametrize("std", [1.0, 0.3])
def test_noise_on_the_way_keeps_the_distribution(ode_ends, std, config):
    x = noise(50_000, dtype=torch.float64)
    end, coarse = (
        sample(steps, "euler", x, gaussian(std), seeded(), **config) for steps in (128, 16)
    )
    fine_error, coarse_error = (abs(y.std().item() / std - 1) for y in (end, coarse))
    assert abs(end.mean().item()) < 4 * std / 50_000**0.5
    assert fine_error < 0.04  # of the steps; the sampling error of std is 0.3%
    assert fine_error < coarse_error + 0.005
    ode = ode_ends(std)  # takes another path
    assert torch.corrcoef(torch.stack([ode, end]))[0, 1] < 0.95


@pytest.mark.parametrize(
    "config", [{"eta": 1.0}, {"churn": 0.5}, {"churn": 1.0}, {"churn": 2.0}], ids=str
)
def test_noise_on_the_way_keeps_a_mixture(config):
    count, pi, mu, std = 20_000, Mixture.pi, Mixture.mu, Mixture.var.sqrt()
    end = sample(128, "euler", noise(count, 2, dtype=torch.float64), Mixture(), seeded(), **config)
    mean = (pi[:, None] * mu).sum(0)
    cov = (mu.T * pi) @ mu - torch.outer(mean, mean) + (pi * std**2).sum() * torch.eye(2)
    torch.testing.assert_close(end.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(end.T.cov(), cov, rtol=0, atol=0.08)
    right = (pi * torch.special.ndtr((mu[:, 0] - 0.25) / std)).sum().item()  # between the modes
    assert (end[:, 0] > 0.25).double().mean().item() == pytest.approx(right, abs=0.015)


@pytest.mark.parametrize("config", [{"eta": 0.7}, {"churn": 1.0}], ids=str)
def test_a_sample_with_its_own_generator_does_not_depend_on_its_batch(config):
    unet, x = tiny_unet(), noise(3, 2)
    together = sample(4, "euler", x, generator=[seeded(i) for i in range(3)], **config)
    for i in range(3):
        alone = sample(4, "euler", x[i : i + 1], generator=[seeded(i)], **config)
        assert torch.equal(together[i], alone[0])
        assert torch.equal(sample(4, "euler", x[i : i + 1], generator=seeded(i), **config), alone)
    assert not torch.equal(sample(4, "euler", x, generator=seeded(), **config)[1:], together[1:])

    for pipeline in (DDPMPipeline, ReflowPipeline):
        pipe = pipeline(unet=unet, scheduler=RectifiedFlowScheduler(**config))
        pipe.set_progress_bar_config(disable=True)
        common = {"num_inference_steps": 4, "output_type": "np"}
        images = pipe(batch_size=3, generator=[seeded(i) for i in range(3)], **common).images
        alone = pipe(batch_size=1, generator=[seeded(2)], **common).images
        torch.testing.assert_close(
            torch.as_tensor(images[2]), torch.as_tensor(alone[0]), rtol=0, atol=1e-5
        )

    scheduler = RectifiedFlowScheduler(**config)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="generator is a list of 2: expected 3"):
        scheduler.step(x, 1000.0, x, generator=[seeded(), seeded()])


@pytest.mark.parametrize("config", [{"eta": 0.7}, {"churn": 1.0}], ids=str)
def test_the_last_step_draws_nothing(config):
    x, draws, count = noise(4, 2), seeded(), 3
    sample(count, "euler", x, generator=draws, **config)
    after = seeded()
    for _ in range(count - 1):
        randn_tensor(x.shape, generator=after)
    assert torch.equal(draws.get_state(), after.get_state())
    assert torch.equal(sample(1, "euler", x, **config), sample(1, "euler", x, **config))


def test_noise_is_float32_under_a_half_precision_network():
    x = noise(16, 3).half()
    exact = sample(8, "euler", x.float(), lambda x, t: output(x.half(), t), seeded(), churn=1.0)
    got = sample(8, "euler", x, output, seeded(), churn=1.0)
    assert got.dtype == torch.half
    assert torch.equal(got, exact.half())


def test_explicit_sigmas_and_timesteps():
    scheduler, x = RectifiedFlowScheduler(), noise(3, 2)
    grid = [0.9, 0.4, 0.15]
    scheduler.set_timesteps(sigmas=grid)
    assert scheduler.sigmas.tolist() == pytest.approx([*grid, 0])
    by_sigmas = run(scheduler, x)
    scheduler.set_timesteps(3, timesteps=[900, 400, 150])
    assert scheduler.timesteps.tolist() == [900, 400, 150]
    torch.testing.assert_close(run(scheduler, x), by_sigmas)
    scheduler.set_timesteps(sigmas=torch.tensor(grid), mu=0.7)  # as pipelines pass it: no effect
    assert torch.equal(run(scheduler, x), by_sigmas)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10])
def test_shifted_steps_are_those_of_the_stock_class(steps, shift):
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours, x = RectifiedFlowScheduler(shift=shift), noise(4, 3)
    stock.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    ours.set_timesteps(steps)
    assert torch.equal(ours.sigmas, stock.sigmas)
    assert torch.equal(ours.timesteps, stock.timesteps)
    by_stock = run(stock, x)
    assert torch.equal(run(ours, x), by_stock)
    ours.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])  # given ones are shifted, too
    assert torch.equal(run(ours, x), by_stock)
    ours.set_timesteps(timesteps=[900.0, 150.0])  # but not times
    assert ours.timesteps.tolist() == [900, 150]


@pytest.mark.parametrize("solver", SOLVERS)
def test_shifted_steps_are_those_of_our_own_grid(solver):
    x, scheduler = (
        noise(6, 2, dtype=torch.float64),
        RectifiedFlowScheduler(solver=solver, shift=3.0),
    )
    scheduler.set_timesteps(4)
    end = solvers.integrate(velocity(output), x, grids.shift_grid(4, 3.0), solver)
    torch.testing.assert_close(run(scheduler, x), end, rtol=0, atol=1e-7)  # timesteps are float32


@pytest.mark.parametrize("solver", SOLVERS)
def test_starting_in_the_middle(solver):
    scheduler, x = RectifiedFlowScheduler(solver=solver), noise(3, 2)
    scheduler.set_timesteps(sigmas=[0.5, 0.25])
    expected = run(scheduler, x)
    for begin in (True, False):  # as image-to-image pipelines start, and by the timestep alone
        scheduler.set_timesteps(4)
        if begin:
            scheduler.set_begin_index(2 * scheduler.order)
            assert scheduler.begin_index == 2 * scheduler.order
        state = x
        for t in scheduler.timesteps[2 * scheduler.order :]:
            state = scheduler.step(output(state, t), t, state, return_dict=False)[0]
        assert torch.equal(state, expected)
        assert scheduler.step_index == len(scheduler.timesteps)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_state_is_never_half_precision(solver, half):
    scheduler = RectifiedFlowScheduler(solver=solver)
    start = noise(16, 3).to(half)

    scheduler.set_timesteps(20)
    exact = run(scheduler, start.float(), lambda x, t: output(x.to(half), t).to(half))
    assert exact.dtype == torch.float32  # the sample's dtype, not that of the network's output
    if solver == "euler":
        x = start.float()
        for t, h in zip(scheduler.timesteps, scheduler.sigmas.diff(), strict=True):
            x = x + h * output(x.to(half), t).to(half).float()
        assert torch.equal(exact, x)

    scheduler.set_timesteps(20)
    stock = run(scheduler, start, lambda x, t: output(x, t).to(half))
    assert stock.dtype == half  # so that a stock pipeline can feed it to a half-precision network
    assert torch.equal(stock, exact.to(half))


def test_a_sample_changed_by_the_caller_is_taken():
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(2)
    x = noise(4, 2).bfloat16()
    first, second = scheduler.timesteps
    x = scheduler.step(output(x, first).bfloat16(), first, x).prev_sample
    x[2:] = 1.0
    v = output(x, second).bfloat16()
    end = scheduler.step(v, second, x).prev_sample
    assert torch.equal(end[2:], (x[2:].float() - 0.5 * v[2:].float()).bfloat16())


def test_scale_noise_at_any_time():
    scheduler = RectifiedFlowScheduler()
    data, eps = torch.full((3, 1, 2, 2), 5.0), noise(3, 1, 2, 2)
    t = torch.tensor([0.0, 123.456, 1000.0])
    x = scheduler.scale_noise(data, t, eps)
    sigma = (t / 1000).reshape(3, 1, 1, 1)
    torch.testing.assert_close(x, sigma * eps + (1 - sigma) * data)
    assert torch.equal(x[0], data[0])
    assert torch.equal(x[2], eps[2])
    assert torch.equal(scheduler.add_noise(data, eps, t), x)
    torch.testing.assert_close(scheduler.scale_noise(data, 123.456, eps)[1], x[1])
    torch.testing.assert_close(scheduler.scale_noise(data, torch.tensor(123.456), eps)[1], x[1])
    assert scheduler.scale_noise(data.half(), t, eps.half()).dtype == torch.half
    with pytest.raises(ValueError, match="one timestep or one per sample"):
        scheduler.scale_noise(data, t[:2], eps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0: expected an integer of at least 1"),
        ({"num_inference_steps": 2.0}, "num_inference_steps=2.0: expected an integer"),
        ({}, "num_inference_steps=None: expected an integer"),
        ({"sigmas": [1.0], "timesteps": [998.0]}, "both sigmas=.* and timesteps=.* not 1000 times"),
        ({"sigmas": [1.0], "timesteps": [1000.0, 1.0]}, "not 1000 times"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "sigmas has 2 entries"),
        ({"sigmas": [1.0, 0.5, 0.6]}, r"strictly falling numbers in \(0, 1\]"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "strictly falling"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "the final 0 is appended"),
        ({"sigmas": [1.5, 0.5]}, "strictly falling"),
        ({"sigmas": [float("nan")]}, "strictly falling"),
        ({"sigmas": []}, "strictly falling"),
        ({"timesteps": [250.0, 500.0]}, r"timesteps=.* strictly falling numbers in \(0, 1000\]"),
    ],
)
def test_wrong_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler().set_timesteps(**arguments)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
def test_the_default_grid_of_the_stock_class_is_taken_as_uniform(steps):
    """Pipelines pass it as sigmas (Bria), or as rounded timesteps beside sigmas (CogView4)."""
    uniform, scheduler = RectifiedFlowScheduler(shift=3.0), RectifiedFlowScheduler(shift=3.0)
    uniform.set_timesteps(steps)
    plain = torch.linspace(1, 1 / 1000, steps)
    rounded = torch.linspace(1000, 1, steps).long().float()
    for given in ({"sigmas": plain}, {"sigmas": rounded / 1000, "timesteps": rounded}):
        scheduler.set_timesteps(**given)
        assert torch.equal(scheduler.sigmas, uniform.sigmas)
        assert torch.equal(scheduler.timesteps, uniform.timesteps)
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.4, 0.1], timesteps=[1000, 400, 100])
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 400, 100])


def test_wrong_steps_are_refused():
    scheduler, x = RectifiedFlowScheduler(), noise(2, 2)
    with pytest.raises(ValueError, match="step before set_timesteps"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(2)
    for t in (1000, torch.tensor(1000), torch.tensor(1000, dtype=torch.int32)):
        with pytest.raises(ValueError, match="is an integer"):
            scheduler.step(x, t, x)
    with pytest.raises(ValueError, match=r"timestep=999: no step.*begins there.*\[1000, 500\]"):
        scheduler.step(x, 999.0, x)
    with pytest.raises(ValueError, match="one for the whole batch"):
        scheduler.step(x, torch.tensor([1000.0, 1000.0]), x)
    with pytest.raises(ValueError, match="expected the same"):
        scheduler.step(x.repeat(1, 2), 1000.0, x)
    with pytest.raises(ValueError, match="multiple of order=1 below 2"):
        scheduler.set_begin_index(2)
    scheduler.step(x, 1000.0, x)
    with pytest.raises(ValueError, match=r"timestep=1000, but evaluation 1 .* is at 500"):
        scheduler.step(x, 1000.0, x)
    scheduler.step(x, 500.0, x)
    with pytest.raises(ValueError, match="step past the end: all 2 evaluations"):
        scheduler.step(x, 500.0, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "rk45"}, "solver='rk45': expected one of euler, midpoint, heun, rk4, ab2"),
        ({"reflow_round": -1}, "reflow_round=-1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        *(({"shift": shift}, f"{shift=}: expected more than 0") for shift in (0, -1.0, inf, nan)),
        ({"eta": 1.5}, r"eta=1.5, churn=0.0: expected eta in \[0, 1\]"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"churn": -1}, "churn=-1: expected"),
        ({"churn": 2.5}, r"expected eta in \[0, 1\] and churn in \[0, 2\]"),
        ({"eta": 0.5, "churn": 1.0}, "eta=0.5, churn=1.0: these are two different samplers"),
        ({"eta": 0.5, "solver": "heun"}, "with solver='heun': .*needs solver='euler'"),
        ({"churn": 1.0, "solver": "ab2"}, "with solver='ab2': .*needs solver='euler'"),
        ({"eta": 1.0, "reflow_round": 1}, "with reflow_round=1: after reflow, .* yields no score"),
        ({"churn": 1.0, "reflow_round": 2}, "with reflow_round=2: after reflow"),
    ],
)
def test_wrong_configs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler(**arguments)


def test_config_survives_the_disk(tmp_path, diffusers_log):
    RectifiedFlowScheduler(solver="rk4", reflow_round=2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert {key for key in saved if not key.startswith("_")} == {
        *("num_train_timesteps", "solver", "reflow_round", "eta", "churn", "shift"),
        *("prediction_type", "use_flow_sigmas", "flow_shift"),
    }
    loaded = RectifiedFlowScheduler.from_pretrained(tmp_path)
    assert (loaded.config.solver, loaded.config.reflow_round, loaded.order) == ("rk4", 2, 4)
    RectifiedFlowScheduler(eta=0.5, reflow_round=0).save_pretrained(tmp_path)
    loaded = RectifiedFlowScheduler.from_pretrained(tmp_path)
    assert (loaded.config.eta, loaded.config.reflow_round) == (0.5, 0)
    with pytest.raises(ValueError, match="reflow_round=1"):  # the refusal holds on the way back too
        RectifiedFlowScheduler.from_config(loaded.config, reflow_round=1)
    # a folder written before eta, churn and shift existed
    old = {"_class_name": "RectifiedFlowScheduler", "solver": "heun", "reflow_round": 1}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(old))
    loaded = RectifiedFlowScheduler.from_pretrained(tmp_path)
    assert (loaded.config.churn, loaded.config.shift) == (0, 1)
    few = RectifiedFlowScheduler.from_pretrained(tmp_path, solver="ab2", shift=3.0)
    few.save_pretrained(tmp_path)
    loaded = RectifiedFlowScheduler.from_pretrained(tmp_path)
    assert (loaded.config.solver, loaded.config.shift, loaded.config.reflow_round) == ("ab2", 3, 1)
    assert diffusers_log == []


def flow_dpm(**config):
    """Make the stock scheduler for other numbers of steps, on a straight path unless config says so."""
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} | config
    return DPMSolverMultistepScheduler(**config)


@pytest.mark.parametrize(
    "stock",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        flow_dpm(solver_order=1),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_what_from_config_loses_is_told(stock, diffusers_log):
    ours = RectifiedFlowScheduler.from_config(stock.config)
    assert (ours.config.solver, ours.config.shift) == ("euler", stock.config.get("shift", 1))
    back = type(stock).from_config(ours.config)
    shared = [key for key in stock.config if not key.startswith("_")]
    assert {key: back.config[key] for key in shared} == {key: stock.config[key] for key in shared}
    assert not lost(diffusers_log)
    type(stock).from_config(RectifiedFlowScheduler(solver="heun").config)
    assert lost(diffusers_log) == {"solver"}


def test_the_shift_of_another_class_is_ours(tmp_path):
    stock = flow_dpm(flow_shift=3.0)
    stock.save_pretrained(tmp_path)
    for ours in (
        RectifiedFlowScheduler.from_config(stock.config),
        RectifiedFlowScheduler.from_config(flow_dpm().config, flow_shift=3.0),
        RectifiedFlowScheduler.from_pretrained(tmp_path),
    ):
        ours.set_timesteps(4)
        assert ours.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
        there = DPMSolverMultistepScheduler.from_config(ours.config, flow_shift=2.0)
        with pytest.raises(ValueError, match="shift=3.0 and flow_shift=2.0: .* pass shift="):
            RectifiedFlowScheduler.from_config(there.config)
        again = RectifiedFlowScheduler.from_config(ours.config, shift=1.0)
        assert again.config.shift == 1
        assert RectifiedFlowScheduler.from_config(again.config).config.shift == 1
    assert RectifiedFlowScheduler.from_config(stock.config, shift=2.0).config.shift == 2


@pytest.mark.parametrize(
    "stock",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        FlowMatchEulerDiscreteScheduler(shift_terminal=0.25),
        FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True),
        FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        flow_dpm(use_lu_lambdas=True),
        flow_dpm(final_sigmas_type="sigma_min"),
        flow_dpm(prediction_type="epsilon"),
    ],
)
def test_a_config_that_bends_the_grid_is_refused(stock, tmp_path, diffusers_log):
    default = type(stock)().config if "Euler" in type(stock).__name__ else flow_dpm().config
    (key,) = (key for key in USUAL if stock.config.get(key) != default.get(key))
    given = {key: stock.config[key]}
    stock.save_pretrained(tmp_path)
    for load in (
        lambda **words: RectifiedFlowScheduler.from_config(stock.config, **words),
        lambda **words: RectifiedFlowScheduler.from_pretrained(tmp_path, **words),
    ):
        with pytest.raises(ValueError, match=f"{key}={given[key]!r}: .* pass {key}={USUAL[key]!r}"):
            load()
        ours = load(**{key: USUAL[key]})  # as the message says
        assert ours.config.shift == stock.config.get("shift", 1)
        type(stock).from_config(ours.config).set_timesteps(3)
        RectifiedFlowScheduler.from_config(ours.config)
        with pytest.raises(ValueError, match=f"{key}="):
            RectifiedFlowScheduler.from_config(default, **given)
    assert not lost(diffusers_log)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_in_the_stock_pipelines(steps):
    def draw(pipeline, unet, scheduler, **kwargs):
        pipe = pipeline(unet=unet, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        kwargs |= {"batch_size": 2, "num_inference_steps": steps, "generator": generator}
        return torch.as_tensor(pipe(**kwargs, output_type="np").images)

    unet, ours = tiny_unet(), RectifiedFlowScheduler()
    exact = FlowMatchEulerDiscreteScheduler(shift_terminal=None if steps == 1 else 1 / steps)
    assert torch.equal(draw(DDPMPipeline, unet, ours), draw(DDPMPipeline, unet, exact))
    few = draw(DDPMPipeline, unet, RectifiedFlowScheduler(solver="ab2", shift=3.0))
    assert torch.equal(few, draw(DDPMPipeline, unet, ours)) == (steps == 1)
    heun = draw(DDPMPipeline, unet, RectifiedFlowScheduler(solver="heun"))
    assert 0 < (heun - draw(DDPMPipeline, unet, ours)).abs().max() < 0.5
    assert draw(DDPMPipeline, tiny_unet().half(), ours).isfinite().all()
    # the stock flow scheduler lacks scale_model_input and init_noise_sigma, and fails here
    by_class = draw(
        ConsistencyModelPipeline, tiny_unet(num_class_embeds=3), ours, class_labels=[0, 1]
    )
    assert by_class.isfinite().all()


def test_exported_names_load_lazily():
    assert RectifiedFlowScheduler.__module__ == "flowmatch"
    assert flowmatch.RectifiedFlowScheduler is RectifiedFlowScheduler
    assert issubclass(RectifiedFlowScheduler, flowmatch.SchedulerMixin)
    assert set(flowmatch.__all__) <= set(dir(flowmatch))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = flowmatch.Nothing
