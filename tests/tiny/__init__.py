"""Tiny pipelines of diffusers' own classes with random weights, nothing downloaded.

`TINY` maps the name of a class to a `Tiny`: `TINY["SanaPipeline"].build()` is a pipeline,
`pipe(prompt, latents=tiny.noise(len(prompt)), **tiny.call)` runs it.
"""

from tests.tiny import diffusion, flow, video
from tests.tiny.build import Tiny

TINY: dict[str, Tiny] = diffusion.TINY | flow.TINY | video.TINY

__all__ = ["TINY", "Tiny"]
