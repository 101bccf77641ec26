"""The critic of a finish by distribution matching: a second velocity learns that of the samples."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowmatch.flow import dmd, losses, path
from flowmatch.models import adapters
from flowmatch.models.teachers import Teacher
from flowmatch.models.velocity import Velocity
from flowmatch.training.config import FitConfig
from flowmatch.training.finishing import Critic, Place, Seen
from flowmatch.training.optimizers import OPTIMIZERS

GOLDEN = 0.6180339887498949  # times of several updates are apart by it, modulo 1


class Networks(Protocol):
    """The networks of both velocities; each is used within a context of its own, gradients included."""

    def begin(self, device: torch.device) -> dict[str, nn.Parameter]:
        """Bring them to a device; return the parameters of that of the samples, by name."""

    def real(self) -> AbstractContextManager[Velocity]:
        """Provide the velocity of the data: the teacher's."""

    def fake(self) -> AbstractContextManager[Velocity]:
        """Provide the velocity of the samples."""


class Apart(Networks):
    """A teacher, and a copy of it.

    Args:
        teacher: The teacher.
        guidance: Of its velocity; that of the samples has none.
    """

    def __init__(self, teacher: Teacher, guidance: float):
        self.teacher = teacher.own_velocity(teacher.net, guidance)
        self.copy = teacher.own_velocity(copy.deepcopy(teacher.net))

    def begin(self, device: torch.device) -> dict[str, nn.Parameter]:
        """As in `Networks`."""
        teacher, own = self.teacher.net, self.copy.net
        teacher.to(device).eval()  # type: ignore[attr-defined]
        own.to(device).eval().requires_grad_(True)  # type: ignore[attr-defined]
        return dict(own.named_parameters())  # type: ignore[attr-defined]

    def real(self) -> AbstractContextManager[Velocity]:
        """As in `Networks`."""
        return nullcontext(self.teacher)

    def fake(self) -> AbstractContextManager[Velocity]:
        """As in `Networks`."""
        return nullcontext(self.copy)


class Shared(Networks):
    """A network with the adapter of a student: without it the teacher, with another one its copy.

    Args:
        teacher: The teacher, whose network has the adapter.
        guidance: As in `Apart`.
        seed: Of the other adapter.
    """

    def __init__(self, teacher: Teacher, guidance: float, seed: int):
        self.net, self.seed = teacher.net, seed
        self.teacher = teacher.own_velocity(self.net, guidance)
        self.copy = teacher.own_velocity(self.net)

    def begin(self, device: torch.device) -> dict[str, nn.Parameter]:
        """As in `Networks`."""
        self.other = adapters.another(self.net.to(device), self.seed)
        ups = {name: p for name, p in self.other.items() if ".lora_B." in name}
        self.none = {n: nn.Parameter(torch.zeros_like(p), False) for n, p in ups.items()}
        return self.other

    @contextmanager
    def real(self) -> Iterator[Velocity]:
        """As in `Networks`."""
        with adapters.exchanged(self.net, self.none):
            yield self.teacher

    @contextmanager
    def fake(self) -> Iterator[Velocity]:
        """As in `Networks`."""
        with adapters.exchanged(self.net, self.other):
            yield self.copy


class Scores(Critic):
    """Moves samples by the difference of two velocities (`flow.dmd`).

    That of the data is the teacher's. That of the samples begins as a copy of it, without guidance, and
    learns, by the teacher's own loss on each batch of samples, before the next one. Neither has dropout,
    whose masks would need seeds.

    Args:
        networks: Of both.
        updates: Of the velocity of the samples, for each of the student.
        config: Of its optimizer: learning rate, averages, weight decay and clipping.
    """

    def __init__(self, networks: Networks, updates: int, config: FitConfig):
        self.networks, self.updates, self.config = networks, updates, config
        self.noises = 1 + updates
        self.made: dict[int, tuple[Tensor, Seen]] = {}  # of the micro-batches of an update

    def begin(
        self, accelerator: Any, plain: Velocity, where: list[Place], saved: dict[str, Tensor]
    ) -> None:
        """As in `Critic`."""
        self.accelerator = accelerator
        self.named = self.networks.begin(accelerator.device)
        self.parameters = list(self.named.values())
        self.adamw = OPTIMIZERS["adamw"](self.parameters, self.config, accelerator.device)
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
        with torch.no_grad(), self._half():
            with self.networks.real() as v:
                t = v.spread(dmd.times(seen.u))
                y = path.interpolate(seen.noise[:, 0], x.detach(), t)
                real = v(y, t, seen.cond)
            with self.networks.fake() as v:
                fake = v(y, t, seen.cond)
        return dmd.errors(x, dmd.direction(x, y, t, real, fake))

    def learn(self, place: Place) -> Tensor | None:
        """As in `Critic`: the teacher's loss on the samples of the update."""
        finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        for number in range(self.updates):
            for x, seen in self.made.values():
                noise = seen.noise[:, 1 + number]
                with self.networks.fake() as v:
                    t = v.spread(dmd.times((seen.u + (number + 1) * GOLDEN) % 1))
                    with self._half():
                        out = v(path.interpolate(noise, x, t), t, seen.cond)
                    error = v.weight(t) * losses.mse(out, path.velocity(noise, x))
                    (error.mean() / len(self.made)).backward()
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
