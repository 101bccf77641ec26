"""RectifiedFlowScheduler against the stock class, closed forms and plain loops."""

import json
import logging
from itertools import pairwise

import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

import flowmatch
from flowmatch.scheduler import SOLVERS, RectifiedFlowScheduler

torch.set_num_threads(1)


def output(x, t):
    """A smooth, curved noise - data."""
    sigma = t / 1000
    return torch.cos(2 * x) * (1 + sigma) + 0.5 * x * sigma


def run(scheduler, x, net=output):
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample
    return x


def sample(steps, solver, x, net=output):
    scheduler = RectifiedFlowScheduler(solver=solver)
    scheduler.set_timesteps(steps)
    return run(scheduler, x, net)


def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


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


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_heun_is_plain_heun(steps):
    x = state = noise(6, 2, dtype=torch.float64)
    grid = torch.tensor([*(1 - i / steps for i in range(steps)), 0.0]).double()
    for sigma, after in pairwise(grid):  # the last step, to sigma = 0, too
        first = output(state, 1000 * sigma)
        second = output(state + (after - sigma) * first, 1000 * after)
        state = state + (after - sigma) * (first + second) / 2
    # timesteps are float32, whence 1e-7
    torch.testing.assert_close(sample(steps, "heun", x), state, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    x = noise(50, 2, dtype=torch.float64)
    truth = sample(2000, "heun", x)
    coarse, fine = ((sample(n, solver, x) - truth).abs().median() for n in (16, 64))
    assert torch.log(coarse / fine) / torch.log(torch.tensor(4.0)) == pytest.approx(order, abs=0.15)


def test_heun_lists_every_evaluation():
    scheduler = RectifiedFlowScheduler(solver="heun")
    scheduler.set_timesteps(2)
    assert scheduler.order == 2
    assert scheduler.timesteps.tolist() == [1000, 500, 500, 0]
    assert scheduler.sigmas.tolist() == [1, 0.5, 0.5, 0, 0]
    assert scheduler.sigmas[:: scheduler.order].tolist() == [1, 0.5, 0]
    assert scheduler.index_for_timestep(torch.tensor(500.0)) == 2  # where a step begins


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
    with pytest.raises(ValueError, match="one timestep or one a sample"):
        scheduler.scale_noise(data, t[:2], eps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0: expected an integer of at least 1"),
        ({"num_inference_steps": 2.0}, "num_inference_steps=2.0: expected an integer"),
        ({}, "no grid is given"),
        ({"sigmas": [1.0], "timesteps": [1000.0]}, "both sigmas and timesteps"),
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
        ({"solver": "rk45"}, "solver='rk45': expected one of euler, heun"),
        ({"reflow_round": -1}, "reflow_round=-1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
    ],
)
def test_wrong_configs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlowScheduler(**arguments)


def test_config_survives_the_disk(tmp_path, diffusers_log):
    RectifiedFlowScheduler(solver="heun", reflow_round=2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert {key for key in saved if not key.startswith("_")} == {
        "num_train_timesteps",
        "reflow_round",
        "solver",
    }
    loaded = RectifiedFlowScheduler.from_pretrained(tmp_path)
    assert (loaded.config.solver, loaded.config.reflow_round, loaded.order) == ("heun", 2, 2)
    assert diffusers_log == []


@pytest.mark.parametrize(
    "stock",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        DPMSolverMultistepScheduler(solver_order=1, use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_from_config_is_quiet_both_ways(stock, tmp_path, diffusers_log):
    ours = RectifiedFlowScheduler.from_config(stock.config)
    assert ours.config.solver == "euler"
    back = type(stock).from_config(ours.config)
    shared = [key for key in stock.config if not key.startswith("_")]
    assert {key: back.config[key] for key in shared} == {key: stock.config[key] for key in shared}
    ours = RectifiedFlowScheduler()
    type(stock).from_config(ours.config)
    ours.save_pretrained(tmp_path)  # where every argument is written, defaults too
    type(stock).from_config(RectifiedFlowScheduler.from_pretrained(tmp_path).config)
    assert diffusers_log == []
    # but a solver that would be lost is told
    type(stock).from_config(RectifiedFlowScheduler(solver="heun").config)
    assert "'solver': 'heun'" in diffusers_log[0]


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
