"""The velocity of a network that reads prompts, in the terms of its pipeline or as a prediction of v."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow.path import expand
from flowmatch.models.conditions import Conditions
from flowmatch.models.network import Network
from flowmatch.models.script import Script
from flowmatch.models.velocity import Condition, Velocity


class ZeroTerminal:
    """The schedule of a v-prediction student: a teacher's, rescaled to no signal at its last timestep.

    y = a x1 + s x0 with a^2 = alphas_cumprod and s^2 = 1 - a^2 is (a + s) x_t at t = a / (a + s), and
    v_prediction is o = a x0 - s x1; so that x1 - x0 = (a - s) y - (a + s) o. Lin et al. 2023, arXiv
    2305.08891.

    Args:
        betas: Of the teacher's schedule, [T].
    """

    def __init__(self, betas: Tensor):
        from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

        products = torch.cumprod(1 - rescale_zero_terminal_snr(betas.double()), 0).clamp(min=0)
        a, s = products.sqrt(), (1 - products).sqrt()
        self.times = (a / (a + s)).numpy()[::-1].copy()  # rising: of timesteps T - 1, ..., 0

    def timestep(self, t: Tensor) -> Tensor:
        """Return the timesteps at times t in [0, 1], [B]; between two of them it is linear in t."""
        steps = np.arange(len(self.times))[::-1]
        return torch.from_numpy(np.interp(t.double().cpu().numpy(), self.times, steps)).to(t)

    def grid(self, steps: int) -> Tensor:
        """Return the times of so many steps of DDIM with trailing spacing, float64 [steps + 1]."""
        count = len(self.times)
        chosen = np.round(np.arange(count, 0, -count / steps))[:steps].astype(int) - 1
        return torch.tensor([*self.times[count - 1 - chosen], 1.0], dtype=torch.float64)


class TextVelocity(Velocity):
    """The velocity of a pipeline's network, in the terms that were learnt by watching.

    Args:
        net: The network, or its DDP wrapper.
        script: What was learnt.
        conditions: Turns numbers of prompts into arguments.
        schedule: Of a student of a noise-prediction class, which predicts v; None for a flow.
        guidance: w; 1 disables guidance.
    """

    def __init__(
        self,
        net: Network,
        script: Script,
        conditions: Conditions,
        schedule: ZeroTerminal | None = None,
        guidance: float = 1.0,
    ):
        self.net, self.script, self.conditions, self.schedule = net, script, conditions, schedule
        self.guidance, self.evaluations, self.second = guidance, 0, None
        self.classes = self.null = conditions.count

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Condition | None = None,
        r: Tensor | float | None = None,
    ) -> Tensor:
        """Evaluate the velocity; cond is {"label": numbers of prompts, int64 [B]}, None is the null."""
        if r is not None:
            raise UserError("r is given, but this network takes a single time")
        if not isinstance(t, Tensor):
            t = torch.full((), t, dtype=torch.float32, device=x.device)
        t = t.to(x.device, torch.float32).expand(x.shape[0])
        null = torch.full((x.shape[0],), self.conditions.count, dtype=torch.long)
        ids = null if cond is None else cond["label"]
        v = self._evaluate(x, t, self.conditions.rows(ids))
        if self.guidance != 1:
            without = self._evaluate(x, t, self.conditions.rows(null))
            v = without + self.guidance * (v - without)
        return v

    def _evaluate(self, x: Tensor, t: Tensor, arguments: dict[str, Any]) -> Tensor:
        self.evaluations += 1
        own = next(self.net.parameters()).dtype
        if self.schedule is None:
            out = self.script.evaluate(self.net, x.to(own), 1 - t, arguments)
            return -self.script.direction * out.to(x.dtype)
        size = (t**2 + (1 - t) ** 2).sqrt()
        a, s = expand(t / size, x), expand((1 - t) / size, x)
        y = (a + s) * x
        out = self.script.evaluate(self.net, y.to(own), self.schedule.timestep(t), arguments)
        return (a - s) * y - (a + s) * out.to(x.dtype)


def betas_of(scheduler: Any) -> Tensor:
    """Return the betas of a diffusion's scheduler, from its products of alphas."""
    products = scheduler.alphas_cumprod.double()
    return 1 - products / torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
