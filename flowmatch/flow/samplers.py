"""Stochastic and few-step samplers of a velocity: noise to data, with fresh noise on the way.

Two families have the marginals of the flow in the limit of short steps:

- the SDE dx = [v + w^2 s / 2] dt + w dW for any w_t >= 0, s the score (stochastic interpolants, Albergo
  et al. 2023, arXiv 2303.08797), by Euler-Maruyama;
- the generalised step t -> t': x' = t' D + (1 - t') [rho N + sqrt(1 - rho^2) z], D and N the data and
  noise predictions: DDIM with eta (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16), DDPM's ancestral
  steps (rho = r = t (1 - t') / (t' (1 - t))), and two rules without that limit: re-noising (rho = 0),
  and the anchored rule, which uses the initial noise as N (2-rectified flow++, arXiv 2405.20320).

The k-th draw of fresh noise for sample i is a function of (seed, i, k), so that a sample does not depend
on its batch. All but the anchored rule need the score, which follows from the velocity only where noise
and data are independent, before reflow (`check`).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow import grids, noise, path, solvers
from flowmatch.flow.config import EVALUATIONS, SamplerConfig, check_times
from flowmatch.flow.solvers import VelocityField

Draw = Callable[[Tensor], Tensor]  # x: [B, ...] -> fresh standard normal noise like x

STOCHASTIC = ("sde", "ddim", "ddpm")


class FreshNoise:
    """Standard normal noise whose k-th draw for sample i is a function of (seed, i, k) alone.

    Use one object for one integration; called with x [B, ...], it returns noise like x, drawn on the CPU
    in float32.

    Args:
        seed: Seed of the noise.
        ids: A number for each sample of the batch, [B].

    Raises:
        UserError: x has another batch size.
    """

    def __init__(self, seed: int, ids: Sequence[int] | np.ndarray):
        self.rngs = [noise.generator(seed, int(i), noise.SAMPLER) for i in ids]

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) != len(self.rngs):
            raise UserError(f"x has {len(x)} samples; the noise is for {len(self.rngs)}")
        shape = tuple(x.shape[1:])
        drawn = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in self.rngs])
        return torch.from_numpy(drawn).to(x)


def sqrt_diffusion(c: float = 1.0) -> Callable[[float], float]:
    """Return w^2(t) = 2 c (1 - t): its drift (1 + c t) v - c x has no singularity at either end."""
    return lambda t: 2 * c * (1 - t)


def sde(
    v: VelocityField,
    x: Tensor,
    grid: Tensor,
    draw: Draw,
    w2: Callable[[float], float] | None = None,
) -> Tensor:
    """Follow dx = [v + w^2 (t v - x) / (2 (1 - t))] dt + w dW with Euler-Maruyama.

    The last step has w = 0: the drift must not remove noise that is not added, or the samples are too
    narrow. The score term multiplies the noise in x by 1 - w^2 h / (2 (1 - t)^2), which diverges where
    the quotient exceeds 2, as with a constant w close to t = 1.

    Args:
        v: Velocity field v(x, t).
        x: State at grid[0], [B, ...].
        grid: Rising times in [0, 1], [N + 1].
        draw: Returns fresh standard normal noise like its argument.
        w2: w^2(t) >= 0; None is 2 (1 - t).

    Returns:
        State at grid[-1], [B, ...].

    Raises:
        UserError: w^2 is not finite, such as DDPM's 2 (1 - t) / t at t = 0, or a step is too long.
    """
    w2 = w2 or sqrt_diffusion()
    v, points = _begin(v, x, grid)
    for t, s in pairwise(points):
        h = s - t
        strength = w2(t) if s != points[-1] else 0.0
        if not (math.isfinite(strength) and strength >= 0):
            raise UserError(f"w^2 is {strength:g} at t = {t:g}; expected a finite number >= 0")
        pull = strength * h / (2 * (1 - t) ** 2)
        if pull > 2 + 1e-9:
            raise UserError(
                f"w^2 h / (2 (1 - t)^2) is {pull:.3g} at t = {t:g}, h = {h:.3g}; beyond 2 the step is "
                "unstable: take shorter steps there, stop before t = 1, or a w that falls to 0"
            )
        slope = v(x, t)
        drift = slope + strength / (2 * (1 - t)) * (t * slope - x)
        x = x + h * drift
        if s != points[-1]:
            x = x + math.sqrt(strength * h) * draw(x)
    return x


def step(x: Tensor, v: Tensor, t: float, s: float, rho: float, fresh: Tensor | None) -> Tensor:
    """Take the generalised step: x' = s D + (1 - s) [rho N + sqrt(1 - rho^2) z].

    It is computed as an Euler step plus the change of the noise, so that rho = 1 is Euler to the last
    bit.

    Args:
        x: State at t, [B, ...].
        v: Velocity at x and t, [B, ...].
        t: Time of x.
        s: Time to go to, more than t.
        rho: Share of the predicted noise that stays, in [0, 1].
        fresh: z, [B, ...], or None where it has no weight.

    Returns:
        State at s, [B, ...].
    """
    euler = x + (s - t) * v
    if fresh is None or rho == 1 or s == 1:
        return euler
    predicted = path.noise_prediction(x, v, t)
    return euler + (1 - s) * ((rho - 1) * predicted + math.sqrt(1 - rho**2) * fresh)


def ancestral(t: float, s: float) -> float:
    """Return the rho of DDPM's ancestral sampling, r = t (1 - s) / (s (1 - t)), for t < s."""
    return t * (1 - s) / (s * (1 - t))


