"""Diffusion models as teachers: closed forms, and diffusers' own sampler as the second opinion."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
)

from flowmatch.config import NotReady, UserError
from flowmatch.flow import grids, solvers, toy
from flowmatch.flow.config import SolverConfig
from flowmatch.models import diffusion, teachers
from flowmatch.models.diffusion import DiffusionVelocity
from flowmatch.pairs import matching, shards
from flowmatch.runs import manifest
from flowmatch.runs.command import execute
from pipelines import evaluate, export, generate_pairs, reflow
from tests.models.test_networks import UNET

TARGET = toy.GaussianMixture(
    [0.4, 0.6], [[1.5, 0.0], [-1.0, 1.0]], 0.3 * torch.eye(2).expand(2, 2, 2)
)


class Oracle(torch.nn.Module):
    """A network without error for TARGET, in the terms of a training schedule."""

    def __init__(self, scheduler, predicts):
        super().__init__()
        self.scheduler, self.predicts = scheduler, predicts
        self.config = Config(in_channels=2, out_channels=2)
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, sample, timestep, class_labels=None):
        timestep = timestep.double()[:, None]
        if isinstance(self.scheduler, EDMEulerScheduler):
            sigma = (4 * timestep).exp()
            y = sample.double() * (sigma**2 + 0.25).sqrt()
        else:  # between two integers the schedule is linear in log sigma
            kept = self.scheduler.alphas_cumprod.double().numpy()
            logs = np.log((1 - kept[kept > 0]) / kept[kept > 0]) / 2
            at = np.interp(timestep.numpy(), np.arange(len(logs)), logs)
            sigma = torch.from_numpy(at).exp()
            y = sample.double() * (1 + sigma**2).sqrt()
        t = 1 / (1 + sigma[:, 0])
        data = TARGET.data_prediction(t[:, None] * y, t)
        noise = (y - data) / sigma
        if self.predicts == "sample":
            out = data
        elif isinstance(self.scheduler, EDMEulerScheduler):
            root = (sigma**2 + 0.25).sqrt()
            out = (data - 0.25 / root**2 * y) / (sigma * 0.5 / root)
        elif self.predicts == "epsilon":
            out = noise
        else:
            alpha = (1 + sigma**2).rsqrt()
            out = alpha * noise - sigma * alpha * data
        return SimpleNamespace(sample=out)


class Config(dict):
    """A network's config, as diffusers gives it."""

    __getattr__ = dict.__getitem__


def oracle(scheduler, predicts):
    net = Oracle(scheduler, predicts)
    return DiffusionVelocity(net, diffusion.diffusion_of(scheduler, "teacher=x"))


def ddpm(prediction="epsilon", **keys):
    return DDPMScheduler(prediction_type=prediction, **keys)


CASES = {
    "epsilon": (ddpm(), "epsilon"),
    "data": (ddpm("sample"), "sample"),
    "v": (ddpm("v_prediction", beta_schedule="squaredcos_cap_v2"), "v_prediction"),
    "v, zero signal at the end": (
        ddpm("v_prediction", rescale_betas_zero_snr=True),
        "v_prediction",
    ),
    "edm": (EDMEulerScheduler(), "epsilon"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_prediction_becomes_the_velocity_of_the_target(case):
    v = oracle(*CASES[case])
    low, high = v.span
    assert 0 < low < 0.02 < 0.98 < high < 1
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, dtype=torch.float64, generator=rng)
    t = torch.linspace(low, high, 40, dtype=torch.float64)
    # the timestep passes through float32
    torch.testing.assert_close(v(x, t), TARGET(x, t), atol=2e-3, rtol=2e-3)
    truth = solvers.integrate(TARGET, x, grids.uniform_grid(100), "rk4")
    config = SolverConfig(name="rk4", steps=100, grid="sigmoid", kappa=6.0, state="float64")
    before = v.evaluations
    end = v.carry(x, lambda field, x, span: solvers.solve(field, x, config, span))
    assert v.evaluations - before == 4 * 100 + 1
    assert (end - truth).norm(dim=1).median() < 0.02  # what starting at t_min costs
    back = v.invert(truth, lambda f, x, s: solvers.solve(f, x, config, s, backward=True))
    assert (back - x).norm(dim=1).median() < 0.01  # what starting at t_max costs, too
    assert abs((back * x).sum() / (x * x).sum() - 1) < 1e-3  # and yet noise of the right scale
    with pytest.raises(UserError, match=r"trained on the noise levels of t in"):
        v(x, 0.0)


def unet(channels=1, out=None, classes=None):
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=out or channels, num_class_embeds=classes,
        **UNET,
    )  # fmt: skip
    return net.eval()


