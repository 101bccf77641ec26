"""A finish: the network learns from samples that it makes while it trains, with pairs as its anchor.

An update is for one number of Euler steps and one point t of their grid, both drawn from the seed and
the step. The network's own steps lead fresh noise to the state x there, without a gradient (backward
simulation: DMD2, Yin et al. 2024, arXiv 2405.14867; for all points of the grid: TDM, Luo et al. 2025,
arXiv 2503.06674). x + (1 - t) v(x, t) is the sample that a critic compares with the data; at the last
point of the grid it is the sample of all steps. Beside that the pairs' own loss at the same t keeps
each noise where the teacher carried it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmatch.flow import noise, path
from flowmatch.flow.losses import Loss
from flowmatch.models.velocity import Condition, Velocity
from flowmatch.runs import parts
from flowmatch.training.draw import Drawn
from flowmatch.training.learner import Learner

Place = tuple[float, ...]  # a point of a grid: its time, after those that lead there from 0


def places(grids: Sequence[Sequence[float]]) -> list[Place]:
    """List the points of some grids, without their ends; those at t = 0 are one.

    Args:
        grids: Times of N Euler steps each, [N + 1], from 0 to 1.
    """
    return list(dict.fromkeys(tuple(grid[: k + 1]) for grid in grids for k in range(len(grid) - 1)))


def place_of(grids: Sequence[Sequence[float]], seed: int, step: int) -> Place:
    """Draw the point of an update: the grid uniform among those given, half of the points its last.

    The sample at the last point is the one that the user sees; the other half is uniform.
    """
    rng = noise.generator(seed, step, noise.FINISH_GRID)
    grid = grids[int(rng.integers(len(grids)))]
    last, drawn = rng.integers(2), rng.integers(len(grid) - 1)
    return tuple(grid[: len(grid) - 1 if last else int(drawn) + 1])


@torch.no_grad()
def state_at(v: Velocity, x: Tensor, place: Place, cond: Condition | None) -> Tensor:
    """Lead noise to a point of a grid by Euler steps of the network. x: [B, ...] -> [B, ...]."""
    for t, after in pairwise(place):
        x = x + (after - t) * v(x, t, cond)
    return x


class Critic(Protocol):
    """Compares samples of the network with the data; what it learns is in each checkpoint."""

    noises: int  # that it needs of a sample, beside that which becomes the sample

    def begin(
        self, accelerator: Any, plain: Velocity, where: list[Place], saved: dict[str, Tensor]
    ) -> None:
        """Begin with the points of the grids, or go on from a checkpoint; collective."""

    def errors(self, x: Tensor, seen: "Seen", index: int) -> Tensor:
        """Return the errors of samples [B, ...] of a micro-batch, [B]."""

    def learn(self, place: Place) -> Tensor | None:
        """Learn from the micro-batches of an update, as `Learner.learn`; collective."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""


@dataclass(frozen=True)
class Seen:
    """What a critic sees beside samples.

    Attributes:
        place: The point of a grid at which they were made.
        noise: Standard normal, independent of them, [B, noises, ...].
        u: Uniform numbers in [0, 1), [B].
        cond: Conditions of the network, or None.
    """

    place: Place
    noise: Tensor
    u: Tensor
    cond: Condition | None


