"""What a training step compares: the velocity of a line, or its average up to a later time (MeanFlow).

u(x, t, r) = 1/(r - t) int_t^r v(x_s, s) ds is the velocity that leads from x_t to x_r in one step. It
solves u = v + (r - t) (d_t u + J_x u v) (Geng et al. 2025, arXiv 2505.13447, eq. 6, with noise at
t = 0). The right side, held constant, is its target: v from the pair, and the slope of u along the line
of the pair from a difference, or exactly from forward-mode differentiation.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from flowmatch.config import UserError
from flowmatch.flow import losses, path
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig

Field = Callable[..., Tensor]  # (x, t, cond, r) -> velocity
Condition = dict[str, Tensor] | None


class Objective(Protocol):
    """The errors of a micro-batch, one for each sample."""

    def __call__(
        self,
        v: Field,
        plain: Field,
        x0: Tensor,
        x1: Tensor,
        t: Tensor,
        u: Tensor,
        cond: Condition,
        mask_seed: int,
    ) -> Tensor:
        """Compute the errors.

        Args:
            v: The velocity field that is trained.
            plain: The same field without the loop's wrappers, for what needs no gradient.
            x0: Noise, [B, ...].
            x1: Data, [B, ...].
            t: Times in [0, 1], [B].
            u: Uniform numbers in [0, 1), [B].
            cond: Conditions of the network, or None.
            mask_seed: Seed of the dropout masks. The caller has seeded torch's generators with it, and
                restores their states.

        Returns:
            Errors, [B].
        """


class FitOptions(Protocol):
    """What `check` reads of the training loop's config."""

    @property
    def precision(self) -> str: ...
    @property
    def shard(self) -> bool | str: ...
    @property
    def compile(self) -> bool: ...
    @property
    def channels_last(self) -> bool: ...


def later(t: Tensor, u: Tensor, equal: float, end: float) -> Tensor:
    """Turn uniform numbers into second times r, from t to 1.

    Args:
        t: First times in [0, 1], [B].
        u: Uniform numbers in [0, 1), [B].
        equal: Share of r = t.
        end: Share of r = 1; the others are uniform between t and 1.

    Returns:
        r, [B].
    """
    rest = max(1 - equal - end, 1e-12)
    between = t + (1 - t) * ((u - equal - end) / rest).clamp(0, 1)
    r = torch.where(u < equal + end, torch.ones_like(t), between)
    return torch.where(u < equal, t, r)


@torch.no_grad()
def average_target(u: Field, x: Tensor, t: Tensor, r: Tensor, v: Tensor, step: float) -> Tensor:
    """Return v + (r - t) (d_t u + J_x u v), without gradient.

    Args:
        u: Average velocity u(x, t, r).
        x: x_t, [B, ...].
        t: First times, [B].
        r: Second times in [t, 1], [B].
        v: Velocity of the line at x, [B, ...].
        step: How far the difference that replaces the derivative reaches to either side of t, within
            [0, r]; 0 is the derivative itself.

    Returns:
        The target of u(x, t, r), [B, ...].
    """
    if step == 0:
        along = (v, torch.ones_like(t), torch.zeros_like(r))
        return v + path.expand(r - t, x) * torch.func.jvp(u, (x, t, r), along)[1]
    back, on = t.clamp(max=step), (r - t).clamp(max=step)
    before = u(x - path.expand(back, x) * v, t - back, r)
    after = u(x + path.expand(on, x) * v, t + on, r)
    width = (back + on).clamp(min=torch.finfo(t.dtype).tiny)  # 0 at t = r = 0: the target is v
    return v + path.expand((r - t) / width, x) * (after - before)


