"""Pipelines learnt by watching: what each class does, a replay of it, and refusals with their reason.

One process learns all tiny pipelines; the table is that of docs/reference/pipelines.md.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.models import evidence, learn
from flowmatch.models.script import REST, Script, conditions
from flowmatch.models.watch import answer_of, run
from tests.tiny import TINY

# class: (kind, network's time, sign, half of the channels, what switches guidance off, calls a step)
S, K = (1000.0, 0.0), (1.0, 0.0)  # 1000 sigma; sigma (flows), or the scheduler's timestep
ONE = {"guidance_scale": 1.0}
TABLE = {
    "StableDiffusionPipeline": ("epsilon", K, 1, False, ONE, 2),
    "StableDiffusionXLPipeline": ("epsilon", K, 1, False, ONE, 2),
    "PixArtAlphaPipeline": ("epsilon", K, 1, True, ONE, 2),
    "PixArtSigmaPipeline": ("epsilon", K, 1, True, ONE, 2),
    "CogVideoXPipeline": ("v_prediction", K, 1, False, ONE, 2),
    "StableDiffusion3Pipeline": ("flow", S, 1, False, ONE, 2),
    "FluxPipeline": ("flow", K, 1, False, {}, 1),
    "SanaPipeline": ("flow", S, 1, False, ONE, 2),
    "Lumina2Pipeline": ("flow", (-1.0, 1.0), -1, False, ONE, 2),
    "LuminaPipeline": ("flow", (-1.0, 1.0), -1, True, ONE, 2),
    "ZImagePipeline": ("flow", (-1.0, 1.0), -1, False, {"guidance_scale": 0.0}, 2),
    "QwenImagePipeline": ("flow", K, 1, False, {}, 1),
    "ChromaPipeline": ("flow", K, 1, False, ONE, 2),
    "AuraFlowPipeline": ("flow", K, 1, False, ONE, 2),
    "CogView4Pipeline": ("flow", S, 1, False, ONE, 2),
    "HiDreamImagePipeline": ("flow", S, -1, False, ONE, 2),
    "WanPipeline": ("flow", S, 1, False, ONE, 2),
    "LTXPipeline": ("flow", S, 1, False, ONE, 2),
    "HunyuanVideoPipeline": ("flow", S, 1, False, {}, 1),
    "MochiPipeline": ("flow", (-1000.0, 1000.0), 1, False, ONE, 2),
    # further classes
    "HunyuanDiTPipeline": ("v_prediction", K, 1, True, ONE, 2),
    "CogView3PlusPipeline": ("v_prediction", K, 1, False, ONE, 2),
    "LattePipeline": ("epsilon", K, 1, True, ONE, 2),
    "AllegroPipeline": ("epsilon", K, 1, False, ONE, 2),
    "AnimateDiffPipeline": ("epsilon", K, 1, False, ONE, 2),
    "LDMTextToImagePipeline": ("epsilon", K, 1, False, {}, 1),
    "BriaPipeline": ("flow", S, 1, False, ONE, 2),
    "BriaFiboPipeline": ("flow", S, 1, False, ONE, 2),
    "PRXPipeline": ("flow", K, 1, False, {}, 1),
    "OvisImagePipeline": ("flow", K, 1, False, ONE, 2),
    "Krea2Pipeline": ("flow", K, 1, False, {"guidance_scale": 0.0}, 2),
    "NucleusMoEImagePipeline": ("flow", K, -1, False, ONE, 2),
    "Flux2KleinPipeline": ("flow", K, 1, False, ONE, 2),
    "SanaVideoPipeline": ("flow", S, 1, False, ONE, 2),
    "SkyReelsV2Pipeline": ("flow", S, 1, False, ONE, 2),
    "Kandinsky5T2VPipeline": ("flow", S, 1, False, ONE, 2),
    "HunyuanImagePipeline": ("flow", S, 1, False, {}, 2),  # by its guider
    "HunyuanVideo15Pipeline": ("flow", S, 1, False, {}, 1),
}
RIDES = {"LattePipeline", "CogView4Pipeline", "Kandinsky5T2VPipeline"}
SOME = "StableDiffusion3Pipeline"


def call_of(name):
    return {key: value for key, value in TINY[name].call.items() if key != "output_type"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_a_class_is_learnt_and_replays(name):
    pipe, call = TINY[name].build(), call_of(name)
    script = learn.learn(pipe, call, f"teacher={name}")
    kind, (slope, offset), sign, half, off, calls = TABLE[name]
    assert (script.kind, script.slope, script.offset) == (kind, slope, offset)
    assert (script.sign, script.half, script.off) == (sign, half, off)
    assert script.evaluations == calls * script.steps == calls * call["num_inference_steps"]
    assert learn.replay(pipe, script, call, "teacher") <= 1e-5
    assert Script.of(json.loads(json.dumps(script.entries()))) == script
    assert script.direction == (-1 if name == "MochiPipeline" else 1)
    assert script.rides == (name in RIDES)
    assert script.inject == (name in {"Flux2KleinPipeline"})


def test_all_tiny_classes_are_in_the_table_and_on_the_page():
    assert TABLE.keys() <= TINY.keys()
    page = Path(__file__).parents[2] / "docs" / "reference" / "pipelines.md"
    named = set(re.findall(r"\w+", page.read_text()))
    assert [name for name in TABLE if name.removesuffix("Pipeline") not in named] == []


@pytest.fixture(scope="module")
def learnt():
    pipe = TINY[SOME].build()
    return pipe, learn.learn(pipe, call_of(SOME), "teacher=x")


@pytest.mark.parametrize(
    "wrong", [{"slope": 1.0}, {"sign": -1.0}, {"offset": 5.0}, {"off": {"guidance_scale": 3.0}}]
)
def test_a_replay_tells_a_wrong_script(learnt, wrong):
    pipe, script = learnt
    try:
        error = learn.replay(pipe, replace(script, **wrong), call_of(SOME), "teacher=x")
    except (UserError, RuntimeError):  # guided, two rows a sample do not fit
        return
    assert error > 1e-3


def test_a_pipeline_is_left_as_it_was(learnt):
    pipe, _ = learnt
    assert "step" not in vars(pipe.scheduler)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in modules(pipe))


def modules(pipe):
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def test_noise_given_and_noise_put_in_are_the_same_run(learnt):
    pipe, script = learnt
    noise = torch.randn(2, *script.shape, generator=torch.Generator().manual_seed(1))
    made = [
        run(pipe, learn.WORDS, call_of(SOME), noise, network=script.network, inject=inject)
        for inject in (False, True)
    ]
    assert torch.equal(made[0].steps[-1].after, made[1].steps[-1].after)


def test_the_run_stops_where_it_is_told(learnt):
    pipe, script = learnt
    seen = run(pipe, learn.WORDS, call_of(SOME), network=script.network, count=2)
    assert len(seen.steps) == 2
    first = run(pipe, learn.WORDS, call_of(SOME), network=script.network, first_only=True)
    assert not first.steps
    assert first.calls[-1].name == script.network
    cond = conditions(pipe, script, call_of(SOME), ["one", "two", "three"])
    assert cond["encoder_hidden_states"].shape[0] == 3
    assert REST not in cond


def test_answers_of_every_form_are_read():
    x = torch.ones(2, 3)
    assert torch.equal(answer_of((x,)), x)
    assert torch.equal(answer_of(x), x)
    assert torch.equal(answer_of(([x[0], x[1]], {})), x)
    assert torch.equal(answer_of([x[0], x[1]]), x)
    assert answer_of("no") is None


@pytest.mark.parametrize(
    "kind", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"]
)
def test_schedulers_that_add_noise_are_refused(kind):
    import diffusers

    pipe = TINY["StableDiffusionPipeline"].build()
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    with pytest.raises(
        UserError, match=f"{kind} adds noise: two runs from the same latents differ"
    ):
        learn.learn(pipe, call_of("StableDiffusionPipeline"), "teacher=x")


def test_mistakes_in_the_call_are_refused(learnt):
    pipe, _ = learnt
    for call, message in [
        ({"latents": 1}, "call.latents: is set by flowmatch"),
        ({"hight": 64}, "call.hight: unknown argument; StableDiffusion3Pipeline takes .*height"),
        ({"height": 63}, "fails on a prompt and the arguments of `call`: ValueError: .*63"),
        ({"num_inference_steps": "x"}, "fails on a prompt .*TypeError"),  # which few steps hide
        ({"num_inference_steps": 0}, "takes no step|fails on a prompt"),
        ({"num_inference_steps": 2**60}, "fails on a prompt"),
        ({"num_images_per_prompt": 2}, "4 rows for 2 prompts; set call.num_images_per_prompt=1"),
    ]:
        with pytest.raises(UserError, match=message):
            learn.learn(pipe, call_of(SOME) | call, "teacher=x")


class Line(torch.nn.Module):
    """A network of one number a time, on states [B, 4]."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, x, t, words, extra=None):
        return (self.weight * x + t[:, None] + words.sum(1, keepdim=True),)


