"""ReflowPipeline against stock pipelines, plain loops, and processes without the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
)

import flowmatch
from flowmatch.export.pipeline import ReflowPipeline
from flowmatch.export.scheduler import RectifiedFlowScheduler
from flowmatch.flow import grids, solvers
from flowmatch.models.mlp import VelocityMLP
from flowmatch.models.velocity import Velocity

PACKAGE = Path(flowmatch.__file__).parent


def tiny_unet(**kwargs):
    torch.manual_seed(0)
    return UNet2DModel(
        **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1} | kwargs,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()


def tiny_dit(**kwargs):
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "patch_size": 2} | kwargs,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    ).eval()
    return net


def tiny_mlp(**kwargs):
    torch.manual_seed(0)
    return VelocityMLP(hidden=16, **kwargs).eval()


def dpm(**kwargs):
    """The stock scheduler that an export names: first order, uniform for every N."""
    return DPMSolverMultistepScheduler(
        **{"prediction_type": "flow_prediction", "use_flow_sigmas": True} | kwargs, solver_order=1
    )


def exact(steps):
    """The stock scheduler whose default grid is exact for one N."""
    return FlowMatchEulerDiscreteScheduler(shift_terminal=None if steps == 1 else 1 / steps)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def draw(net, scheduler=None, pipeline=ReflowPipeline, **kwargs):
    pipe = pipeline(unet=net, scheduler=scheduler or RectifiedFlowScheduler())
    pipe.set_progress_bar_config(disable=True)
    arguments = {"generator": seeded(), "output_type": "np", "num_inference_steps": 2}
    return pipe(**arguments | kwargs).images


def close(a, b, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


def plain_euler(velocity, x, steps):
    for i in range(steps):
        x = x - velocity(x, torch.tensor(1000 * (1 - i / steps))) / steps
    return x


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_seed_gives_the_picture_of_the_stock_pipeline(steps):
    unet, common = tiny_unet(), {"batch_size": 3, "num_inference_steps": steps}
    stock = draw(unet, exact(steps), DDPMPipeline, **common)
    assert np.array_equal(draw(unet, **common), stock)
    assert np.array_equal(draw(unet, exact(steps), **common), stock)
    # whatever the default grid of a scheduler that takes sigmas
    assert np.array_equal(draw(unet, FlowMatchEulerDiscreteScheduler(), **common), stock)
    # one that takes none runs as it does in the stock pipeline, 1% or 2% of the range away
    by_dpm = draw(unet, dpm(), **common)
    close(by_dpm, draw(unet, dpm(), DDPMPipeline, **common))
    assert 0 < np.abs(by_dpm - stock).max() < 0.03


def test_shifted_steps_by_the_config_of_the_scheduler():
    unet, start = tiny_unet(), torch.randn(2, 1, 8, 8, generator=seeded())
    common = {"batch_size": 2, "latents": start, "num_inference_steps": 3}
    ours = draw(unet, RectifiedFlowScheduler(shift=3.0), **common)
    assert np.array_equal(draw(unet, FlowMatchEulerDiscreteScheduler(shift=3.0), **common), ours)
    assert np.abs(draw(unet, **common) - ours).max() > 1e-3
    by_ab2 = draw(unet, RectifiedFlowScheduler(solver="ab2", shift=3.0), output_type="pt", **common)
    velocity = Velocity(unet)
    with torch.no_grad():
        end = solvers.integrate(velocity, start, grids.shift_grid(3, 3.0), "ab2")
    close(by_ab2, (end / 2 + 0.5).clamp(0, 1), 3e-6)


def test_output_types():
    unet, common = tiny_unet(), {"batch_size": 2}
    array = draw(unet, **common)
    assert array.shape == (2, 8, 8, 1)
    assert array.min() >= 0
    assert array.max() <= 1
    tensor = draw(unet, **common, output_type="pt")
    assert tensor.shape == (2, 1, 8, 8)
    close(tensor.permute(0, 2, 3, 1), array)
    latent = draw(unet, **common, output_type="latent")
    assert latent.abs().max() > 1
    close((latent / 2 + 0.5).clamp(0, 1), tensor)
    pictures = draw(unet, **common, output_type="pil")
    close(np.asarray(pictures[1]), (array[1, :, :, 0] * 255).round())
    pipe = ReflowPipeline(unet, RectifiedFlowScheduler())
    assert pipe(output_type="pt", return_dict=False)[0].shape == (1, 1, 8, 8)


def test_heun_takes_two_evaluations_a_step():
    unet, calls = tiny_unet(), []
    hook = unet.register_forward_hook(lambda net, args, _: calls.append(args[1][0].item()))
    start = torch.randn(2, 1, 8, 8, generator=seeded())
    scheduler = RectifiedFlowScheduler(solver="heun")
    got = draw(unet, scheduler, latents=start, batch_size=2, output_type="pt")
    assert calls == [1000, 500, 500, 0]
    hook.remove()
    x = start
    with torch.no_grad():
        for sigma in (1.0, 0.5):
            first = unet(x, torch.tensor(1000 * sigma)).sample
            second = unet(x - 0.5 * first, torch.tensor(1000 * (sigma - 0.5))).sample
            x = x - 0.25 * (first + second)
    close(got, (x / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("make", [tiny_unet, tiny_dit, tiny_mlp])
def test_guidance(make):
    net = make() if make is tiny_dit else make(num_class_embeds=4)  # 3 classes and the null class
    shape = (2, 2) if make is tiny_mlp else (2, 1, 8, 8)
    start, label = torch.randn(*shape, generator=seeded()), torch.tensor([0, 2])
    null, single = torch.tensor([3, 3]), torch.ones(2)

    def guided(w):
        def velocity(x, t):
            v_null = net(x, t * single, class_labels=null).sample
            return v_null + w * (net(x, t * single, class_labels=label).sample - v_null)

        with torch.no_grad():
            end = plain_euler(velocity, start, 2)
        return end if make is tiny_mlp else (end / 2 + 0.5).clamp(0, 1)

    common = {"latents": start, "batch_size": 2, "output_type": "pt"}
    for w in (0.0, 1.0, 2.5):
        close(draw(net, class_labels=[0, 2], guidance_scale=w, **common), guided(w), 1e-5)
    assert (guided(2.5) - guided(1.0)).abs().max() > 1e-3
    close(draw(net, **common), guided(0.0), 1e-5)  # no label means the null class
    close(draw(net, class_labels=null, **common), guided(0.0), 1e-5)
    both = draw(net, class_labels=2, **common)
    close(both, draw(net, class_labels=torch.tensor([2, 2]), **common))


def test_w_1_evaluates_the_network_once():
    net, sizes = tiny_mlp(num_class_embeds=3), []
    net.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    draw(net, batch_size=5, class_labels=1, num_inference_steps=1)
    draw(net, batch_size=5, class_labels=1, num_inference_steps=1, guidance_scale=2)
    assert sizes == [5, 10]


def test_a_sample_with_its_own_generator_does_not_depend_on_its_batch():
    unet = tiny_unet()
    together = draw(unet, batch_size=3, generator=[seeded(i) for i in range(3)])
    alone = draw(unet, batch_size=1, generator=seeded(2))
    close(together[2], alone[0])
    assert np.abs(together[1] - alone[0]).max() > 0.1


def test_points_come_as_they_are():
    net = tiny_mlp(in_channels=3)
    start = 10 * torch.randn(4, 3, generator=seeded())
    with torch.no_grad():
        end = plain_euler(lambda x, t: net(x, t).sample, start, 4)
    for kind, cls in {"pt": torch.Tensor, "np": np.ndarray}.items():
        got = draw(net, batch_size=4, latents=start, num_inference_steps=4, output_type=kind)
        assert isinstance(got, cls)
        close(got, end, 1e-5)  # neither scaled nor clamped
    close(
        draw(net, FlowMatchEulerDiscreteScheduler(), batch_size=4, latents=start),
        draw(net, batch_size=4, latents=start),
    )


def test_the_state_stays_float32_under_a_half_precision_network(monkeypatch):
    net, seen = tiny_mlp().to(torch.bfloat16), []
    net.register_forward_hook(lambda _, args, __: seen.append((args[0].dtype, args[1].dtype)))
    start = torch.randn(64, 2, generator=seeded())

    def velocity(x, t):
        return net(x.bfloat16(), t).sample.float()

    with torch.no_grad():
        end = plain_euler(velocity, start, 8)
    for scheduler in (RectifiedFlowScheduler(), FlowMatchEulerDiscreteScheduler()):
        seen.clear()
        got = draw(net, scheduler, batch_size=64, latents=start, num_inference_steps=8)
        assert got.dtype == np.float32
        close(got, end)
        assert set(seen) == {(torch.bfloat16, torch.float32)}  # never half-precision times


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (exact(4), "shift_terminal"),  # exact for four steps, not for the two asked for
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "expected"),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=1), r"timesteps \[1.0, 0.5\]"),
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler makes sigmas"),
        (dpm(flow_shift=3.0), "flow_shift"),
        (dpm(use_flow_sigmas=False), "DPMSolverMultistepScheduler makes sigmas"),
        (dpm(prediction_type="epsilon"), "prediction_type='epsilon'"),
        (DDPMScheduler(), "DDPMScheduler has prediction_type='epsilon'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_scheduler_that_leaves_the_uniform_grid_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_mlp(), scheduler)


@pytest.mark.parametrize(
    ("net", "arguments", "message"),
    [
        (tiny_unet, {"num_inference_steps": 0}, "num_inference_steps=0"),
        (tiny_unet, {"batch_size": 0}, "batch_size=0"),
        (
            tiny_unet,
            {"generator": [seeded()], "batch_size": 2},
            "list of 1: expected one, or batch",
        ),
        (
            tiny_unet,
            {"latents": torch.zeros(1, 1, 4, 4)},
            r"latents have shape \[1, 1, 4, 4\]: expected",
        ),
        (tiny_unet, {"class_labels": 1}, "this network takes no labels"),
        (tiny_unet, {"guidance_scale": 2.0}, "this network takes no labels"),
        (tiny_unet, {"output_type": "tensor"}, "expected one of pil, np, pt, latent for"),
        (tiny_mlp, {"output_type": "pil"}, "expected one of np, pt for samples of shape"),
        (tiny_dit, {"guidance_scale": 2.0}, "needs class_labels"),
        (tiny_dit, {"class_labels": 4}, "expected 0 to 2, or 3 for the null class"),
        (tiny_dit, {"class_labels": [0, 1, 2], "batch_size": 2}, "or batch_size=2 of them"),
        (tiny_dit, {"class_labels": 0.5}, "expected one integer"),
        (lambda: tiny_unet(sample_size=None), {}, "sample_size=None in its config"),
        (lambda: tiny_unet(in_channels=2, out_channels=2), {"output_type": "pil"}, "2 channels"),
        (lambda: tiny_unet(in_channels=4, out_channels=4), {"output_type": "pil"}, "4 channels"),
        (lambda: tiny_unet(out_channels=2), {}, "expected the same shape"),
        (lambda: tiny_dit(sample_size=9), {}, "a size divisible by its patch size"),
        (lambda: tiny_unet(class_embed_type="timestep"), {}, "class_embed_type='timestep'"),
        (lambda: tiny_mlp().train(), {}, "call unet.eval"),
    ],
)
def test_wrong_arguments_are_refused(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(net(), **arguments)


def test_saved_pipelines_name_the_package(tmp_path):
    pipe = ReflowPipeline(tiny_mlp(), RectifiedFlowScheduler(solver="heun"))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ReflowPipeline"
    assert index["unet"] == ["flowmatch", "VelocityMLP"]
    assert index["scheduler"] == ["flowmatch", "RectifiedFlowScheduler"]
    loaded = flowmatch.ReflowPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.solver == "heun"
    expected = draw(pipe.unet, pipe.scheduler)
    assert np.array_equal(draw(loaded.unet, loaded.scheduler), expected)


FRESH = """
import sys
sys.modules["flowmatch"] = None  # importing it fails, wherever it is installed
import numpy, torch
from diffusers import DiffusionPipeline

