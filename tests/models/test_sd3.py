"""RectifiedFlowScheduler inside the stock Stable Diffusion 3 pipeline, tiny and from configs."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from flowmatch.export.scheduler import SOLVERS, RectifiedFlowScheduler
from flowmatch.flow import grids, solvers

pytest.importorskip("transformers", reason="diffusers imports its SD3 pipeline with it alone")
torch.set_num_threads(1)
pytestmark = pytest.mark.slow  # transformers is there for make test-all only


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


NO_TEXT = {
    f"{name}{number}": None for name in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")
}


@pytest.fixture(scope="module")
def parts():
    """A transformer and a decoder of a few thousand weights, in place of the text encoders None."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1,
    )  # fmt: skip
    return {"transformer": transformer.eval(), "vae": vae.eval()} | NO_TEXT


PROMPT = {
    "prompt_embeds": torch.randn(2, 5, 16, generator=seeded(2)),
    "pooled_prompt_embeds": torch.randn(2, 16, generator=seeded(3)),
    "negative_prompt_embeds": torch.randn(2, 5, 16, generator=seeded(4)),
    "negative_pooled_prompt_embeds": torch.randn(2, 16, generator=seeded(5)),
}


def draw(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe(generator=seeded(), **PROMPT | arguments | kwargs).images


@pytest.mark.parametrize("steps", [2, 4])
def test_euler_is_the_stock_scheduler_on_the_uniform_grid(parts, steps):
    ours = StableDiffusion3Pipeline(**parts, scheduler=RectifiedFlowScheduler())
    exact = FlowMatchEulerDiscreteScheduler(shift_terminal=1 / steps)
    stock = StableDiffusion3Pipeline(**parts, scheduler=exact)
    common = {"num_inference_steps": steps}
    assert torch.equal(draw(ours, **common), draw(stock, **common))
    pictures = draw(ours, **common, output_type="np")
    assert pictures.shape == (2, 16, 16, 3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_gives_what_a_plain_loop_gives(parts, solver):
    def v(x, t):
        """The guided velocity, in the math's time."""
        null, cond = (
            parts["transformer"](
                hidden_states=x,
                timestep=torch.full((2,), 1000 * (1 - t)),
                encoder_hidden_states=PROMPT[f"{kind}prompt_embeds"],
                pooled_projections=PROMPT[f"{kind}pooled_prompt_embeds"],
            ).sample
            for kind in ("negative_", "")
        )
        return -(null + 3.0 * (cond - null))

    start = torch.randn(2, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        expected = solvers.integrate(v, start, grids.uniform_grid(4), solver)
    scheduler = RectifiedFlowScheduler(solver=solver)
    pipe, seen = StableDiffusion3Pipeline(**parts, scheduler=scheduler), []
    got = draw(pipe, callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(i) or kwargs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert len(seen) == 4 * scheduler.order  # the pipeline calls back after each evaluation
    # and on sigmas of one's own
    sigmas = [1.0, 0.75, 0.125]
    got = draw(pipe, num_inference_steps=None, sigmas=sigmas)
    with torch.no_grad():
        expected = solvers.integrate(v, start, torch.tensor([0.0, 0.25, 0.875, 1.0]), solver)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [{"eta": 1.0}, {"churn": 1.0}], ids=str)
def test_noise_comes_from_torch_as_the_pipeline_passes_no_generator(parts, config):
    pipe = StableDiffusion3Pipeline(**parts, scheduler=RectifiedFlowScheduler(**config))
    plain = StableDiffusion3Pipeline(**parts, scheduler=RectifiedFlowScheduler())
    pictures = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        pictures.append(draw(pipe))
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.allclose(pictures[0], pictures[2])
    assert not torch.allclose(pictures[0], draw(plain))


def test_the_pipeline_saves_and_loads(parts, tmp_path):
    scheduler = RectifiedFlowScheduler(solver="rk4", reflow_round=1)
    pipe = StableDiffusion3Pipeline(**parts, scheduler=scheduler)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["flowmatch", "RectifiedFlowScheduler"]
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, **NO_TEXT)
    assert isinstance(loaded.scheduler, RectifiedFlowScheduler)
    assert (loaded.scheduler.config.solver, loaded.scheduler.config.reflow_round) == ("rk4", 1)
    assert torch.equal(draw(loaded), draw(pipe))


def test_half_precision_keeps_a_float32_state(parts):
    """The latents of the pipeline are bfloat16; the state behind them is not."""
    transformer, vae = (type(parts[k]).from_config(parts[k].config) for k in ("transformer", "vae"))
    half = parts | {"transformer": transformer.bfloat16().eval(), "vae": vae.bfloat16().eval()}
    pipe = StableDiffusion3Pipeline(**half, scheduler=RectifiedFlowScheduler(solver="ab2"))
    outputs = []
    hook = pipe.transformer.register_forward_hook(lambda _, __, out: outputs.append(out[0].float()))
    prompt = {key: value.bfloat16() for key, value in PROMPT.items()}
    got = draw(pipe, **prompt, guidance_scale=1.0, num_inference_steps=16)
    hook.remove()
    assert got.dtype == torch.bfloat16
    x = torch.randn(2, 4, 8, 8, generator=seeded(), dtype=torch.bfloat16).float()
    for i, slope in enumerate(outputs):
        x = x - (1.5 * slope - 0.5 * outputs[i - 1] if i else slope) / 16
    assert torch.equal(got, x.bfloat16())
