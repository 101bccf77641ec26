"""The velocity of networks in half precision: called outside autocast, and with rows in float32."""

import inspect

import pytest
import torch

from flowmatch.models import learn
from flowmatch.models.conditions import Encoded
from flowmatch.models.schedule import Schedule
from flowmatch.models.text_velocity import TextVelocity, in_dtype
from flowmatch.models.watch import quiet
from tests.tiny import TINY

# The first two multiply times in float32, Lumina's first layer of the text is a norm.
CLASSES = [
    "HunyuanDiTPipeline",
    "Kandinsky5T2VPipeline",
    "LuminaPipeline",
    "StableDiffusion3Pipeline",
]
CLASSES += ["StableDiffusionPipeline"]


def velocity(pipe, rows, script, call, **more):
    """The velocity of a pipeline's network, with the conditions of another one."""
    net = getattr(pipe, script.network).eval()
    table = Encoded(rows, script, call, ["a cat", "a dog"], "", "a cat")
    schedule = None
    if script.kind != "flow":
        schedule = Schedule(pipe.scheduler.alphas_cumprod.double(), script.kind)
    x = torch.randn(2, *script.shape, generator=torch.Generator().manual_seed(0))
    times = []

    def seen(module, args, kwargs):
        given = inspect.signature(type(net).forward).bind(net, *args, **kwargs)
        times.append(given.arguments[script.time])

    with quiet(), torch.no_grad(), net.register_forward_pre_hook(seen, with_kwargs=True):
        field = TextVelocity(net, script, table, schedule)
        with torch.autocast("cpu", torch.bfloat16, **more):
            v = field(x, torch.tensor([0.3, 0.6]), {"label": torch.arange(2)})
    return v, times[-1]


@pytest.mark.parametrize("name", CLASSES)
def test_a_network_in_bfloat16_is_called_with_times_in_float32(name):
    tiny = TINY[name]
    call = {key: value for key, value in tiny.call.items() if key != "output_type"}
    exact = tiny.build()
    script = learn.learn(exact, call, "teacher=x")
    wanted, _ = velocity(exact, exact, script, call, enabled=False)
    half = tiny.build().to(torch.bfloat16)
    # its own text encoders, then rows that were encoded in float32
    for rows in (half, exact):
        for enabled in (False, True):
            found, time = velocity(half, rows, script, call, enabled=enabled)
            assert (found.dtype, time.dtype) == (torch.float32, torch.float32)
            assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_embeddings_alone_are_rounded():
    text, angles = torch.randn(2, 3, 4), torch.randn(3, 4)
    nested = {
        "a": [text, (angles, text.long())],
        "b": None,
        "c": torch.view_as_complex(text[..., :2]),
    }
    half = in_dtype(nested, torch.bfloat16)
    assert half["a"][0].dtype == torch.bfloat16
    assert half["a"][1][0] is angles
    assert half["a"][1][1].dtype == torch.int64
    assert half["c"].is_complex()
    assert in_dtype(nested, torch.float32) is nested
