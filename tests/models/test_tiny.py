"""The tiny pipelines themselves: they run, their prompts matter, and they load again."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tests.tiny import TINY

pytestmark = pytest.mark.slow
PROMPTS = ["a red fox", "two blue birds on a green tree near the fire", "a zebra!"]


def run(pipe, tiny, kind="latent"):
    """Run a pipeline on the same noise for each prompt."""
    latents = tiny.noise(1).expand(len(PROMPTS), *tiny.latents).clone()
    arguments = tiny.call | {"output_type": kind, "return_dict": False}
    return pipe(prompt=list(PROMPTS), latents=latents, **arguments)[0]


def same(first, second):
    """Are the samples the same but for the rounding of kernels that memory's alignment chooses?"""
    return (first - second).abs().max() <= 1e-4 * second.std()


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_pipeline_runs_and_loads_again(name, tmp_path):
    tiny = TINY[name]
    state = torch.get_rng_state()
    pipe = tiny.build()
    assert torch.equal(torch.get_rng_state(), state)
    samples = run(pipe, tiny)
    pictures = run(pipe, tiny, "np")
    assert pictures.shape[0] == len(PROMPTS)
    assert np.isfinite(pictures).all()
    assert samples.shape[0] == len(PROMPTS)
    assert samples.isfinite().all()
    assert 0.01 < samples.std() < 100
    for other in samples[1:]:  # from the same noise: the difference is the prompts'
        assert (other - samples[0]).std() > 1e-3 * samples.std()
    assert same(run(tiny.build(), tiny), samples)
    if tiny.note:
        return
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert same(run(loaded, tiny), samples)
