"""The schedule of a diffusion, as times of a flow, and what a network of its kinds predicts.

y = a x1 + s x0 with a^2 = alphas_cumprod and s^2 = 1 - a^2 is (a + s) x_t at t = a / (a + s).
"""

from typing import Any

import torch
from torch import Tensor

from flowmatch.flow import losses, path
from flowmatch.flow.objectives import Condition, Field, Objective
from flowmatch.flow.path import expand


class Schedule:
    """A schedule, and one kind of prediction on it.

    Args:
        products: alphas_cumprod, [T].
        kind: What the network predicts: "epsilon" (x0), "sample" (x1), or "v_prediction"
            (a x0 - s x1; Salimans and Ho 2022, arXiv 2202.00512).
    """

    def __init__(self, products: Tensor, kind: str):
        a, s = products.sqrt(), (1 - products).sqrt()
        self.kind, self.times = kind, (a / (a + s)).double().flip(0)  # of timesteps T - 1, ..., 0
        self._on: dict[torch.device, Tensor] = {}

    def _times(self, device: torch.device) -> Tensor:
        return self._on.setdefault(device, self.times.to(device))

    def timestep(self, t: Tensor) -> Tensor:
        """Return the timesteps at times t in [0, 1], [B]; between two of them it is linear in t."""
        times = self._times(t.device)
        after = torch.searchsorted(times, t.double().contiguous()).clamp(1, len(times) - 1)
        before = times[after - 1]
        part = ((t - before) / (times[after] - before)).clamp(0, 1)
        return (len(times) - after - part).to(t)

    def spread(self, t: Tensor) -> Tensor:
        """Turn shares t in [0, 1] of the timesteps, 1 the least noisy, into their times, [B]."""
        times = self._times(t.device)
        return times[(t * len(times)).long().clamp(max=len(times) - 1)].to(t)

    def scaled(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the state y = (a + s) x_t that the network takes. x: [B, ...]; t: [B]."""
        return x / expand((t**2 + (1 - t) ** 2).sqrt(), x)

    def velocity(self, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """Return x1 - x0 of a prediction.

        Args:
            x: x_t, [B, ...].
            t: Times, [B]; above 0 for "epsilon", below 1 for "sample".
            out: What the network predicts, [B, ...].
        """
        if self.kind == "epsilon":
            return (x - out) / expand(t, x)
        if self.kind == "sample":
            return (out - x) / expand(1 - t, x)
        size = (t**2 + (1 - t) ** 2).sqrt()
        a, s = expand(t / size, x), expand((1 - t) / size, x)
        return (a - s) * ((a + s) * x) - (a + s) * out

    def weight(self, t: Tensor) -> Tensor:
        """Return the squared error of the prediction by that of its velocity, [B]."""
        if self.kind == "epsilon":
            return t**2
        return (1 - t) ** 2 if self.kind == "sample" else t**2 + (1 - t) ** 2

    def objective(self) -> Objective:
        """Return the objective that a network of this kind is trained with: its own squared error.

        A time in [0, 1] stands for a share of the timesteps (`spread`): uniform ones are DDPM's.
        """

        def denoise(
            v: Field,
            plain: Field,
            x0: Tensor,
            x1: Tensor,
            t: Tensor,
            u: Tensor,
            cond: Condition,
            mask_seed: int,
        ) -> Tensor:
            t = self.spread(t)
            out = v(path.interpolate(x0, x1, t), t, cond)
            return self.weight(t) * losses.mse(out, path.velocity(x0, x1))

        return denoise


class ZeroTerminal(Schedule):
    """The schedule of a v-prediction student: a teacher's, rescaled to no signal at its last timestep.

    Lin et al. 2023, arXiv 2305.08891.

    Args:
        betas: Of the teacher's schedule, [T].
    """

    def __init__(self, betas: Tensor):
        from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

        products = torch.cumprod(1 - rescale_zero_terminal_snr(betas.double()), 0).clamp(min=0)
        super().__init__(products, "v_prediction")

    def grid(self, steps: int) -> Tensor:
        """Return the times of so many steps of DDIM with trailing spacing, float64 [steps + 1]."""
        count = len(self.times)
        chosen = torch.arange(count, 0, -count / steps, dtype=torch.float64)[:steps].round().long()
        return torch.cat([self.times[count - chosen], torch.ones(1, dtype=torch.float64)])


def betas_of(scheduler: Any) -> Tensor:
    """Return the betas of a diffusion's scheduler, from its products of alphas."""
    products = scheduler.alphas_cumprod.double()
    return 1 - products / torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