class Sum(Critic):
    """Critics whose weighed errors are added. weighed: a weight and a critic each."""

    def __init__(self, weighed: Sequence[tuple[float, Critic]]):
        self.weighed = list(weighed)
        self.noises = max(critic.noises for _, critic in self.weighed)

    def begin(
        self, accelerator: Any, plain: Velocity, where: list[Place], saved: dict[str, Tensor]
    ) -> None:
        """As in `Critic`."""
        for number, (_, critic) in enumerate(self.weighed):
            start = f"{number}/"
            own = {k.removeprefix(start): t for k, t in saved.items() if k.startswith(start)}
            critic.begin(accelerator, plain, where, own)

    def errors(self, x: Tensor, seen: Seen, index: int) -> Tensor:
        """As in `Critic`."""
        found = [weight * critic.errors(x, seen, index) for weight, critic in self.weighed]
        return torch.stack(found).sum(0)

    def learn(self, place: Place) -> Tensor | None:
        """As in `Critic`."""
        told = [critic.learn(place) for _, critic in self.weighed]
        finite = [each for each in told if each is not None]
        return torch.stack(finite).all() if finite else None

    def tensors(self) -> dict[str, Tensor]:
        """As in `Critic`."""
        return {
            f"{number}/{name}": tensor
            for number, (_, critic) in enumerate(self.weighed)
            for name, tensor in critic.tensors().items()
        }


class Finish(Learner):
    """The objective of a finish.

    Args:
        grids: Times of each number of Euler steps that the network is for, from 0 to 1.
        critic: Compares samples with data.
        anchor: Weight of the pairs' loss.
        loss: Of the pairs.
        seed: Of the points of the grids.
    """

    def __init__(
        self,
        grids: Sequence[Sequence[float]],
        critic: Critic,
        anchor: float,
        loss: Loss,
        seed: int,
    ):
        self.grids, self.critic, self.anchor = grids, critic, anchor
        self.loss, self.seed, self.noises = loss, seed, 1 + critic.noises
        self.both: dict[int, Tensor] = {}  # mean errors of the micro-batches of an update

    def begin(self, accelerator: Any, plain: Velocity, saved: dict[str, Any] | None) -> None:
        """As in `Learner`."""
        self.accelerator, self.plain = accelerator, plain
        device = accelerator.device
        whole = {name: parts.whole(tensor) for name, tensor in (saved or {}).items()}
        # sums of both errors, and the number of updates
        self.sums = whole.pop("sums", torch.zeros(3, dtype=torch.float64)).to(device)
        torch.manual_seed(self.seed)  # of dropout
        self.critic.begin(accelerator, plain, places(self.grids), whole)

    def errors(
        self, v: Velocity, batch: Drawn, cond: Condition | None, step: int, index: int
    ) -> Tensor:
        """As in `Learner`."""
        assert batch.fresh is not None
        place = place_of(self.grids, self.seed, step)
        x = state_at(self.plain, batch.fresh[:, 0], place, cond)
        t = torch.full_like(batch.t, place[-1])
        if self.anchor:  # one pass for both, as DDP asks for it
            twice = None if cond is None else {key: torch.cat([c, c]) for key, c in cond.items()}
            line = path.interpolate(batch.x0, batch.x1, t)
            own, paired = v(torch.cat([x, line]), torch.cat([t, t]), twice).split(len(x))
            apart = self.loss(paired, line, batch.x0, batch.x1, t, u=batch.u)
        else:
            own = v(x, t, cond)
            apart = torch.zeros_like(t)
        seen = Seen(place, batch.fresh[:, 1:], batch.u, cond)
        found = self.critic.errors(path.data_prediction(x, own, t), seen, index)
        self.both[index] = torch.stack([found.detach().mean(), apart.detach().mean()])
        return found + self.anchor * apart

    def learn(self, step: int) -> Tensor | None:
        """As in `Learner`."""
        both = torch.stack(list(self.both.values())).mean(0).double()
        self.sums[:2] += self.accelerator.reduce(both, "mean")
        self.sums[2] += 1
        return self.critic.learn(place_of(self.grids, self.seed, step))

    def read(self) -> dict[str, float]:
        """As in `Learner`."""
        own, apart = (self.sums[:2] / self.sums[2].clamp(min=1)).tolist()
        self.sums.zero_()
        return {"distribution_loss": own, "pair_loss": apart}

    def tensors(self) -> dict[str, Tensor]:
        """As in `Learner`."""
        return {"sums": self.sums} | self.critic.tensors()
