"""The critic of a finish by distribution matching: a second velocity learns that of the samples."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from flowmatch.flow import dmd, path
from flowmatch.models.velocity import Velocity
from flowmatch.training.config import FitConfig
from flowmatch.training.finishing import Critic, Place, Seen
from flowmatch.training.optimizers import OPTIMIZERS

GOLDEN = 0.6180339887498949  # times of several updates are apart by it, modulo 1


class Scores(Critic):
    """Moves samples by the difference of two velocities (`flow.dmd`).

    That of the data is the teacher's. That of the samples begins as a copy of it and learns, by flow
    matching on each batch of samples, before the next one.

    Args:
        real: The teacher, on the device.
        fake: A copy of it with a network of its own.
        updates: Of the fake velocity, for each of the student.
        config: Of the fake's optimizer: its learning rate, averages, weight decay and clipping.
    """

    def __init__(self, real: Velocity, fake: Velocity, updates: int, config: FitConfig):
        self.real, self.fake, self.updates, self.config = real, fake, updates, config
        self.noises = 1 + updates
        self.made: dict[int, tuple[Tensor, Seen]] = {}  # of the micro-batches of an update

    def begin(
        self, accelerator: Any, plain: Velocity, where: list[Place], saved: dict[str, Tensor]
    ) -> None:
        """As in `Critic`."""
        self.accelerator, device = accelerator, accelerator.device
        net: Any = self.fake.net
        self.real.net.to(device).eval()
        net.to(device).eval().requires_grad_(True)  # no dropout: its masks would need seeds
        self.named = dict(net.named_parameters())
        self.parameters = list(self.named.values())
        self.adamw = OPTIMIZERS["adamw"](self.parameters, self.config, device)
        if not saved:
            return
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(saved[f"fake/{name}"])
        states: dict[int, dict[str, Tensor]] = {}
        for number, name in enumerate(self.named):
            start = f"optimizer/{name}/"
            own = {k.removeprefix(start): t for k, t in saved.items() if k.startswith(start)}
            if own:
                states[number] = own
        self.adamw.restore(states)

    def errors(self, x: Tensor, seen: Seen, index: int) -> Tensor:
        """As in `Critic`."""
        self.made[index] = (x.detach(), seen)
        t = dmd.times(seen.u)
        y = path.interpolate(seen.noise[:, 0], x.detach(), t)
        with torch.no_grad(), self._half():
            real, fake = (v(y, t, seen.cond) for v in (self.real, self.fake))
        return dmd.errors(x, dmd.direction(x, y, t, real, fake))

    def learn(self, place: Place) -> Tensor | None:
        """As in `Critic`: flow matching on the samples of the update."""
        finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        for number in range(self.updates):
            for x, seen in self.made.values():
                t = dmd.times((seen.u + (number + 1) * GOLDEN) % 1)
                noise = seen.noise[:, 1 + number]
                with self._half():
                    v = self.fake(path.interpolate(noise, x, t), t, seen.cond)
                error = (v - path.velocity(noise, x)).square().mean()
                (error / len(self.made)).backward()
            finite = finite & self._step(finite)
        return finite

    def _step(self, finite: Tensor) -> Tensor:
        """Make an update of the fake velocity where all is finite; return whether it is."""
        used = [p for p in self.parameters if p.grad is not None]
        grads = [p.grad for p in used if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        # by hand: without a wrapper, and in one order
        flat = self.accelerator.reduce(flat, "mean")
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        norm = torch.nn.utils.clip_grad_norm_(used, self.config.max_grad_norm)
        finite = finite & norm.isfinite()
        self.adamw.mask(~finite)
        self.adamw.optimizer.step()
        self.adamw.optimizer.zero_grad(set_to_none=True)
        return finite

    def _half(self) -> AbstractContextManager[None]:
        return self.accelerator.autocast()

    def tensors(self) -> dict[str, Tensor]:
        """As in `Critic`."""
        found = {f"fake/{name}": p.detach() for name, p in self.named.items()}
        for name, parameter in self.named.items():
            for key, tensor in self.adamw.state_of(parameter).items():
                found[f"optimizer/{name}/{key}"] = tensor
        return found
