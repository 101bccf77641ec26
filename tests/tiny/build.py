"""What makes a tiny pipeline of its parts: fixed random weights, on the CPU in float32."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

SEED = 0


@dataclass(frozen=True)
class Tiny:
    """A stock pipeline class with random weights, and how a user calls it.

    Args:
        name: The diffusers class.
        parts: Makes the components.
        latents: The shape of one sample as `latents=` wants it, without the batch's axis.
        call: What a user passes beside prompt, latents and generator.
        note: Why the pipeline does not load again, where it does not; of a refused one, its reason.
    """

    name: str
    parts: Callable[[], dict]
    latents: tuple[int, ...]
    call: dict = field(default_factory=dict)
    note: str = ""

    def build(self):
        """Make the pipeline anew: the same weights each time, the global generator untouched."""
        import diffusers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            parts = self.parts()
            for part in parts.values():
                if isinstance(part, torch.nn.Module):
                    randomise(part)
            pipe = getattr(diffusers, self.name)(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def noise(self, count: int, seed: int = 0) -> torch.Tensor:
        """Draw `latents` for so many prompts."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.latents, generator=generator)


def randomise(module: torch.nn.Module) -> None:
    """Draw all parameters, those too that a class leaves zero (gates) or empty (pad tokens)."""
    module.eval().requires_grad_(False)
    for name, weight in module.named_parameters():
        if weight.ndim >= 2 and weight.numel():
            weight.normal_(0, math.sqrt(weight.shape[0] / weight.numel()))
        else:
            weight.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    module.requires_grad_(True)


def register(table: dict[str, Tiny], name: str, key: str = "", **kwargs):
    """Return a decorator that enters a function of components into a table."""

    def enter(parts: Callable[[], dict]) -> Callable[[], dict]:
        table[key or name] = Tiny(name, parts, **kwargs)
        return parts

    return enter
