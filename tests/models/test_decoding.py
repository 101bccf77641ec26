"""Pictures decoded from a state are those of the pipeline; a student's steps are those of stock DDIM."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from flowmatch.config import UserError
from flowmatch.evaluation import prompt_rows
from flowmatch.models import decoding, learn
from flowmatch.models.schedule import ZeroTerminal, betas_of
from flowmatch.models.text import TextTeacher
from flowmatch.models.watch import run
from tests.tiny import TINY

PROMPTS = ["a cat", "a red fox in snow"]
NAMES = ["StableDiffusionPipeline", "FluxPipeline", "QwenImagePipeline", "SanaPipeline"]
NAMES += ["StableDiffusionXLPipeline", "Lumina2Pipeline", "WanPipeline", "LTXPipeline"]


def call_of(name):
    return {key: value for key, value in TINY[name].call.items() if key != "output_type"}


class Listed:
    texts, held_out, negative, longest = PROMPTS, [], None, PROMPTS[1]

    def __len__(self):
        return 2


def teacher_of(pipe, call):
    script = learn.learn(pipe, call, "teacher=tiny")
    net = getattr(pipe, script.network)
    return TextTeacher(net, "0", 0, pipe=pipe, script=script, call=call, prompts=Listed())


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_those_of_the_pipeline(name):
    """Packed states, scaled ones, frames: what the pipeline decodes of its own last state."""
    tiny, call = TINY[name], call_of(name)
    pipe = tiny.build()
    teacher = teacher_of(pipe, call)
    decode = decoding.Decoder(pipe, teacher.script, call)
    for seed in (0, 1):
        noise = tiny.noise(2, seed)
        seen = run(pipe, PROMPTS, call, noise, inject=teacher.script.inject)
        stock = pipe(PROMPTS, latents=noise, **call, output_type="np")[0]
        made = decode(seen.steps[-1].after, PROMPTS)
        assert np.abs(np.moveaxis(made.numpy(), -3, -1) - stock).max() <= 1e-6


def test_no_network_is_evaluated_to_decode_a_second_batch():
    tiny, call = TINY["StableDiffusionPipeline"], call_of("StableDiffusionPipeline")
    pipe = tiny.build()
    teacher = teacher_of(pipe, call)
    decode = decoding.Decoder(pipe, teacher.script, call)
    calls = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    decode(tiny.noise(2), PROMPTS)
    assert len(calls) == 1
    pipe.unet.forward = own = pipe.unet.forward  # as accelerate's hooks set it
    decode(tiny.noise(2, 1), PROMPTS)
    assert len(calls) == 1
    assert pipe.unet.__dict__["forward"] is own


def test_what_is_no_picture_is_refused():
    class Sound:
        def __getitem__(self, place):
            return np.zeros((2, 2, 1000))

    with pytest.raises(UserError, match=r"returns \[2, 2, 1000\]; expected pictures"):
        decoding.pictures(Sound())


def test_a_student_that_predicts_v_takes_the_steps_of_stock_ddim():
    """The same network in its stock class, zero-SNR and trailing: equal samples at 1, 2 and 4 steps."""
    name = "StableDiffusionPipeline"
    call = call_of(name) | {"guidance_scale": 1.0}
    pipe, noise = TINY[name].build(), TINY[name].noise(2)
    teacher = teacher_of(pipe, call)
    schedule = ZeroTerminal(betas_of(pipe.scheduler))
    assert schedule.grid(1).tolist() == [0, 1]
    student = prompt_rows.replace(teacher, schedule=schedule)
    stock = DDIMScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=1,
    )
    rows = [prompt_rows.student_row(student, steps) for steps in (1, 2, 4)]
    with torch.no_grad():
        ours = [row.carry(noise, torch.tensor([0, 1])) for row in rows]
    pipe.scheduler = stock
    for steps, x in zip((1, 2, 4), ours, strict=True):
        more = {"num_inference_steps": steps, "output_type": "latent"}
        theirs = pipe(PROMPTS, latents=noise, **call | more)[0]
        assert torch.allclose(x, theirs, atol=1e-5 * float(theirs.abs().max()))
