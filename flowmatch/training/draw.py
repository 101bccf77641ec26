"""A micro-batch, a pure function of the seed and the global counters of its samples."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.flow import noise, times
from flowmatch.flow.coupling import Batch, Coupling
from flowmatch.flow.trajectories import Lines

Stream = Callable[[np.ndarray], Batch]  # global sample counters [B] -> {"x1": ..., "label": ...}


@dataclass(frozen=True)
class Drawn:
    """A micro-batch and all of its random numbers."""

    x0: Tensor  # noise, [B, ...]
    x1: Tensor  # data, [B, ...]
    t: Tensor  # times in [0, 1], [B]
    u: Tensor  # uniform numbers in [0, 1) for the objective, [B]
    label: Tensor | None  # int64 [B]
    fresh: Tensor | None = None  # noises of a stream of its own, [B, K, ...]

    def to(self, device: torch.device) -> "Drawn":
        """Copy to a device, through pinned memory where that is one of CUDA."""

        def move(x: Tensor | None) -> Any:
            if x is None or device.type == "cpu":
                return x
            if device.type != "cuda":
                return x.to(device)
            return x.pin_memory().to(device, non_blocking=True)

        values = (self.x0, self.x1, self.t, self.u, self.label, self.fresh)
        return Drawn(*(move(x) for x in values))


def draw(
    stream: Stream,
    coupling: Coupling,
    t_config: times.Times,
    label_drop: float,
    null_label: int | None,
    seed: int,
    counters: np.ndarray,
    lines: Lines | None = None,
    fresh: int = 0,
) -> Drawn:
    """Draw the samples of some global counters: a pure function.

    Each sample has its own random numbers: two uniforms (for its time and its label drop), its noise,
    and a uniform for the objective.

    Args:
        stream: Returns the data of some counters.
        coupling: Pairs noise with data.
        t_config: Density of the times, or the grids that they are from.
        label_drop: Share of labels that become the null label.
        null_label: The null label, or None for a network without labels.
        seed: Seed of the run.
        counters: step * batch_size + position in the global batch, int64 [B].
        lines: Makes other ends x0, x1 of the pairs and their states, for an objective on trajectories.
        fresh: Number K of further noises of a sample, from a stream of their own.

    Returns:
        The samples, on the CPU.
    """
    rngs = [noise.generator(seed, int(counter), noise.TRAINING) for counter in counters]
    u = torch.from_numpy(np.stack([rng.random(2) for rng in rngs]))  # [B, 2], float64

    def normal(shape: tuple[int, ...]) -> Tensor:
        numbers = [rng.standard_normal(shape, dtype=np.float32) for rng in rngs]
        return torch.from_numpy(np.stack(numbers))

    batch = stream(counters)
    x0, x1 = coupling(batch, normal)
    t = times.sample(u[:, 0], t_config, lines.starts if lines else (0.0,))
    if lines is not None:
        x0, x1 = lines(x0, batch["xt"], x1, t)
    label = None
    if null_label is not None:
        label = torch.where(u[:, 1] < label_drop, null_label, batch["label"])
    last = torch.tensor([rng.random(dtype=np.float32) for rng in rngs])
    own = None
    if fresh:
        own = torch.from_numpy(noise.normal(seed, counters, (fresh, *x1.shape[1:]), noise.FINISH))
    return Drawn(x0, x1, t, last, label, own)


def mask_seed(seed: int, step: int, micro: int) -> int:
    """Return the seed of a micro-batch's dropout masks, so that no random state needs to be stored."""
    return int(np.random.SeedSequence([seed, step, micro]).generate_state(1)[0])


class Ahead:
    """The micro-batches of a run in order, each drawn by a thread while the one before it is used.

    Args:
        make: Returns a micro-batch by its number.
        first: Number of the first micro-batch that is asked for.
    """

    def __init__(self, make: Callable[[int], Drawn], first: int):
        self.make = make
        self.pool = ThreadPoolExecutor(1, "batches")
        self.waited = 0.0  # seconds that `take` and `peek` have waited
        self.number = first
        self.future: Future[Drawn] = self.pool.submit(make, first)

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def peek(self) -> Drawn:
        """Return the next micro-batch, which `take` returns again."""
        began = time.perf_counter()
        drawn = self.future.result()
        self.waited += time.perf_counter() - began
        return drawn

    def take(self) -> Drawn:
        """Return the next micro-batch and begin to draw the one after it."""
        drawn = self.peek()
        self.go_to(self.number + 1)
        return drawn

    def go_to(self, number: int) -> None:
        """Make a number the next one."""
        self.number, self.future = number, self.pool.submit(self.make, number)
