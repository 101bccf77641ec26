"""ODE solvers for dx/dt = v(x, t): plain functions over a velocity and a time grid.

The state is never in half precision: it keeps the dtype of x (float32 or float64); autocast stays inside
v. A grid of N steps has N + 1 points. A falling grid integrates backward, from data to noise. Hairer,
Norsett, Wanner, Solving Ordinary Differential Equations I: II.1 (Runge-Kutta), III.5 (Adams with
variable steps), II.5 (Dormand-Prince).
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
Keep = dict[float, Any]  # times of a path -> None, then the states there, [B, ...]


def euler(v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
    """Take a step of first order, one evaluation: x + (s - t) v(x, t)."""
    return x + (s - t) * v(x, t)


def midpoint(v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
    """Take a step of second order, two evaluations: the slope where half an Euler step ends."""
    middle = x + 0.5 * (s - t) * v(x, t)
    return x + (s - t) * v(middle, 0.5 * (t + s))


def heun(v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
    """Take a step of second order, two evaluations: the mean slope of both ends of an Euler step."""
    slope = v(x, t)
    return x + 0.5 * (s - t) * (slope + v(x + (s - t) * slope, s))


def rk4(v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
    """Take a step of fourth order, four evaluations: the classical Runge-Kutta method."""
    h, middle = s - t, 0.5 * (t + s)
    k1 = v(x, t)
    k2 = v(x + 0.5 * h * k1, middle)
    k3 = v(x + 0.5 * h * k2, middle)
    k4 = v(x + h * k3, s)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class AB2:
    """Adams-Bashforth 2: steps of second order, one evaluation each, with the slope of the last step.

    It extrapolates the last two slopes, for steps of any lengths h (now) and g (before):
    x + h [(1 + h / 2g) v_n - (h / 2g) v_(n-1)]. The first step is Euler's, whose single error of order
    h^2 keeps the order at 2. Use one object for one integration.
    """

    def __init__(self) -> None:
        self.before: tuple[Tensor, float] | None = None  # slope and length of the last step

    def __call__(self, v: VelocityField, x: Tensor, t: float, s: float) -> Tensor:
        """Take a step of x from t to s; the last step must have ended at (x, t)."""
        slope, h = v(x, t), s - t
        last, self.before = self.before, (slope, h)
        if last is None:
            return x + h * slope
        back = h / (2 * last[1])
        return x + h * ((1 + back) * slope - back * last[0])


SOLVERS: dict[str, Step] = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}
MULTISTEP: dict[str, Callable[[], Step]] = {"ab2": AB2}  # a new one for each integration


def check_state(x: Tensor) -> None:
    """Check that a state is in float32 or float64.

    Raises:
        UserError: It is not.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise UserError(f"the state is {x.dtype}; solvers keep it in float32 or float64")


def checked(v: VelocityField) -> VelocityField:
    """Wrap v to raise UserError where its shape differs from x, which would broadcast silently."""

    def same_shape(x: Tensor, t: float) -> Tensor:
        slope = v(x, t)
        if slope.shape != x.shape:
            raise UserError(
                f"the velocity of x {list(x.shape)} is {list(slope.shape)}; expected the same shape"
            )
        return slope

    return same_shape


def integrate(
    v: VelocityField, x: Tensor, grid: Tensor, solver: str = "euler", keep: Keep | None = None
) -> Tensor:
    """Carry x along v through the times of a grid.

    Args:
        v: Velocity v(x, t) at x [B, ...] and a time t, a float.
        x: State at grid[0], [B, ...], float32 or float64.
        grid: Strictly monotone times in [0, 1], [N + 1]; a falling grid integrates backward.
        solver: "euler", "midpoint", "heun", "rk4" or "ab2".
        keep: Gets the states at those of its times that are times of the grid.

    Returns:
        State at grid[-1], [B, ...].

    Raises:
        UserError: Solver, grid or dtype is not one of these, or v has another shape than x.
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
        if keep is not None and s in keep:
            keep[s] = x
    return x


def jumps(u: Callable[..., Tensor], x: Tensor, grid: Tensor, keep: Keep | None = None) -> Tensor:
    """Carry x through the times of a grid with average velocities: x_s = x_t + (s - t) u(x_t, t, s).

    This is how a MeanFlow network is sampled (arXiv 2505.13447, eq. 12).

    Args:
        u: Average velocity u(x, t, s) from t to s, floats, [B, ...].
        x: State at grid[0], [B, ...], float32 or float64.
        grid: Times in [0, 1], [N + 1].
        keep: As in `integrate`.

    Returns:
        State at grid[-1], [B, ...].

    Raises:
        UserError: The state has another dtype.
    """
    check_state(x)
    for t, s in pairwise(grid.tolist()):
        x = x + (s - t) * u(x, t, s)
        if keep is not None and s in keep:
            keep[s] = x
    return x


def dopri5(
    v: VelocityField,
    x: Tensor,
    start: float = 0.0,
    end: float = 1.0,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    keep: Keep | None = None,
) -> Tensor:
    """Carry x along v from start to end with Dormand-Prince 5(4), which chooses its own steps.

    The steps follow the root mean square error of the whole batch, so that a sample depends on its
    batch. v is called at times between start and end only.

    Args:
        v: Velocity v(x, t) at x [B, ...] and a time t, a float.
        x: State at start, [B, ...], float32 or float64.
        start: First time, in [0, 1].
        end: Last time, in [0, 1]; less than start to integrate backward.
        rtol: Allowed error of a step, relative to the state; float32 does not reach less than about
            1e-6.
        atol: Allowed error of a step.
        keep: Gets the states at its times, interpolated to fourth order: the steps stay the same.

    Returns:
        State at end, [B, ...].

    Raises:
        UserError: A state or velocity is not finite, or a step shrinks to nothing.
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
                f"dopri5: the {what} is not finite at t = {time:g}; check the model at that time, or "
                "use a fixed-step solver"
            )
        return out

    between = sorted(keep or {}, reverse=end < start)
    times = torch.tensor([start, *between, end], dtype=torch.float64, device=x.device)
    options: dict[str, Any] = {"step_t": times[-1:], "dtype": torch.float64}
    try:
        path = odeint(slope, x, times, rtol=rtol, atol=atol, method="dopri5", options=options)
        if keep is not None:
            keep.update(zip(between, path[1:-1], strict=True))
        return path[-1]
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
    keep: Keep | None = None,
) -> Tensor:
    """Carry x from noise to data, or from data to noise, with the solver of a config.

    Args:
        v: Velocity v(x, t) at x [B, ...] and a time t, a float.
        x: State, [B, ...]; it is converted to the config's dtype.
        config: The solver and its steps.
        span: The times of noise and data, into which the grid is squeezed.
        backward: From data to noise.
        keep: As in `integrate` and `dopri5`; `times_of` lists the times of a grid.

    Returns:
        State at the other end, [B, ...], in the config's dtype.

    Raises:
        UserError: As in `integrate` and `dopri5`.
    """
    x, (start, end) = x.to(getattr(torch, config.state)), span
    if config.name == "dopri5":
        times = (end, start) if backward else (start, end)
        return dopri5(v, x, *times, rtol=config.rtol, atol=config.atol, keep=keep)
    grid = grids.squeeze(grids.make(config, config.steps), span)
    return integrate(v, x, grid.flip(0) if backward else grid, config.name, keep)


def times_of(config: SolverConfig, span: tuple[float, float] = (0.0, 1.0)) -> list[float]:
    """List the times between noise and data at which the solver of a config, not dopri5, has states."""
    return grids.squeeze(grids.make(config, config.steps), span).tolist()[1:-1]
