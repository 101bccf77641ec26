"""ODE solvers for dx/dt = v(x, t): plain functions over a velocity and a time grid.

The state is never half precision: it keeps the dtype of x (float32, or float64 on request); what
autocast does stays inside v. A grid of N steps has N + 1 points, so N = 1 does one step. A falling
grid integrates backward, data to noise. Hairer, Norsett, Wanner, Solving Ordinary Differential
Equations I: II.1 (Runge-Kutta), III.5 (Adams with variable steps), II.5 (Dormand-Prince).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow import grids
from flowmatch.flow.config import FIXED, SolverConfig, check_times

VelocityField = Callable[[Tensor, float], Tensor]  # v(x: [B, ...], t) -> [B, ...]
Step = Callable[[VelocityField, Tensor, float, float], Tensor]  # one step of x from t to s


def euler(v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
    """First order, one evaluation: x + (s - t) v(x, t)."""
    return x + (s - t) * v(x, t)


def midpoint(v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
    """Second order, two evaluations: the slope half way, where half an Euler step leads."""
    middle = x + 0.5 * (s - t) * v(x, t)
    return x + (s - t) * v(middle, 0.5 * (t + s))


def heun(v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
    """Second order, two evaluations: the mean of the slopes at both ends of an Euler step."""
    slope = v(x, t)
    return x + 0.5 * (s - t) * (slope + v(x + (s - t) * slope, s))


def rk4(v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
    """Fourth order, four evaluations: the classical Runge-Kutta method."""
    h, middle = s - t, 0.5 * (t + s)
    k1 = v(x, t)
    k2 = v(x + 0.5 * h * k1, middle)
    k3 = v(x + 0.5 * h * k2, middle)
    k4 = v(x + h * k3, s)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class AB2:
    """Adams-Bashforth 2: second order, one evaluation, for it looks back at the step before.

    It follows the line through the last two slopes, for steps of any lengths h (now) and g (before):
    x + h [(1 + h / 2g) v_n - (h / 2g) v_(n-1)]. The first step is Euler's, whose one error of order
    h^2 leaves the order at 2. A fresh object for each integration.
    """

    def __init__(self) -> None:
        self.before: tuple[Tensor, float] | None = None  # slope and length of the last step

    def __call__(self, v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
        """Step x from t to s; the step before must have ended at (x, t)."""
        slope, h = v(x, t), s - t
        last, self.before = self.before, (slope, h)
        if last is None:
            return x + h * slope
        back = h / (2 * last[1])
        return x + h * ((1 + back) * slope - back * last[0])


SOLVERS: dict[str, Step] = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}
MULTISTEP: dict[str, Callable[[], Step]] = {"ab2": AB2}  # each call makes one without history


def check_state(x: Tensor) -> None:
    """Raise UserError for a state in half precision, or in integers."""
    if x.dtype not in (torch.float32, torch.float64):
        raise UserError(f"the state is {x.dtype}; solvers keep it in float32 or float64")


def checked(v: VelocityField) -> VelocityField:
    """Wrap v to raise UserError where its shape is not that of x, which would else broadcast."""

    def same_shape(x: Tensor, t: float) -> Tensor:
        slope = v(x, t)
        if slope.shape != x.shape:
            raise UserError(
                f"the velocity of x {list(x.shape)} is {list(slope.shape)}; expected the same shape"
            )
        return slope

    return same_shape


def integrate(v: VelocityField, x: Tensor, grid: Tensor, solver: str = "euler") -> Tensor:
    """Carry x along v through the points of a grid.

    v(x, t): velocity at x [B, ...] and time t (a float). grid: [N + 1], strictly monotone in [0, 1];
    a falling one integrates backward. solver: one of FIXED. Returns x at grid[-1]. Raises UserError.
    """
    if solver not in FIXED:
        raise UserError(f"solver={solver!r}: expected one of {', '.join(FIXED)}")
    check_state(x)
    points = grid.tolist()
    check_times(points)
    step = SOLVERS[solver] if solver in SOLVERS else MULTISTEP[solver]()
    v = checked(v)
    for t, s in pairwise(points):
        x = step(v, x, t, s)
    return x


def jumps(u: Callable[..., Tensor], x: Tensor, grid: Tensor) -> Tensor:
    """Carry x through the points of a grid by average velocities: x_s = x_t + (s - t) u(x_t, t, s).

    u(x, t, s): the average velocity [B, ...] from t to s, floats. (MeanFlow, arXiv 2505.13447, eq. 12.)
    """
    check_state(x)
    for t, s in pairwise(grid.tolist()):
        x = x + (s - t) * u(x, t, s)
    return x


def dopri5(
    v: VelocityField,
    x: Tensor,
    start: float = 0.0,
    end: float = 1.0,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Tensor:
    """Carry x along v from start to end by Dormand-Prince 5(4), whose steps follow its error.

    The root mean square of the error over the whole batch x [B, ...] decides, so that a sample
    depends on its batch. v is called at times between start and end only; start > end integrates
    backward. rtol, atol: error allowed a step; in float32 below about 1e-6 is out of reach. Raises
    UserError for states or velocities that are not finite, and for a step that shrinks to nothing.
    """
    from torchdiffeq import odeint

    check_state(x)
    check_times([start, end])
    v, low, high = checked(v), min(start, end), max(start, end)

    def slope(t: Tensor, y: Tensor) -> Tensor:
        # the probe for the first step may reach past the end
        time = min(max(t.item(), low), high)
        out = v(y, time)
        if not (out.isfinite().all() and y.isfinite().all()):
            what = "velocity" if y.isfinite().all() else "state"
            raise UserError(
                f"dopri5: the {what} is not finite at t = {time:g}; look at the model there, or use a "
                "fixed-step solver"
            )
        return out

    times = torch.tensor([start, end], dtype=torch.float64, device=x.device)
    options: dict[str, Any] = {"step_t": times[1:], "dtype": torch.float64}
    try:
        return odeint(slope, x, times, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]
    except AssertionError as error:
        if not str(error).startswith("underflow in dt"):
            raise
        raise UserError(
            f"dopri5: the step shrank to nothing ({error}); the velocity is not smooth enough for "
            f"rtol={rtol:g}, atol={atol:g} in {x.dtype}"
        ) from None


def solve(
    v: VelocityField,
    x: Tensor,
    config: SolverConfig,
    span: tuple[float, float] = (0.0, 1.0),
    *,
    backward: bool = False,
) -> Tensor:
    """Carry x from noise to data, or backward from data to noise, as a config says.

    x: [B, ...], taken to the state's dtype; the answer keeps it. span: the times of noise and data,
    into which the config's grid is squeezed. Raises UserError like `integrate`.
    """
    x, (start, end) = x.to(getattr(torch, config.state)), span
    if config.name == "dopri5":
        times = (end, start) if backward else (start, end)
        return dopri5(v, x, *times, rtol=config.rtol, atol=config.atol)
    grid = grids.squeeze(grids.make(config, config.steps), span)
    return integrate(v, x, grid.flip(0) if backward else grid, config.name)