def build(config: ObjectiveConfig, loss: LossConfig, module: nn.Module | None = None) -> Objective:
    """Build the objective of a config.

    Args:
        config: Velocity, also of the lines of `trajectories`; or the average velocity, its constants.
        loss: How its error is measured.
        module: Of the feature loss: frozen, in eval mode, on the device of the data.

    Returns:
        The objective.
    """
    if config.name != "meanflow":
        measure = losses.build(loss, module)

        def velocity(
            v: Field,
            plain: Field,
            x0: Tensor,
            x1: Tensor,
            t: Tensor,
            u: Tensor,
            cond: Condition,
            mask_seed: int,
        ) -> Tensor:
            x = path.interpolate(x0, x1, t)
            return measure(v(x, t, cond), x, x0, x1, t, u=u)

        return velocity
    distance = losses.distance(loss)

    def average(
        v: Field,
        plain: Field,
        x0: Tensor,
        x1: Tensor,
        t: Tensor,
        u: Tensor,
        cond: Condition,
        mask_seed: int,
    ) -> Tensor:
        x, r = path.interpolate(x0, x1, t), later(t, u, config.equal, config.end)

        def masked(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            torch.manual_seed(mask_seed)  # one dropout mask at both ends of the difference
            return plain(x, t, cond, r)

        # DDP's hooks need not see these calls: the target has no gradient
        target = average_target(masked, x, t, r, path.velocity(x0, x1), config.step)
        return distance(v(x, t, cond, r), target)

    return average


def check(
    config: ObjectiveConfig,
    loss: LossConfig,
    t: TimesConfig,
    fit: FitOptions,
    prompts: bool = False,
    for_steps: Sequence[int] = (),
) -> None:
    """Check that an objective can be trained with a loss, times and a training loop.

    Args:
        config: The objective.
        loss: How its error is measured.
        t: The times.
        fit: The training loop.
        prompts: Whether the network is that of a pipeline that reads prompts.
        for_steps: Numbers of Euler steps at whose times alone the network is trained.

    Raises:
        UserError: They contradict each other.
    """
    if config.on_states:
        return _check_on_states(config, loss, t, prompts, for_steps)
    if config.name != "meanflow":
        return
    faults = []
    if for_steps:
        faults.append(
            f"for_steps={list(for_steps)}: objective.name=meanflow learns to step from any time to any "
            "other; leave one of them out"
        )
    if config.equal + config.end > 1:
        faults.append(
            f"objective.equal={config.equal} and objective.end={config.end} are shares with a sum of "
            "more than 1; lower one of them"
        )
    if t.zero == 1:
        faults.append(
            "times.zero=1: objective.name=meanflow needs the slope in t, which times of 0 alone do not "
            "train; use a share below 1, or objective.name=velocity to distil to one step"
        )
    if fit.precision != "fp32":
        faults.append(
            f"fit.precision={fit.precision!r}: objective.name=meanflow needs differences of the network "
            "that this precision rounds away; use fp32"
        )
    if fit.shard:
        faults.append(
            "fit.shard=true: objective.name=meanflow calls the network outside of the training step, "
            "which needs whole weights; leave it out"
        )
    if config.step == 0:
        why = "objective.step=0 uses forward-mode differentiation,"
        if fit.compile:
            faults.append(
                f"fit.compile=true: {why} which does not work through a compiled network; use "
                "objective.step=0.05"
            )
        if fit.channels_last:
            faults.append(
                f"fit.channels_last=true: {why} which the norms refuse in this format; use "
                "objective.step=0.05"
            )
    if loss.name == "feature":
        faults.append(
            "loss.name=feature compares data, and objective.name=meanflow velocities; use another loss"
        )
    if faults:
        raise UserError(faults)


def _check_on_states(
    config: ObjectiveConfig,
    loss: LossConfig,
    t: TimesConfig,
    prompts: bool,
    for_steps: Sequence[int],
) -> None:
    """Check an objective on trajectories. Raises UserError."""
    faults = []
    if prompts and config.name == "segments":
        faults.append(
            "objective.name=segments is for equal steps, and a pipeline that reads prompts has its own "
            "grid; use objective.name=cmt or velocity"
        )
    if t.zero == 1 or list(for_steps) == [1]:
        given = "for_steps=[1]" if for_steps else "times.zero=1"
        faults.append(
            f"{given}: objective.name={config.name} is for times along the path, too; use "
            f"{'more steps' if for_steps else 'a share below 1'}, or objective.name=velocity to distil "
            "to one step"
        )
    if loss.name == "feature" and config.name == "segments":
        faults.append(
            "loss.name=feature compares data, and objective.name=segments the states of windows; use "
            "another loss"
        )
    if faults:
        raise UserError(faults)
