"""A micro-batch, a pure function of the seed and the global counters of its samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.flow import noise, times
from flowmatch.flow.config import TimesConfig
from flowmatch.flow.coupling import Batch, Coupling

Stream = Callable[[np.ndarray], Batch]  # global sample counters [B] -> {"x1": ..., "label": ...}


@dataclass(frozen=True)
class Drawn:
    """A micro-batch, all that chance decides included. x0, x1: [B, ...]; t, w: [B]; label: [B]."""

    x0: Tensor
    x1: Tensor
    t: Tensor
    w: Tensor  # uniform in [0, 1), for the objective
    label: Tensor | None

    def to(self, device: torch.device) -> "Drawn":
        """Move to a device, through pinned memory where that is a GPU."""

        def move(x: Tensor | None) -> Any:
            if x is None or device.type == "cpu":
                return x
            return x.pin_memory().to(device, non_blocking=True)

        return Drawn(move(self.x0), move(self.x1), move(self.t), move(self.w), move(self.label))


def draw(
    stream: Stream,
    coupling: Coupling,
    t_config: TimesConfig,
    label_drop: float,
    null_label: int | None,
    seed: int,
    counters: np.ndarray,
) -> Drawn:
    """Make the samples of some global counters, step * batch_size + position: a pure function.

    Each sample has its own stream of random numbers: two uniforms (its time, its label drop), then
    its noise, then a uniform for the objective. counters: int64 [B].
    """
    rngs = [noise.generator(seed, int(counter), noise.TRAINING) for counter in counters]
    u = torch.from_numpy(np.stack([rng.random(2) for rng in rngs]))  # [B, 2], float64

    def normal(shape: tuple[int, ...]) -> Tensor:
        numbers = [rng.standard_normal(shape, dtype=np.float32) for rng in rngs]
        return torch.from_numpy(np.stack(numbers))

    batch = stream(counters)
    x0, x1 = coupling(batch, normal)
    label = None
    if null_label is not None:
        label = torch.where(u[:, 1] < label_drop, null_label, batch["label"])
    w = torch.tensor([rng.random(dtype=np.float32) for rng in rngs])
    return Drawn(x0, x1, times.sample(u[:, 0], t_config), w, label)


def mask_seed(seed: int, step: int, micro: int) -> int:
    """Seed the dropout masks of a micro-batch, so that no random state needs to be stored."""
    return int(np.random.SeedSequence([seed, step, micro]).generate_state(1)[0])
