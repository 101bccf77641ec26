"""A finish: the network learns from samples that it makes while it trains, with pairs as its anchor.

An update is for one number N of Euler steps and one point t = k / N of their grid, both drawn from the
seed and the step. The network's own steps lead fresh noise to the state x there, without a gradient
(backward simulation: DMD2, Yin et al. 2024, arXiv 2405.14867; for all points of the grid: TDM, Luo
et al. 2025, arXiv 2503.06674). x + (1 - t) v(x, t) is the sample that a critic compares with the data;
at the last point of the grid it is the sample of N steps. Beside that the pairs' own loss at t = 0
keeps each noise where the teacher carried it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowmatch.flow import noise, path
from flowmatch.flow.losses import Loss
from flowmatch.models.velocity import Condition, Velocity
from flowmatch.runs import parts
from flowmatch.training.draw import Drawn
from flowmatch.training.learner import Learner

Place = tuple[int, int]  # (N, k): the point t = k / N of N steps
START = (1, 0)  # of any number of steps
Samples = Iterable[dict[str, Any]]  # batches with x1, and where they are pairs x0 and perhaps label


class Matcher(Protocol):
    """Compares generated features with a target's: `flow.moments`, `flow.energy`."""

    def fresh(self) -> Any: ...
    def errors(self, f: Tensor) -> Tensor: ...
    def fill(self, f: Tensor) -> None: ...
    def add(self, f: Tensor) -> None: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def restore(self, saved: dict[str, Tensor]) -> None: ...


def places(for_steps: Sequence[int]) -> list[Place]:
    """List the points of the grids of some numbers of steps; those at t = 0 are one."""
    return [START, *((n, k) for n in for_steps for k in range(1, n))]


def place_of(for_steps: Sequence[int], seed: int, step: int) -> Place:
    """Draw the point of an update: N uniform among the numbers of steps, k uniform among 0 to N - 1."""
    rng = noise.generator(seed, step, noise.FINISH_GRID)
    n = for_steps[int(rng.integers(len(for_steps)))]
    k = int(rng.integers(n))
    return (n, k) if k else START


@torch.no_grad()
def state_at(v: Velocity, x: Tensor, place: Place, cond: Condition | None) -> Tensor:
    """Lead noise to a point of a grid by Euler steps of the network. x: [B, ...] -> [B, ...]."""
    n, k = place
    for i in range(k):
        x = x + v(x, i / n, cond) / n
    return x


class Features:
    """Matches features of samples with those of data, for each point of the grids by itself.

    Args:
        modules: Name -> frozen module, x [B, ...] -> features [B, ...], in eval mode on the device.
        make: Builds a matcher from the features of the data, a part at a time.
        data: Yields batches with x1 anew at each call.
        pairs: Likewise, with x0 and perhaps label: the first samples are made from their noise.
        count: Samples at each point that it begins with.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        make: Callable[[Iterable[Tensor]], Matcher],
        data: Callable[[], Samples],
        pairs: Callable[[], Samples],
        count: int,
    ):
        self.modules, self.make, self.data, self.pairs = modules, make, data, pairs
        self.count = count
        self.cells: dict[Place, dict[str, Matcher]] = {}
        self.widths: list[int] = []

    @torch.no_grad()
    def begin(
        self, device: torch.device, plain: Velocity, where: list[Place], saved: dict[str, Tensor]
    ) -> None:
        """Read the data; make the first samples, or go on from a checkpoint."""
        targets = {}
        for name, module in self.modules.items():
            found = (module(batch["x1"].to(device)).flatten(1) for batch in self.data())
            targets[name] = self.make(found)
        self.cells = {place: {n: t.fresh() for n, t in targets.items()} for place in where}
        for place, cell in self.cells.items():
            made = [] if saved else self._samples(device, plain, place)
            for name, matcher in cell.items():
                if not saved:
                    matcher.fill(torch.cat([self.modules[name](x).flatten(1) for x in made]))
                    continue
                start = f"{_key(place)}/{name}/"
                own = {k.removeprefix(start): v for k, v in saved.items() if k.startswith(start)}
                matcher.restore(own)

    def _samples(self, device: torch.device, plain: Velocity, place: Place) -> list[Tensor]:
        made: list[Tensor] = []
        n, k = place
        for batch in self.pairs():
            cond = {"label": batch["label"].to(device)} if "label" in batch else None
            x = state_at(plain, batch["x0"].to(device), place, cond)
            made.append(path.data_prediction(x, plain(x, k / n, cond), k / n))
            if sum(map(len, made)) >= self.count:
                break
        return made

    def errors(self, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Return the errors of samples, [B], and what `learn` needs of them, [B, W]."""
        total, found = x.new_zeros(len(x)), []
        for name, matcher in self.cells[place].items():
            f = self.modules[name](x).flatten(1)
            total = total + matcher.errors(f)
            found.append(f.detach())
        self.widths = [f.shape[1] for f in found]
        return total / len(found), torch.cat(found, 1)

    def learn(self, rows: Tensor, place: Place) -> None:
        """Count the samples of an update: what `errors` returned for them, [B, W]."""
        cell = self.cells[place]
        for matcher, f in zip(cell.values(), rows.split(self.widths, 1), strict=True):
            matcher.add(f)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {
            f"{_key(place)}/{name}/{part}": tensor
            for place, cell in self.cells.items()
            for name, matcher in cell.items()
            for part, tensor in matcher.tensors().items()
        }


