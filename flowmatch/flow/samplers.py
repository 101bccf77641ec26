"""Stochastic and few-step samplers over a velocity: noise to data, with fresh noise on the way.

Two families, both with the marginals of the flow as their steps become short:

- the SDE dx = [v + w^2 s / 2] dt + w dW for any w_t >= 0, s the score (stochastic interpolants, Albergo
  et al. 2023, arXiv 2303.08797), by Euler-Maruyama;
- the generalised step t -> t': x' = t' D + (1 - t') [rho N + sqrt(1 - rho^2) z], D and N the data and
  noise predictions: DDIM with eta (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16), DDPM's ancestral
  steps (rho = r = t (1 - t') / (t' (1 - t))), re-noising (rho = 0), and the anchored rule, which takes
  the initial noise for N (2-rectified flow++, arXiv 2405.20320).

Fresh noise belongs to a sample: the k-th draw of sample i is a function of (seed, i, k), so that a
sample does not depend on its batch. All but the anchored rule read a score off the velocity, which is
there for an independent coupling only, before reflow (`check`).
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

STOCHASTIC = ("sde", "ddim", "ddpm", "renoise")


class FreshNoise:
    """Standard normal noise whose k-th draw for sample i is a function of (seed, i, k) alone.

    ids: a number for each sample of the batch. Calling it with x [B, ...] gives noise like x, drawn on
    the CPU in float32. One object serves one integration. Raises UserError for another batch size.
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
    """w^2 = 2 c (1 - t), the default: drift (1 + c t) v - c x, with no singularity at either end."""
    return lambda t: 2 * c * (1 - t)


def sde(
    v: VelocityField,
    x: Tensor,
    grid: Tensor,
    draw: Draw,
    w2: Callable[[float], float] | None = None,
) -> Tensor:
    """Follow dx = [v + w^2 (t v - x) / (2 (1 - t))] dt + w dW by Euler-Maruyama.

    x: [B, ...] at grid[0]; grid: [N + 1], rising, in [0, 1]. w2(t): the square of w, >= 0; None is
    2 (1 - t). The last step takes w = 0: noise that is not added must not be taken out by the drift
    either, or the samples come out too narrow. Raises UserError where w^2 is not finite (2 (1 - t) / t,
    DDPM's reverse SDE, at t = 0) and where a step is too long for it: the score term multiplies the
    noise in x by 1 - w^2 h / (2 (1 - t)^2), so beyond 2 it would blow up (constant w close to t = 1).
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

    x, v: [B, ...] at time t < s; rho in [0, 1]; fresh: z, or None where it has no weight. It is written
    as an Euler step and what the noise changes, so that rho = 1 is Euler to the last bit.
    """
    euler = x + (s - t) * v
    if fresh is None or rho == 1 or s == 1:
        return euler
    kept = path.noise_prediction(x, v, t)
    return euler + (1 - s) * ((rho - 1) * kept + math.sqrt(1 - rho**2) * fresh)


def ancestral(t: float, s: float) -> float:
    """The rho of DDPM's ancestral sampling: r = t (1 - s) / (s (1 - t)), for t < s."""
    return t * (1 - s) / (s * (1 - t))


def ddim(v: VelocityField, x: Tensor, grid: Tensor, draw: Draw, eta: float = 0.0) -> Tensor:
    """Sample by DDIM: rho = sqrt(1 - eta^2 (1 - r^2)); eta = 0 is Euler, eta = 1 is DDPM.

    x: [B, ...] noise at grid[0]; grid: [N + 1], rising, in [0, 1]; eta in [0, 1]. Raises UserError.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta}: expected a number in [0, 1]")
    return _generalised(
        v, x, grid, draw, lambda t, s: math.sqrt(1 - eta**2 * (1 - ancestral(t, s) ** 2))
    )


def ddpm(v: VelocityField, x: Tensor, grid: Tensor, draw: Draw) -> Tensor:
    """Sample by DDPM's ancestral steps (Ho et al. 2020, arXiv 2006.11239): rho = r. As `ddim`."""
    return _generalised(v, x, grid, draw, ancestral)


