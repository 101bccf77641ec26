"""The critic of a finish that compares features of samples with those of the data."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowmatch.flow import path
from flowmatch.models.velocity import Velocity
from flowmatch.training.finishing import Critic, Place, Seen, state_at

Samples = Iterable[dict[str, Any]]  # batches with x1, and where they are pairs x0 and perhaps label


class Matcher(Protocol):
    """Compares generated features with a target's: `flow.moments`, `flow.energy`."""

    def errors(self, f: Tensor) -> Tensor: ...
    def fill(self, f: Tensor) -> None: ...
    def add(self, f: Tensor) -> None: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def restore(self, saved: dict[str, Tensor]) -> None: ...


class Features(Critic):
    """Matches features of samples with those of data.

    Samples made from noise in one step are compared by themselves, and those of all later points of the
    grids together: moments of a few hundred samples of a rare point would be noise.

    Args:
        modules: Name -> frozen module, x [B, ...] -> features [B, ...], in eval mode on the device.
        make: Builds a matcher from the features of the data, a part at a time.
        data: Yields batches with x1 anew at each call; None: x1 of the pairs.
        pairs: Likewise, with x0 and perhaps label: the first samples are made from their noise.
        count: Samples that it begins with, as many at each point.
        look: Makes what the modules take of samples and of the pairs' x1; None: as they are.
    """

    noises = 0

    def __init__(
        self,
        modules: dict[str, nn.Module],
        make: Callable[[Iterable[Tensor]], Matcher],
        data: Callable[[], Samples] | None,
        pairs: Callable[[], Samples],
        count: int,
        look: nn.Module | None = None,
    ):
        self.modules, self.make, self.data, self.pairs = modules, make, data, pairs
        self.look = look or nn.Identity()
        self.count = count
        self.matchers: dict[bool, dict[str, Matcher]] = {}  # of later points or not; by name
        self.found: dict[int, list[Tensor]] = {}  # features of the micro-batches of an update

    @torch.no_grad()
    def begin(
        self, accelerator: Any, plain: Velocity, where: list[Place], saved: dict[str, Tensor]
    ) -> None:
        """As in `Critic`: read the data; make the first samples."""
        self.accelerator, device = accelerator, accelerator.device
        targets = {
            name: self.make(module(x).flatten(1) for x in self._target(device))
            for name, module in self.modules.items()
        }
        for later in sorted({is_later(place) for place in where}):
            points = [place for place in where if is_later(place) == later]
            made: list[Tensor] = []
            for place in () if saved else points:
                made += self._samples(device, plain, place, -(-self.count // len(points)))
            self.matchers[later] = {name: copy.copy(target) for name, target in targets.items()}
            for name, matcher in self.matchers[later].items():
                if not saved:
                    module = self.modules[name]
                    matcher.fill(torch.cat([module(x).flatten(1) for x in made]))
                    continue
                start = f"{int(later)}/{name}/"
                own = {k.removeprefix(start): v for k, v in saved.items() if k.startswith(start)}
                matcher.restore(own)

    def _target(self, device: torch.device) -> Iterator[Tensor]:
        if self.data is not None:
            yield from (batch["x1"].to(device) for batch in self.data())
        else:
            yield from (self.look(batch["x1"].to(device)) for batch in self.pairs())

    def _samples(
        self, device: torch.device, plain: Velocity, place: Place, count: int
    ) -> list[Tensor]:
        made: list[Tensor] = []
        for batch in self.pairs():
            cond = {"label": batch["label"].to(device)} if "label" in batch else None
            x = state_at(plain, batch["x0"].to(device), place, cond)
            made.append(self.look(path.data_prediction(x, plain(x, place[-1], cond), place[-1])))
            if sum(map(len, made)) >= count:
                break
        return made

    def errors(self, x: Tensor, seen: Seen, index: int) -> Tensor:
        """As in `Critic`."""
        total, found, x = x.new_zeros(len(x)), [], self.look(x)
        for name, matcher in self.matchers[is_later(seen.place)].items():
            f = self.modules[name](x).flatten(1)
            total = total + matcher.errors(f)
            found.append(f.detach())
        self.found[index] = found
        return total / len(found)

    def learn(self, place: Place) -> Tensor | None:
        """As in `Critic`: count the samples, in the order of the global batch."""
        for number, matcher in enumerate(self.matchers[is_later(place)].values()):
            parts = [self.accelerator.gather(self.found[i][number]) for i in sorted(self.found)]
            matcher.add(torch.cat(parts))
        return None

    def tensors(self) -> dict[str, Tensor]:
        """As in `Critic`."""
        return {
            f"{int(later)}/{name}/{part}": tensor
            for later, matchers in self.matchers.items()
            for name, matcher in matchers.items()
            for part, tensor in matcher.tensors().items()
        }


def is_later(place: Place) -> bool:
    """Check whether a point of a grid lies after t = 0."""
    return len(place) > 1