def amiss_scheduler(amiss):
    """A flow-matching scheduler with one thing amiss."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Amiss(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, *args, **more):
            super().set_timesteps(*args, **more)
            if amiss == "no sigmas":
                self.hidden, self.sigmas = self.sigmas, None

        def step(self, model_output, timestep, sample, return_dict=True):
            if amiss == "no sigmas":
                i = (self.timesteps == timestep).nonzero()[0]
                return (sample + (self.hidden[i + 1] - self.hidden[i]) * model_output,)
            after = super().step(model_output, timestep, sample, return_dict=False)[0]
            return (2 * after - sample if amiss == "a longer step" else after,)

    return Amiss()


class Toy:
    """What watching needs of a pipeline: components, a scheduler, a call; and one thing amiss."""

    def __init__(self, amiss=""):
        self.net, self.other, self.amiss = Line(), Line(), amiss
        self.scheduler = amiss_scheduler(amiss)
        self.components = {"net": self.net, "other": self.other, "scheduler": self.scheduler}
        self._execution_device = torch.device("cpu")

    def set_progress_bar_config(self, **options):
        pass

    @torch.no_grad()
    def __call__(
        self, prompt, num_inference_steps=4, latents=None, generator=None, guidance_scale=3.0
    ):
        B = len(prompt)
        x = torch.randn(B, 4, generator=generator) if latents is None else latents
        words = torch.tensor([[float(len(p)), 1.0] for p in prompt])
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            net = self.other if self.amiss == "two networks" and i == 1 else self.net
            given = x + 0.1 * torch.ones_like(x) if self.amiss == "another input" else x
            extra = torch.tensor(float(i)) if self.amiss == "an argument" else None
            time = (t.square() / 1000 if self.amiss == "squared times" else t).expand(B)
            out = net(given, time, words, extra)[0]
            if guidance_scale != 1 or self.amiss == "guided":
                out = out + guidance_scale * (out - net(given, time, 0 * words, extra)[0])
            if self.amiss == "preparing":
                out = (x - out) / self.scheduler.sigmas[i]
            if self.amiss == "squared":
                out = out**2
            if self.amiss != "no step":
                x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x


def test_a_pipeline_of_no_library_is_learnt():
    script = learn.learn(Toy(), {}, "teacher=x")
    assert (script.network, script.sample, script.time) == ("net", "x", "t")
    assert (script.slope, script.offset, script.off) == (1000.0, 0.0, {"guidance_scale": 1.0})
    assert (script.steps, script.evaluations, script.rides) == (4, 8, False)


@pytest.mark.parametrize(
    ("amiss", "message"),
    [
        ("two networks", "calls net before step 1 and other before step 2; only pipelines of one"),
        ("another input", "the input of net in Toy is not the state"),
        ("an argument", r"extra, t change from step to step|t, extra change from step to step"),
        ("guided", "cannot be switched off by guidance_scale = 1 or 0"),
        ("preparing", "prepares its network's answer .its model output is up to"),
        ("squared", "is neither its network's answer nor the first half"),
        ("no step", "Toy never calls scheduler.step"),
        ("no sigmas", "Amiss has no list of sigmas"),
        (
            "squared times",
            "the times that the network of Toy sees, .* are no linear function of the",
        ),
        (
            "a longer step",
            r"the first step of Amiss is not state \+ .difference of sigmas. \* model",
        ),
    ],
)
def test_what_cannot_be_learnt_is_refused_with_its_reason(amiss, message):
    with pytest.raises(UserError, match=message):
        learn.learn(Toy(amiss), {}, "teacher=x")


HALF = [
    "FluxPipeline",
    "QwenImagePipeline",
    "AuraFlowPipeline",
    "WanPipeline",
    "HunyuanVideoPipeline",
]
HALF += ["MochiPipeline", "HunyuanDiTPipeline", "StableDiffusion3Pipeline", "ZImagePipeline"]


@pytest.mark.parametrize("name", HALF)
def test_a_pipeline_in_bfloat16_is_learnt_as_in_float32(name):
    """Their times and states are rounded on the way to the network."""
    pipe, call = TINY[name].build().to(torch.bfloat16), TINY[name].call
    script = learn.learn(pipe, call, "teacher=x")
    kind, line, sign, half, off, _ = TABLE[name]
    assert (script.kind, (script.slope, script.offset)) == (kind, line)
    assert (script.sign, script.half, script.off) == (sign, half, off)
    assert script.replayed <= 1e-2


def test_a_line_of_rounded_times_has_few_digits():
    clock = [1.0, 0.7673034667968, 0.4512]
    rounded = torch.tensor(clock, dtype=torch.bfloat16)
    for slope, offset in [(1.0, 0.0), (1000.0, 0.0), (-1.0, 1.0), (1.0, 0.25)]:
        times = (slope * rounded + offset).tolist()
        assert evidence.fit(clock, times, half=True)[:2] == (slope, offset)
    assert evidence.fit(clock, [1.0, 0.8, 0.4], half=True)[2] > evidence.ROUNDING
