"""The tiny pipelines themselves: they run, their prompts matter, and they load again."""

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.tiny import REFUSED, TINY

pytestmark = pytest.mark.slow
PROMPTS = ["a red fox", "two blue birds on a green tree near the fire", "a zebra!"]


def run(pipe, tiny, prompts=PROMPTS, **kwargs):
    """Run a pipeline on the same noise for each prompt."""
    latents = tiny.noise(1).expand(len(prompts), *tiny.latents).clone()
    arguments = tiny.call | {"output_type": "latent", "return_dict": False} | kwargs
    samples = pipe(prompt=list(prompts), latents=latents, **arguments)[
        0
    ]  # Z-Image changes its list
    return torch.as_tensor(samples)  # LDM decodes all the same


def same(first, second):
    """Are the samples the same but for the rounding of kernels that memory's alignment chooses?"""
    return (first - second).abs().max() <= 1e-4 * second.std()


def parts(pipe):
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_pipeline_runs_and_loads_again(name, tmp_path):
    tiny = TINY[name]
    state = torch.get_rng_state()
    pipe = tiny.build()
    assert torch.equal(torch.get_rng_state(), state)
    samples = run(pipe, tiny)
    pictures = run(
        pipe, tiny, PROMPTS[:1], output_type="np"
    )  # HunyuanVideo 1.5 decodes one film at a time
    assert pictures.isfinite().all()
    assert samples.shape[0] == len(PROMPTS)
    assert samples.isfinite().all()
    assert 0.01 < samples.std() < 100
    for other in samples[1:]:  # from the same noise: the difference is the prompts'
        assert (other - samples[0]).std() > 1e-3 * samples.std()
    for part, again in zip(parts(pipe), parts(tiny.build()), strict=True):
        assert all(map(torch.equal, part.state_dict().values(), again.state_dict().values()))
    if tiny.note:
        return
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert same(run(loaded, tiny), samples)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_pipeline_has_its_reason(name):
    tiny = REFUSED[name]
    pipe = tiny.build()
    if tiny.note == "noise":
        first, second = (
            run(pipe, tiny, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
        )
        assert not same(first, second)
    elif tiny.note.startswith(("wants", "takes")):
        with pytest.raises((TypeError, ValueError)):
            run(pipe, tiny)
    elif "networks" in tiny.note:
        calls = []
        for part in (pipe.transformer, pipe.transformer_2):
            part.register_forward_hook(lambda part, *_: calls.append(part))
        assert run(pipe, tiny).isfinite().all()
        assert calls[0] is pipe.transformer
        assert calls[-1] is pipe.transformer_2
    else:
        assert run(pipe, tiny).isfinite().all()