def ddim(v: VelocityField, x: Tensor, grid: Tensor, draw: Draw, eta: float = 0.0) -> Tensor:
    """Sample with DDIM: rho = sqrt(1 - eta^2 (1 - r^2)); eta = 0 is Euler, eta = 1 is DDPM.

    Args:
        v: Velocity field v(x, t).
        x: Noise at grid[0], [B, ...].
        grid: Rising times in [0, 1], [N + 1].
        draw: Returns fresh standard normal noise like its argument.
        eta: Share of noise that is fresh, in [0, 1].

    Returns:
        State at grid[-1], [B, ...].

    Raises:
        UserError: eta or the grid is not in its range.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta}: expected a number in [0, 1]")
    return _generalised(
        v, x, grid, draw, lambda t, s: math.sqrt(1 - eta**2 * (1 - ancestral(t, s) ** 2))
    )


def ddpm(v: VelocityField, x: Tensor, grid: Tensor, draw: Draw) -> Tensor:
    """Sample with DDPM's ancestral steps (Ho et al. 2020, arXiv 2006.11239): rho = r; see `ddim`."""
    return _generalised(v, x, grid, draw, ancestral)


def renoise(v: VelocityField, x: Tensor, grid: Tensor, draw: Draw) -> Tensor:
    """Predict the data, add fresh noise, and repeat: rho = 0; see `ddim`.

    This is multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1), for a D
    that is a consistency map. On a velocity field it does NOT converge as the steps become short, and no
    config offers it.
    """
    return _generalised(v, x, grid, draw, lambda t, s: 0.0)


def anchored(v: VelocityField, x0: Tensor, grid: Tensor) -> Tensor:
    """Step along the line from the initial noise to the newest data prediction: x' = s D + (1 - s) x0.

    It helps where a flow is nearly straight, and does not converge on a curved one (2-rectified flow++,
    arXiv 2405.20320).

    Args:
        v: Velocity field v(x, t).
        x0: Noise, [B, ...].
        grid: Rising times from 0, [N + 1].

    Returns:
        State at grid[-1], [B, ...].

    Raises:
        UserError: The grid does not begin at 0, or is not in its range.
    """
    v, points = _begin(v, x0, grid)
    if points[0] != 0:
        raise UserError(
            f"grid={points}: the anchored rule starts from the noise; expected a grid from 0"
        )
    x = x0
    for t, s in pairwise(points):
        x = path.interpolate(x0, path.data_prediction(x, v(x, t), t), s)
    return x


