"""What the loop asks of a network: the velocity of a line, or its average up to a later time (MeanFlow).

u(x, t, r) = 1/(r - t) int_t^r v(x_s, s) ds is the velocity that leads from x_t to x_r in one step. It
solves u = v + (r - t) (d_t u + J_x u v) (Geng et al. 2025, arXiv 2505.13447, eq. 6, with noise at
t = 0), so the right side, held constant, is its target: v from the pair, the slope along its line by a
difference, or exactly by forward-mode differentiation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowmatch.config import UserError
from flowmatch.flow import losses, path
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig

Field = Callable[..., Tensor]  # (x, t, cond, r) -> velocity
Cond = dict[str, Tensor] | None
# (v, the same past the wrappers of the loop, x0, x1, t, w uniform in [0, 1), cond) -> [B]
Objective = Callable[[Field, Field, Tensor, Tensor, Tensor, Tensor, Cond], Tensor]


def later(t: Tensor, w: Tensor, c: ObjectiveConfig) -> Tensor:
    """Turn uniform numbers into second times r, from t to 1. t, w: [B] -> [B]."""
    rest = max(1 - c.equal - c.end, 1e-12)
    between = t + (1 - t) * ((w - c.equal - c.end) / rest).clamp(0, 1)
    r = torch.where(w < c.equal + c.end, torch.ones_like(t), between)
    return torch.where(w < c.equal, t, r)


@torch.no_grad()
def average_target(u: Field, x: Tensor, t: Tensor, r: Tensor, v: Tensor, step: float) -> Tensor:
    """Give v + (r - t) (d_t u + J_x u v), without gradient. u(x, t, r); x, v: [B, ...]; t, r: [B].

    step: how far the difference that stands for the derivative reaches to either side of t, within
    [0, r]; 0 is the derivative itself.
    """
    if step == 0:
        along = (v, torch.ones_like(t), torch.zeros_like(r))
        return v + path.expand(r - t, x) * torch.func.jvp(u, (x, t, r), along)[1]
    back, on = t.clamp(max=step), (r - t).clamp(max=step)
    before = u(x - path.expand(back, x) * v, t - back, r)
    after = u(x + path.expand(on, x) * v, t + on, r)
    width = (back + on).clamp(min=torch.finfo(t.dtype).tiny)  # 0 at t = r = 0, where v is all
    return v + path.expand((r - t) / width, x) * (after - before)


def build(config: ObjectiveConfig, loss: LossConfig, module: nn.Module | None = None) -> Objective:
    """Make the objective; module: of the feature loss."""
    if config.name == "velocity":
        measure = losses.build(loss, module)

        def velocity(
            v: Field, plain: Field, x0: Tensor, x1: Tensor, t: Tensor, w: Tensor, cond: Cond
        ) -> Tensor:
            x = path.interpolate(x0, x1, t)
            return measure(v(x, t, cond), x, x0, x1, t)

        return velocity
    distance = losses.LOSSES[loss.name]

    def average(
        v: Field, plain: Field, x0: Tensor, x1: Tensor, t: Tensor, w: Tensor, cond: Cond
    ) -> Tensor:
        x, r = path.interpolate(x0, x1, t), later(t, w, config)
        masks = torch.initial_seed()

        def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            torch.manual_seed(masks)  # both ends of the difference through one dropout mask
            return plain(x, t, cond, r)

        # the derivative is no part of the gradient, so it may pass DDP's hooks by
        target = average_target(u, x, t, r, path.velocity(x0, x1), config.step)
        return distance(v(x, t, cond, r), target, loss)

    return average


def check(config: ObjectiveConfig, loss: LossConfig, t: TimesConfig, fit: Any) -> None:
    """Raise UserError for what does not go with the objective, before any work. fit: a FitConfig."""
    if config.name != "meanflow":
        return
    faults = []
    if config.equal + config.end > 1:
        faults.append(
            f"objective.equal={config.equal} and objective.end={config.end} are shares; they exceed 1; "
            "lower one"
        )
    if t.zero == 1:
        faults.append(
            "times.zero=1: objective.name=meanflow needs the slope in t, and at t = 0 alone nothing "
            "trains it; use a share below 1, or objective.name=velocity to distil to one step"
        )
    if fit.precision != "fp32":
        faults.append(
            f"fit.precision={fit.precision!r}: objective.name=meanflow takes a slope of the network, "
            "which that rounds away; use fp32"
        )
    if fit.shard:
        faults.append(
            "fit.shard=true: objective.name=meanflow asks the network for its slope beside the training "
            "step, which needs whole weights; leave it out"
        )
    if config.step == 0:
        why = "objective.step=0 differentiates the network forward, which"
        if fit.compile:
            faults.append(f"fit.compile=true: {why} needs it as it is; use objective.step=0.05")
        if fit.channels_last:
            faults.append(
                f"fit.channels_last=true: {why} its norms refuse; use objective.step=0.05"
            )
    if loss.name == "feature":
        faults.append(
            "loss.name=feature compares data, and objective.name=meanflow velocities; use another loss"
        )
    if faults:
        raise UserError(faults)
