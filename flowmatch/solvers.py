"""Fixed-step ODE solvers for dx/dt = v(x, t): plain functions over a velocity and a time grid.

The state is never half precision: it keeps the dtype of x (float32, or float64 on request); what
autocast does stays inside v. A grid of N steps has N + 1 points, so N = 1 does one step.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from flowmatch.config import UserError

VelocityField = Callable[[Tensor, float], Tensor]  # v(x: [B, ...], t) -> [B, ...]
Step = Callable[[VelocityField, Tensor, float, float], Tensor]  # one step of x from t to s


def euler(v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
    """First order, one evaluation: x + (s - t) v(x, t)."""
    return x + (s - t) * v(x, t)


def heun(v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
    """Second order, two evaluations: the mean of the slopes at both ends of an Euler step."""
    slope = v(x, t)
    return x + 0.5 * (s - t) * (slope + v(x + (s - t) * slope, s))


SOLVERS: dict[str, Step] = {"euler": euler, "heun": heun}
EVALUATIONS = {"euler": 1, "heun": 2}  # of v, a step


def uniform_grid(steps: int) -> Tensor:
    """Space N steps evenly from noise to data: [0, 1/N, ..., 1], float64 [N + 1]."""
    if steps < 1:
        raise UserError(f"steps={steps}: a sampler needs at least 1 step")
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def integrate(v: VelocityField, x: Tensor, grid: Tensor, solver: str = "euler") -> Tensor:
    """Carry x along v through the points of a grid.

    v(x, t): velocity at x [B, ...] and time t (a float). grid: [N + 1], strictly monotone in [0, 1];
    a falling one integrates backward. Returns x at grid[-1].
    """
    if solver not in SOLVERS:
        raise UserError(f"solver={solver!r}: expected one of {', '.join(SOLVERS)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise UserError(f"the state is {x.dtype}; solvers keep it in float32 or float64")
    points = grid.tolist()
    steps = [after - before for before, after in pairwise(points)]
    if not steps or not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
        raise UserError(f"grid={points}: expected at least two strictly monotone times")
    if min(points) < 0 or max(points) > 1:
        raise UserError(f"grid={points}: expected times in [0, 1]")
    step = SOLVERS[solver]
    for t, s in pairwise(points):
        x = step(v, x, t, s)
    return x
