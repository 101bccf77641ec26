"""Tiny pipelines of diffusers' own classes with random weights, nothing downloaded.

`TINY` maps a class, or a class and what is different, to a `Tiny`: `tiny.build()` makes the pipeline and
`pipe(prompts, latents=tiny.noise(len(prompts)), **tiny.call)` runs it. `REFUSED` holds those of which
nothing can be learnt.
"""

from tests.tiny import diffusion, flow, further, rare, video
from tests.tiny.build import Tiny
from tests.tiny.refused import REFUSED

TINY: dict[str, Tiny] = diffusion.TINY | flow.TINY | further.TINY | rare.TINY | video.TINY

__all__ = ["REFUSED", "TINY", "Tiny"]