def draw(folder, loading={}, **arguments):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **loading)
    for part in (pipe, pipe.unet, pipe.scheduler):  # none claims to come from the package
        assert type(part).__module__.startswith("diffusers"), type(part)
    generator = torch.Generator().manual_seed(1)
    images = pipe(generator=generator, num_inference_steps=2, output_type="np", **arguments).images
    numpy.save(f"{folder}.npy", images)

draw("images", {"custom_pipeline": "pipeline"},
     batch_size=3, class_labels=[0, 1, 2], guidance_scale=2.0)
draw("points", batch_size=3)
"""


def test_exports_load_without_the_package(tmp_path):
    # a stock network: the pipeline file alone, by custom_pipeline
    unet, images = tiny_unet(num_class_embeds=4), tmp_path / "images"
    ReflowPipeline(unet, FlowMatchEulerDiscreteScheduler()).save_pretrained(images)
    shutil.copy(PACKAGE / "export/pipeline.py", images)
    index = json.loads((images / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    # a network and a scheduler of ours: all three files, each beside what it loads
    mlp, points = tiny_mlp(), tmp_path / "points"
    heun = RectifiedFlowScheduler(solver="heun")
    ReflowPipeline(mlp, heun).save_pretrained(points)
    files = {"export/pipeline": "", "models/mlp": "unet", "export/scheduler": "scheduler"}
    for file, folder in files.items():
        shutil.copy(PACKAGE / f"{file}.py", points / folder)
    index = json.loads((points / "model_index.json").read_text())
    index |= {
        "_class_name": ["pipeline", "ReflowPipeline"],
        "unet": ["mlp", "VelocityMLP"],
        "scheduler": ["scheduler", "RectifiedFlowScheduler"],
    }
    (points / "model_index.json").write_text(json.dumps(index))

    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", FRESH]
    fresh = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert fresh.returncode == 0, fresh.stderr
    expected = draw(unet, batch_size=3, class_labels=[0, 1, 2], guidance_scale=2.0)
    assert np.array_equal(np.load(tmp_path / "images.npy"), expected)
    assert np.array_equal(np.load(tmp_path / "points.npy"), draw(mlp, heun, batch_size=3))
