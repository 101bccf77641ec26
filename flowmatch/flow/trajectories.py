"""Objectives on trajectories: lines that begin along a teacher's path, from its stored states.

States X_0 = x0, X_1, .., X_K, X_{K+1} = x1 of a path at times s_0 = 0 < s_1 < .. < s_{K+1} = 1 make it a
polyline, and x_t is a point of it. In the window [s_k, s_{k+1}] around t the velocity to learn is

- segments: (X_{k+1} - X_k) / (s_{k+1} - s_k), so that K + 1 Euler steps on these times end at x1
  (PeRFlow, Yan et al. 2024, arXiv 2405.07510);
- cmt: (x1 - x_t) / (1 - t), so that one step from any point of the path ends at x1 (consistency
  mid-training, Hu et al. 2025, arXiv 2509.24526, as a velocity).

Either is the velocity of a straight line through x_t. The ends of that line take the place of x0 and x1
in the training loop, whose path, losses and precision stay as they are.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowmatch.config import UserError, step_words
from flowmatch.flow.config import ObjectiveConfig
from flowmatch.flow.path import expand

EQUAL = 1e-6  # slack of the times of equal windows


class Lines:
    """Turns pairs with states into the ends of the lines that a network learns.

    Args:
        times: Of the states, K rising numbers in (0, 1).
        to_end: Whether the lines lead from the path to x1 (cmt), or to the end of a window (segments).
    """

    def __init__(self, times: Sequence[float], to_end: bool):
        self.knots, self.to_end = torch.tensor([0.0, *times, 1.0]), to_end

    @property
    def starts(self) -> tuple[float, ...]:
        """Times of a sampler with the fewest steps, on which the share `times.zero` falls."""
        return (0.0,) if self.to_end else tuple(self.knots[:-1].tolist())

    @property
    def windows(self) -> int | None:
        """Euler steps that the network is for; None where it is for any number."""
        return None if self.to_end else len(self.knots) - 1

    @property
    def told(self) -> list[str]:
        """What a plan says of them."""
        inner = ", ".join(f"{t:.3g}" for t in self.knots[1:-1].tolist())
        if self.to_end:
            return [f"from paths with states at t = {inner} straight to their ends"]
        return [
            f"straight between states at t = 0, {inner}, 1: for {self.windows} steps, or a multiple"
        ]

    def __call__(self, x0: Tensor, states: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends a, b of each line: (1 - t) a + t b = x_t, and b - a is the velocity to learn.

        Args:
            x0: Noise, [B, ...].
            states: Of the paths, [B, K, ...].
            x1: Data, [B, ...].
            t: Times in [0, 1], [B].
        """
        points, knots = torch.cat([x0[:, None], states, x1[:, None]], 1), self.knots.to(t)
        last = len(knots) - 2
        k = (torch.searchsorted(knots, t, right=True) - 1).clamp(max=last)
        row = torch.arange(len(t), device=t.device)
        start, end = points[row, k], points[row, k + 1]
        v = (end - start) / expand(knots[k + 1] - knots[k], x0)
        x = start + expand(t - knots[k], x0) * v
        if self.to_end:  # in the last window v leads to x1, also at t = 1
            rest = x1 - end + expand(knots[k + 1] - t, x0) * v
            v = torch.where(expand(k == last, x0).bool(), v, rest / expand(1 - t, x0))
        return x - expand(t, x0) * v, x + expand(1 - t, x0) * v


def build(
    config: ObjectiveConfig,
    times: Mapping[str, Sequence[float]],
    for_steps: Sequence[int] = (),
) -> Lines | None:
    """Build the lines of an objective.

    Args:
        config: The objective.
        times: Of the states of each set of pairs; its key is how an error calls the set.
        for_steps: Numbers of Euler steps at whose times alone the network is trained.

    Returns:
        The lines; None for an objective that uses no states.

    Raises:
        UserError: The sets have states at other times, or the windows of `segments` are not equal, or
            hold no whole number of steps.
    """
    if not config.on_states:
        return None
    (first, known), *others = times.items()
    for name, other in others:
        if list(other) != list(known):
            raise UserError(
                f"{name} has states at {list(other)}, {first} at {list(known)}; objective.name="
                f"{config.name} needs the same times in all sets"
            )
    n = len(known) + 1
    equal = [k / n for k in range(1, n)]
    uneven = max(abs(t - wanted) for t, wanted in zip(known, equal, strict=True)) > EQUAL
    if config.name == "segments" and uneven:
        raise UserError(
            f"{first} has states at {list(known)}: objective.name=segments is for {n} equal steps of a "
            f"sampler; make pairs with states={[float(f'{t:.3g}') for t in equal]}"
        )
    if config.name == "segments" and (other := [steps for steps in for_steps if steps % n]):
        raise UserError(
            f"for_steps={list(for_steps)}: objective.name=segments is straight in each of {n} windows, "
            f"which {step_words(other)} do not fit; use multiples of {n}"
        )
    return Lines(known, config.name == "cmt")
