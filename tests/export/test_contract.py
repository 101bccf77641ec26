"""RectifiedFlowScheduler keeps the contract that diffusers tests its own schedulers by, and more of it.

The cases are those of diffusers' `SchedulerCommonTest`, in our own words.
"""

import inspect
import subprocess
import sys

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    IPNDMScheduler,
    KarrasVeScheduler,
    MiniMaxH3Scheduler,
    PiflowScheduler,
    PNDMScheduler,
    RePaintScheduler,
    UniPCMultistepScheduler,
)

from flowmatch.export.scheduler import SOLVERS, RectifiedFlowScheduler
from tests.export.test_scheduler import noise, output, run, sample

CONFIGS = [
    {},
    {"solver": "heun", "reflow_round": 2},
    {"solver": "ab2", "shift": 3.0, "num_train_timesteps": 1000},
    {"eta": 0.5},
]


def follow(scheduler, x, steps):
    """Sample as the oldest pipelines do."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(output(x, t), t, x).prev_sample
    return x


def public(scheduler):
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


@pytest.fixture(params=CONFIGS, ids=str)
def made(request):
    return RectifiedFlowScheduler(**request.param)


def test_the_config_after_save_and_load_is_the_one_before(made, tmp_path):
    made.save_pretrained(tmp_path)
    loaded = RectifiedFlowScheduler.from_pretrained(tmp_path)
    assert dict(loaded.config) == public(made)


def test_a_saved_scheduler_samples_the_same(made, tmp_path):
    made.save_config(tmp_path)
    ends = []
    for scheduler in (made, RectifiedFlowScheduler.from_pretrained(tmp_path)):
        scheduler.set_timesteps(10)
        ends.append(run(scheduler, noise(2, 3), generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*ends)


def test_every_compatible_class_leads_back(made):
    assert len(made.compatibles) >= 2
    for other in made.compatibles:
        there = other.from_config(made.config)
        back = RectifiedFlowScheduler.from_config(there.config)
        assert {key: back.config[key] for key in public(made)} == public(made)
        if "_use_default_values" in made.config:
            known = [set(each.config["_use_default_values"]) for each in (made, back)]
            assert known[0] == known[1]
        more = back.config.keys() - made.config.keys()
        assert more.isdisjoint(inspect.signature(RectifiedFlowScheduler.__init__).parameters)


def test_steps_keep_the_shape_and_both_forms_of_output_agree(made):
    x = torch.rand(4, 3, 8, 8)
    outputs = []
    for as_dict in (True, False):
        made.set_timesteps(10)
        first, second = (time.clone() for time in made.timesteps[:2])
        generator = torch.Generator().manual_seed(0)
        found = made.step(0.1 * x, first, x, generator=generator, return_dict=as_dict)
        assert made.step(0.1 * x, second, x, generator=generator).prev_sample.shape == x.shape
        outputs.append(found.prev_sample if as_dict else found[0])
    assert outputs[0].shape == x.shape
    assert torch.equal(*outputs)


def test_the_interface_is_that_of_every_scheduler(made):
    x = torch.rand(4, 3, 8, 8)
    assert made.init_noise_sigma == 1
    assert made.scale_model_input(x, 0.0).shape == x.shape
    made.set_timesteps(50)
    assert made.add_noise(x, torch.randn_like(x), made.timesteps[5][None]).shape == x.shape
    parameters = inspect.signature(RectifiedFlowScheduler.__init__).parameters
    assert ("kwargs" in parameters) == bool(RectifiedFlowScheduler._deprecated_kwargs)
    made.own = 5
    made.register_to_config(test_attribute=5)
    assert (made.own, made.save_pretrained) == (5, made.save_pretrained)
    with pytest.warns(FutureWarning):
        assert made.test_attribute == 5
    with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
        _ = made.nothing


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_a_solver_of_diffusers_takes_the_same_flow(tmp_path, steps, saved):
    """By from_config, and by from_pretrained of the saved config."""
    x, ours = noise(4, 3), RectifiedFlowScheduler(shift=1.5)
    ours.save_pretrained(tmp_path)
    end = follow(ours, x, steps)
    for other, most in ((DPMSolverMultistepScheduler, 0.15), (UniPCMultistepScheduler, 0.2)):
        switched = other.from_pretrained(tmp_path) if saved else other.from_config(ours.config)
        assert (follow(switched, x, steps) - end).abs().max() < most
    exact = DPMSolverMultistepScheduler.from_config(ours.config, solver_order=1)
    assert (follow(exact, x, steps) - end).abs().max() < 0.02  # begins at sigma = 0.999


@pytest.mark.parametrize("other", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_a_class_that_knows_no_flow_raises_an_error(other):
    """Without the prediction in the config it would sample as if the network predicted noise."""
    switched = other.from_config(RectifiedFlowScheduler(reflow_round=1).config)
    with pytest.raises(ValueError, match="prediction_type given as flow_prediction must be one of"):
        follow(switched, noise(4, 3), 4)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (IPNDMScheduler, "trained_betas"),
        (RePaintScheduler, "beta_start"),
        (CMStochasticIterativeScheduler, "sigma_min"),
        (KarrasVeScheduler, "sigma_min"),
    ],
)
def test_the_config_of_a_class_that_knows_no_flow_is_refused(other, key):
    """These have no prediction type that would say it."""
    with pytest.raises(ValueError, match=f"a config of .*{key}.* does not say that the network"):
        RectifiedFlowScheduler.from_config(other().config)
    told = {"prediction_type": "flow_prediction"}
    assert RectifiedFlowScheduler.from_config(other().config, **told).config.shift == 1


@pytest.mark.parametrize(("other", "shift"), [(PiflowScheduler, 5), (MiniMaxH3Scheduler, 12)])
def test_a_shift_that_is_the_default_of_another_class_is_kept(other, shift):
    """diffusers leaves values out that are the defaults of the class that they come from."""
    assert RectifiedFlowScheduler.from_config(other().config).config.shift == shift
    assert RectifiedFlowScheduler.from_config(other().config, shift=2.0).config.shift == 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_is_one_graph(solver):
    torch._dynamo.reset()
    first = torch.compile(
        lambda s, x: s.step(x, s.timesteps[0], x)[0], fullgraph=True, backend="eager"
    )
    scheduler, x = RectifiedFlowScheduler(solver=solver), noise(4, 3)
    scheduler.set_timesteps(4)
    compiled = first(scheduler, x)
    scheduler.set_timesteps(4)
    assert torch.equal(compiled, scheduler.step(x, scheduler.timesteps[0], x)[0])

    torch._dynamo.reset()
    step = torch.compile(
        lambda s, v, t, x: s.step(v, t, x, return_dict=False)[0], fullgraph=True, backend="eager"
    )
    scheduler.set_timesteps(12)  # more than graphs may be compiled
    state = x
    for t in scheduler.timesteps:
        state = step(scheduler, output(state, t), t, state)
    assert torch.equal(state, sample(12, solver, x))
    scheduler.set_timesteps(4)  # a time out of turn cannot raise there
    wrong = scheduler.timesteps[scheduler.order]
    assert step(scheduler, x, wrong, x).isnan().all()


def test_a_step_waits_for_no_device():
    """On a device without values, whatever reads one raises an error."""
    scheduler = RectifiedFlowScheduler(solver="heun")
    scheduler.set_timesteps(2)
    scheduler.timesteps = scheduler.timesteps.to("meta")
    x = torch.empty(2, 3, device="meta")
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps.clone():
        x = scheduler.step(x, t, x, return_dict=False)[0]
    assert scheduler.step_index == 4


def test_a_copy_of_a_time_out_of_turn_is_refused_on_the_cpu_and_by_place_on_any_device():
    scheduler, x = RectifiedFlowScheduler(), noise(2, 3)
    for time in (lambda t: t, torch.clone, float, torch.Tensor.double):
        scheduler.set_timesteps(4)
        scheduler.step(x, time(scheduler.timesteps[0]), x)
        with pytest.raises(ValueError, match="timestep=500, but evaluation 1 .* is at 750"):
            scheduler.step(x, time(scheduler.timesteps[2]), x)
        scheduler.set_timesteps(4)
        scheduler.step(x, time(scheduler.timesteps[2]), x)  # from the middle
        assert scheduler.step_index == 3


def test_round_trips_do_not_depend_on_the_order_of_sets():
    code = """
from flowmatch import RectifiedFlowScheduler as R
for other in R().compatibles:
    back = R.from_config(other.from_config(R().config).config)
    assert {k: v for k, v in back.config.items() if k in R().config} == dict(R().config), other
"""
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, cwd=".")
        assert done.returncode == 0
