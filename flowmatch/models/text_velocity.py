"""The velocity of a network that reads prompts, as a flow or as a diffusion's prediction."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.models.conditions import Conditions
from flowmatch.models.network import Network
from flowmatch.models.schedule import Schedule
from flowmatch.models.script import Script
from flowmatch.models.velocity import Condition, Velocity

HALVES = (torch.bfloat16, torch.float16)


class TextVelocity(Velocity):
    """The velocity of a pipeline's network, in the terms that were learnt by watching.

    Args:
        net: The network, or its DDP wrapper.
        script: What was learnt.
        conditions: Turns numbers of prompts into arguments.
        schedule: Of a network that predicts noise, v or the data; None for a flow.
        guidance: w; 1 disables guidance.
    """

    def __init__(
        self,
        net: Network,
        script: Script,
        conditions: Conditions,
        schedule: Schedule | None = None,
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
        whole = self.schedule is not None and x.device.type != "mps"  # timesteps stay whole numbers
        exact = torch.float64 if whole else torch.float32
        t = torch.as_tensor(t, dtype=exact, device=x.device).expand(x.shape[0])
        null = torch.full((x.shape[0],), self.conditions.count, dtype=torch.long)
        ids = null if cond is None else cond["label"]
        v = self._evaluate(x, t, self.conditions.rows(ids))
        if self.guidance != 1:
            without = self._evaluate(x, t, self.conditions.rows(null))
            v = without + self.guidance * (v - without)
        return v

    def spread(self, t: Tensor) -> Tensor:
        """As in `Velocity`; the times of a diffusion are those of its timesteps."""
        if self.schedule is None:
            return t
        return self.schedule.spread(t if t.device.type == "mps" else t.double())

    def weight(self, t: Tensor) -> Tensor:
        """As in `Velocity`."""
        return super().weight(t) if self.schedule is None else self.schedule.weight(t)

    def _evaluate(self, x: Tensor, t: Tensor, arguments: dict[str, Any]) -> Tensor:
        self.evaluations += 1
        own, device = next(self.net.parameters()).dtype, x.device.type
        # Times stay float32, which some networks in half precision multiply only under autocast.
        alone = own in HALVES and not torch.is_autocast_enabled(device)
        with torch.autocast(device, own) if alone else nullcontext():
            return self._velocity(x, t, in_dtype(arguments, own))

    def _velocity(self, x: Tensor, t: Tensor, arguments: dict[str, Any]) -> Tensor:
        own = next(self.net.parameters()).dtype
        if self.schedule is None:
            out = self.script.evaluate(self.net, x.to(own), 1 - t, arguments)
            return -self.script.direction * out.to(x.dtype)
        y = self.schedule.scaled(x, t)
        out = self.script.evaluate(
            self.net, y.to(own), self.schedule.timestep(t).float(), arguments
        )
        return self.schedule.velocity(x, t, out.to(x.dtype))


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Round the embeddings in nested arguments to half precision, where a network is in it.

    A pipeline in half precision passes them like that. What it leaves in float32 has at most two axes:
    guidance, angles of positions.
    """
    if dtype not in HALVES:
        return value
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype == torch.float32 and value.dim() > 2 else value
    if isinstance(value, dict):
        return {key: in_dtype(part, dtype) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(in_dtype(part, dtype) for part in value)
    return value