def renoise(v: VelocityField, x: Tensor, grid: Tensor, draw: Draw) -> Tensor:
    """Predict the data, add fresh noise, again: rho = 0, multistep consistency sampling. As `ddim`.

    (Song et al. 2023, arXiv 2303.01469, algorithm 1.) It is right where D is a consistency map. On a
    plain velocity field it does NOT converge as the steps become short.
    """
    return _generalised(v, x, grid, draw, lambda t, s: 0.0)


def anchored(v: VelocityField, x0: Tensor, grid: Tensor) -> Tensor:
    """Take few steps, each from the line between the initial noise and the newest prediction.

    x' = s D + (1 - s) x0 (2-rectified flow++, arXiv 2405.20320). It helps flows that are nearly
    straight, and is not a convergent solver on a curved one. x0: [B, ...] noise; grid: [N + 1] from
    0, rising.
    """
    v, points = _begin(v, x0, grid)
    if points[0] != 0:
        raise UserError(f"grid={points}: the anchored rule starts from the noise, at t = 0")
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
    """Check state and grid; give v with its shape checked, and the points."""
    solvers.check_state(x)
    points = grid.tolist()
    check_times(points)
    if points[0] > points[1]:
        raise UserError(f"grid={points}: samplers go from noise to data, a rising grid")
    return solvers.checked(v), points


def check(name: str, reflow_round: int, key: str) -> None:
    """Raise UserError, naming `key`, where a sampler is not valid for a model.

    reflow_round: 0 after training on an independent coupling, k after k reflows (`round` of a manifest).
    """
    if name == "renoise":
        raise UserError(
            f"{key}=renoise: adding fresh noise to a data prediction converges for consistency maps "
            "only, and this model is a velocity field; use ddpm or sde before reflow, anchored after it"
        )
    if name in STOCHASTIC and reflow_round > 0:
        raise UserError(
            f"{key}={name}: the model is of reflow round {reflow_round}; after reflow, noise and data "
            "are no longer independent, so its velocity gives no score, which this sampler needs; use "
            "an ODE solver or anchored"
        )
    if name == "anchored" and reflow_round == 0:
        raise UserError(
            f"{key}=anchored: the model is of round 0, before reflow; its paths are curved, and the "
            "anchored rule does not converge on them; use an ODE solver, sde, ddim or ddpm"
        )


def describe(config: SamplerConfig) -> str:
    """Say in words how a config samples, such as `euler, uniform steps`."""
    value = {"sde": f" (c = {config.c:g})", "ddim": f" (eta = {config.eta:g})"}.get(config.name, "")
    spacing = {
        "shift": f"steps shifted by {config.shift:g}",
        "sigmoid": f"sigmoid steps (kappa {config.kappa:g})",
        "edm": f"edm steps (rho {config.rho:g})",
        "list": f"steps at {config.points}",
    }
    return f"{config.name}{value}, {spacing.get(config.grid, f'{config.grid} steps')}"


def evaluations(name: str) -> int:
    """Count the evaluations of the velocity that a sampler makes a step."""
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
    """Carry noise to data in some steps as a config says.

    x0: [B, ...] noise at t = 0; span: the times of noise and data, into which the grid is squeezed;
    seed, ids: what fresh noise is drawn from (`FreshNoise`). Does not know the model: `check` first.
    Raises UserError.
    """
    grid = grids.squeeze(grids.make(config, steps), span)
    draw = FreshNoise(seed, ids)
    if config.name == "sde":
        return sde(v, x0, grid, draw, sqrt_diffusion(config.c))
    if config.name == "ddim":
        return ddim(v, x0, grid, draw, config.eta)
    if config.name == "ddpm":
        return ddpm(v, x0, grid, draw)
    if config.name == "renoise":
        return renoise(v, x0, grid, draw)
    if config.name == "anchored":
        return anchored(v, x0, grid)
    return solvers.integrate(v, x0, grid, config.name)