def save(folder, net, scheduler):
    DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained(folder)
    return folder


def test_ddim_of_diffusers_is_euler_on_the_same_times(tmp_path):
    scheduler = DDIMScheduler(clip_sample=False, num_train_timesteps=100, beta_end=0.2)
    DDIMPipeline(unet=unet(), scheduler=scheduler).save_pretrained(tmp_path)
    teacher = teachers.load(tmp_path, "teacher")
    assert teacher.diffusion.prediction == "epsilon"
    teacher.net.double()
    rng = torch.Generator().manual_seed(1)
    x0 = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=rng)
    scheduler.set_timesteps(100)
    stock = x0
    times = 1 / (1 + torch.tensor(teacher.diffusion.sigmas, dtype=torch.float64).flip(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            stock = scheduler.step(teacher.net(stock, t).sample, t, stock).prev_sample
        ours = teacher.velocity().carry(x0, lambda v, x, span: solvers.integrate(v, x, times))
    # the stock class starts from x0 where the path has sqrt(t^2 + (1 - t)^2) / (1 - t) of it
    assert (ours - stock).norm() / stock.norm() < 1e-3


def config_of(tmp_path, teacher, **keys):
    values = {
        "run_dir": str(tmp_path / "pairs"),
        "teacher": str(teacher),
        "shards": 1,
        "shard_size": 8,
        "block": 4,
        "compute_batch": 4,
        "device": "cpu",
        "dtype": "float32",
        "solver": {"name": "euler", "steps": 3},
    }
    return generate_pairs.PairsConfig.model_validate(values | keys)


def test_stage_two_takes_it_as_a_teacher(tmp_path):
    teacher = save(tmp_path / "ddpm", unet(classes=3), ddpm())
    config = config_of(tmp_path, teacher)
    execute(generate_pairs.STAGE, config, dry_run=False)
    sealed = manifest.read(tmp_path / "pairs", "pairs")
    facts = sealed["facts"]
    assert facts["evaluations"] == 4  # three of the solver and the last step
    assert facts["classes"] == 3
    assert facts["diffusion"]["prediction"] == "epsilon"
    assert facts["span"] == pytest.approx([0.0063, 0.99], abs=1e-3)
    # the digest tells two predictions of the same network apart
    index = json.loads((teacher / "scheduler/scheduler_config.json").read_text())
    index["prediction_type"] = "v_prediction"
    (teacher / "scheduler/scheduler_config.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="teacher"):
        execute(generate_pairs.STAGE, config, dry_run=False)
    assert (tmp_path / "pairs" / shards.tar_name(0)).is_file()


def test_reflow_starts_from_it_and_evaluate_compares_with_it(tmp_path, capsys):
    teacher = save(tmp_path / "ddpm", unet(), ddpm())
    execute(generate_pairs.STAGE, config_of(tmp_path, teacher), dry_run=False)
    values = {
        "run_dir": str(tmp_path / "reflow"),
        "pairs": [{"path": str(tmp_path / "pairs")}],
        "start": str(teacher),
        "fit": {"steps": 2, "batch_size": 4},
        "device": "cpu",
    }
    execute(reflow.STAGE, reflow.ReflowConfig.model_validate(values), dry_run=False)
    np.savez(tmp_path / "data.npz", x=np.arange(512, dtype=np.uint8).reshape(8, 8, 8, 1) % 255)
    values = {
        "run_dir": str(tmp_path / "evaluate"),
        "teacher": str(teacher),
        "student": str(tmp_path / "reflow"),
        "data": {"source": "npz", "path": str(tmp_path / "data.npz")},
        "distance": "sliced_wasserstein",
        "samples": 8,
        "steps": [1, 2],
        "converged_steps": 4,
        "device": "cpu",
    }
    execute(evaluate.STAGE, evaluate.EvaluateConfig.model_validate(values), dry_run=False)
    rows = json.loads((tmp_path / "evaluate/metrics.json").read_text())
    told = [line for line in capsys.readouterr().out.splitlines() if ": distance " in line]
    assert [line.split(": distance")[0] for line in told] == [
        f"evaluate: {name}, {steps}"
        for name in ("teacher", "student")
        for steps in ("1 step", "2 steps", "converged")
    ]
    assert told[0].endswith("(2 evaluations)")
    assert [row["evaluations"] for row in rows["teacher"]["rows"]] == [2, 3, 9]
    assert [row["evaluations"] for row in rows["student"]["rows"]] == [1, 2, 8]

    wide = save(tmp_path / "wide", unet(out=2), ddpm())
    with pytest.raises(UserError, match="cannot predict a velocity"):
        matching.check_match(teachers.load(wide, "start"), [])


def test_it_is_not_exported_as_the_flow_that_it_is_not(tmp_path):
    teacher = save(tmp_path / "ddpm", unet(), ddpm())
    values = {"run_dir": str(tmp_path / "export"), "student": str(teacher), "device": "cpu"}
    with pytest.raises(UserError, match="diffusion model, which predicts epsilon"):
        execute(export.STAGE, export.ExportConfig.model_validate(values), dry_run=True)


def test_a_flow_pipeline_is_a_flow_model_and_a_variance_is_left_out(tmp_path):
    flow = save(tmp_path / "flow", unet(), FlowMatchEulerDiscreteScheduler())
    assert teachers.load(flow, "teacher").diffusion is None
    wide = save(tmp_path / "wide", unet(out=2), ddpm())
    v = teachers.load(wide, "teacher").velocity()
    with torch.no_grad():
        assert v(torch.zeros(2, 1, 8, 8), 0.5).shape == (2, 1, 8, 8)


def flat(folder, net, scheduler):
    """As google/ddpm-cifar10-32 lies on the hub: all parts at the root."""
    save(folder.with_name("nested"), net, scheduler)
    net.save_pretrained(folder)
    scheduler.save_pretrained(folder)
    shutil.copy(folder.with_name("nested") / "model_index.json", folder)
    return folder


def test_a_pipeline_without_subfolders_is_no_flow_model(tmp_path):
    found = teachers.load(flat(tmp_path / "flat", unet(), ddpm()), "teacher")
    nested = teachers.load(tmp_path / "nested", "teacher")
    assert found.diffusion == nested.diffusion is not None
    assert found.digest == nested.digest
    DDPMPipeline.from_pretrained(tmp_path / "flat")  # so does diffusers
    (tmp_path / "flat/scheduler_config.json").unlink()
    with pytest.raises(UserError, match="teacher=.*its scheduler cannot be read"):
        teachers.load(tmp_path / "flat", "teacher")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "nested", "flow"])
def test_a_name_on_the_hub_is_what_its_folder_is(tmp_path, layout):
    """Through the hub's cache, without network."""
    flat(tmp_path / "flat", unet(), ddpm())
    unet().save_pretrained(tmp_path / "flow")
    place, commit = tmp_path / "hub/models--someone--model", 40 * "0"
    shutil.copytree(tmp_path / layout, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    code = (
        "from flowmatch.models import teachers; t = teachers.load('someone/model', 'teacher');"
        "print(t.diffusion and t.diffusion.prediction, t.digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    known = teachers.load(tmp_path / layout, "teacher")
    assert done.stdout.split() == [
        "None" if layout == "flow" else "epsilon",
        known.digest,
    ]


def test_what_cannot_be_a_teacher_is_refused_with_the_reason(tmp_path):
    odd = save(tmp_path / "odd", unet(channels=3, out=1), ddpm())
    with pytest.raises(UserError, match="has 1 output channels for 3"):
        teachers.load(odd, "teacher")
    ve = save(tmp_path / "ve", unet(), ScoreSdeVeScheduler())
    with pytest.raises(UserError, match="ScoreSdeVeScheduler does not describe the noise levels"):
        teachers.load(ve, "teacher")
    labels = teachers.load(save(tmp_path / "labels", unet(classes=3), ddpm()), "teacher")
    with pytest.raises(UserError, match="no null class"):
        labels.velocity(2.0)
    with pytest.raises(UserError, match="give it labels"):
        labels.velocity()(torch.zeros(1, 1, 8, 8), 0.5)
    index = json.loads((tmp_path / "ve/model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (tmp_path / "ve/model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match="text_encoder, unet; expected one.*; if it reads text, set prompts"
    ):
        teachers.load(tmp_path / "ve", "teacher")
    (tmp_path / "ve/model_index.json").write_text("{")
    with pytest.raises((UserError, NotReady), match="teacher="):
        teachers.load(tmp_path / "ve", "teacher")