class Finish(Learner):
    """The objective of a finish.

    Args:
        for_steps: Numbers of Euler steps that the network is for.
        critic: Compares samples with data.
        anchor: Weight of the pairs' loss at t = 0.
        loss: Of the pairs.
        seed: Of the points of the grids.
    """

    def __init__(
        self, for_steps: Sequence[int], critic: Features, anchor: float, loss: Loss, seed: int
    ):
        self.for_steps, self.critic, self.anchor = for_steps, critic, anchor
        self.loss, self.seed = loss, seed
        self.rows: dict[int, Tensor] = {}  # of the micro-batches of an update

    def begin(self, accelerator: Any, plain: Velocity, saved: dict[str, Any] | None) -> None:
        """As in `Learner`."""
        self.accelerator, self.plain = accelerator, plain
        device = accelerator.device
        whole = {name: parts.whole(tensor) for name, tensor in (saved or {}).items()}
        # sums of both errors, and the number of updates
        self.sums = whole.pop("sums", torch.zeros(3, dtype=torch.float64)).to(device)
        torch.manual_seed(self.seed)  # of dropout
        self.critic.begin(device, plain, places(self.for_steps), whole)

    def errors(
        self, v: Velocity, batch: Drawn, cond: Condition | None, step: int, index: int
    ) -> Tensor:
        """As in `Learner`."""
        assert batch.fresh is not None
        place = place_of(self.for_steps, self.seed, step)
        n, k = place
        x = state_at(self.plain, batch.fresh, place, cond)
        t = torch.full_like(batch.t, k / n)
        if self.anchor:  # one pass for both, as DDP asks for it
            twice = None if cond is None else {key: torch.cat([c, c]) for key, c in cond.items()}
            both = v(torch.cat([x, batch.x0]), torch.cat([t, batch.t]), twice)
            own, paired = both.split(len(x))
            apart = self.loss(paired, batch.x0, batch.x0, batch.x1, batch.t)
        else:
            own = v(x, t, cond)
            apart = torch.zeros_like(t)
        found, rows = self.critic.errors(path.data_prediction(x, own, t), place)
        self.rows[index] = torch.cat([found.detach()[:, None], apart.detach()[:, None], rows], 1)
        return found + self.anchor * apart

    def learn(self, step: int) -> Tensor | None:
        """As in `Learner`."""
        # in the order of the global batch, for any number of processes
        whole = [self.accelerator.gather(self.rows[index]) for index in sorted(self.rows)]
        rows = torch.cat(whole)
        self.sums += torch.cat([rows[:, :2].double().mean(0), rows.new_ones(1)])
        self.critic.learn(rows[:, 2:], place_of(self.for_steps, self.seed, step))
        return None

    def read(self) -> dict[str, float]:
        """As in `Learner`."""
        own, apart = (self.sums[:2] / self.sums[2].clamp(min=1)).tolist()
        self.sums.zero_()
        return {"distribution_loss": own, "pair_loss": apart}

    def tensors(self) -> dict[str, Tensor]:
        """As in `Learner`."""
        return {"sums": self.sums} | self.critic.tensors()


def _key(place: Place) -> str:
    return "{}_{}".format(*place)