def _generalised(
    v: VelocityField, x: Tensor, grid: Tensor, draw: Draw, rho: Callable[[float, float], float]
) -> Tensor:
    v, points = _begin(v, x, grid)
    for t, s in pairwise(points):
        slope, keep = v(x, t), rho(t, s)
        x = step(x, slope, t, s, keep, None if keep == 1 or s == 1 else draw(x))
    return x


def _begin(v: VelocityField, x: Tensor, grid: Tensor) -> tuple[VelocityField, list[float]]:
    """Check state and grid; return v with its shape checked, and the points."""
    solvers.check_state(x)
    points = grid.tolist()
    check_times(points)
    if points[0] > points[1]:
        raise UserError(f"grid={points}: samplers go from noise to data; expected a rising grid")
    return solvers.checked(v), points


def check(name: str, reflow_round: int, key: str) -> None:
    """Check that a sampler is valid for a model.

    Args:
        name: Name of a solver or sampler.
        reflow_round: 0 after training on an independent coupling, k after k reflows (`round` of a
            manifest).
        key: Name of the config's key, for the message.

    Raises:
        UserError: It is not.
    """
    if name in STOCHASTIC and reflow_round > 0:
        raise UserError(
            f"{key}={name}: the model is of reflow round {reflow_round}; after reflow, noise and data "
            "are not independent, and the score that this sampler needs does not follow from the "
            "velocity; use an ODE solver or anchored"
        )
    if name == "anchored" and reflow_round == 0:
        raise UserError(
            f"{key}=anchored: the model is of round 0, before reflow; its paths are curved, and the "
            "anchored rule does not converge on them; use an ODE solver, sde, ddim or ddpm"
        )


def describe(config: SamplerConfig) -> str:
    """Describe the sampler of a config in words, such as `euler, uniform steps`."""
    value = {"sde": f" (c = {config.c:g})", "ddim": f" (eta = {config.eta:g})"}.get(config.name, "")
    spacing = {
        "shift": f"steps shifted by {config.shift:g}",
        "sigmoid": f"sigmoid steps (kappa {config.kappa:g})",
        "edm": f"edm steps (rho {config.rho:g})",
        "list": f"steps at {config.points}",
    }
    return f"{config.name}{value}, {spacing.get(config.grid, f'{config.grid} steps')}"


def evaluations(name: str) -> int:
    """Return the number of evaluations of the velocity in one step of a sampler."""
    return EVALUATIONS.get(name, 1)


def sample(
    v: VelocityField,
    x0: Tensor,
    config: SamplerConfig,
    steps: int,
    span: tuple[float, float] = (0.0, 1.0),
    *,
    seed: int,
    ids: Sequence[int] | np.ndarray,
) -> Tensor:
    """Carry noise to data in a number of steps with the sampler of a config.

    It does not check that the sampler is valid for the model: see `check`.

    Args:
        v: Velocity field v(x, t).
        x0: Noise, [B, ...].
        config: The sampler and its grid.
        steps: Number of steps.
        span: The times of noise and data, into which the grid is squeezed.
        seed: Seed of fresh noise (`FreshNoise`).
        ids: A number for each sample, [B].

    Returns:
        Data, [B, ...].

    Raises:
        UserError: The grid has another number of steps, or v another shape than x.
    """
    grid = grids.squeeze(grids.make(config, steps), span)
    draw = FreshNoise(seed, ids)
    if config.name == "sde":
        return sde(v, x0, grid, draw, sqrt_diffusion(config.c))
    if config.name == "ddim":
        return ddim(v, x0, grid, draw, config.eta)
    if config.name == "ddpm":
        return ddpm(v, x0, grid, draw)
    if config.name == "anchored":
        return anchored(v, x0, grid)
    return solvers.integrate(v, x0, grid, config.name)
