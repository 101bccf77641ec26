"""The one bridge between a network's terms and the math's: v(x, t)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow import grids, noise, samplers, solvers
from flowmatch.flow.config import SamplerConfig, SolverConfig
from flowmatch.flow.solvers import Keep, VelocityField
from flowmatch.models import two_time
from flowmatch.models.network import Network

Span = tuple[float, float]  # the times of noise and data
Condition = dict[str, Tensor]  # "label": int64 [B]
Solve = Callable[
    [Callable[..., Tensor], Tensor, Span], Tensor
]  # (v, x, span) -> x at the other end


def classes_of(net: Network) -> int | None:
    """Return the number of classes K from a network's config, or None; its null class is K."""
    if "num_embeds_ada_norm" in net.config:
        return net.config.num_embeds_ada_norm
    embeds = net.config.get("num_class_embeds")
    return None if embeds is None else embeds - 1


def sample_shape(net: Network) -> tuple[int, ...]:
    """Return the shape of one sample, [C, H, W] or [D], from a network's config.

    Raises:
        UserError: The config has no sample_size.
    """
    channels = net.config.in_channels
    if "sample_size" not in net.config:
        return (channels,)
    size = net.config.sample_size
    if size is None:
        raise UserError(f"{type(net).__name__} has no sample_size in its config.json; add it there")
    return (channels, *((size, size) if isinstance(size, int) else size))


class Velocity:
    """The velocity field v(x, t) of a network in diffusers' terms.

    v = -net(x, 1000 (1 - t)). With guidance w != 1: v = v_null + w (v_cond - v_null) (Ho & Salimans
    2022, arXiv 2207.12598, for velocities); both halves are one batch and count as two evaluations.

    Args:
        net: A diffusers model, or its DDP wrapper.
        guidance: w; 1 disables guidance.

    Raises:
        UserError: Guidance is asked of a network that takes no labels.
    """

    span: Span = (0.0, 1.0)  # the times at which it is valid
    extra = 0  # evaluations of `carry` beyond those of its solver

    def __init__(self, net: Network, guidance: float = 1.0):
        self.net = net
        self.guidance = guidance
        self.evaluations = 0  # of the network, for each sample; a guided evaluation counts two
        inner = getattr(net, "module", net)  # DDP hides the config
        self.classes = classes_of(inner)
        self.second = two_time.argument(inner)  # the argument for the second time, or None
        self.null = self.classes  # the null class is the one after the last
        if guidance != 1 and self.classes is None:
            raise UserError(f"guidance={guidance}: this network takes no labels; use guidance=1")

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Condition | None = None,
        r: Tensor | float | None = None,
    ) -> Tensor:
        """Evaluate the velocity.

        Args:
            x: State, [B, ...].
            t: Time in [0, 1], [B] or a float.
            cond: {"label": int64 [B]}, where K is the null class; None is the null class for all.
            r: Time up to which a two-time network averages, like t; None is t, the velocity itself.

        Returns:
            v, [B, ...].

        Raises:
            UserError: r or labels are given to a network that does not take them.
        """
        if r is not None and self.second is None:
            raise UserError("r is given, but this network takes a single time")
        own = torch.float32 if x.dtype != torch.float64 else next(self.net.parameters()).dtype
        wide = torch.promote_types(own, torch.float32)

        def timestep(time: Tensor | float) -> Tensor:
            if not isinstance(time, Tensor):  # a copy to the device would wait for all its work
                time = torch.full((), time, dtype=wide, device=x.device)
            return 1000 * (1 - time.to(x.device, wide).expand(x.shape[0]))

        second = None if self.second is None else timestep(t if r is None else r)
        return -self.predict(x, timestep(t), cond, second)

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        cond: Condition | None,
        second: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network itself, with guidance.

        Args:
            x: State, [B, ...].
            timestep: Timestep in the network's own terms, a float tensor [B]: UNet2DModel casts a
                Python number to long.
            cond: As in `__call__`.
            second: The second timestep of a two-time network, [B].

        Returns:
            The network's output in its own terms, [B, ...].
        """
        more: dict[str, Any] = {} if self.second is None else {self.second: second}
        # a float64 state is the solver's; the network keeps its own dtype
        sample = x.to(next(self.net.parameters()).dtype) if x.dtype == torch.float64 else x
        if self.classes is None:
            if cond:
                raise UserError(f"conditions {sorted(cond)} are given; this network takes none")
            self.evaluations += 1
            return self.net(sample, timestep, **more).sample.to(x.dtype)
        if self.null is None and cond is None:
            raise UserError("this network has no null class; give it labels")
        null = torch.full((x.shape[0],), self.null or 0, dtype=torch.long, device=x.device)
        label = null if cond is None else cond["label"]
        if self.guidance == 1:
            self.evaluations += 1
            return self.net(sample, timestep, class_labels=label, **more).sample.to(x.dtype)
        self.evaluations += 2
        both = self.net(
            torch.cat([sample, sample]),
            torch.cat([timestep, timestep]),
            class_labels=torch.cat([null, label]),
            **{name: torch.cat([value, value]) for name, value in more.items()},
        )
        out_null, out_cond = both.sample.to(x.dtype).chunk(2)
        return out_null + self.guidance * (out_cond - out_null)

    def spread(self, t: Tensor) -> Tensor:
        """Turn shares t in [0, 1] of the noise levels of its training, 1 the least noise, into times."""
        return t

    def weight(self, t: Tensor) -> Tensor:
        """Return the squared error of its network's prediction by that of the velocity, [B]. t: [B]."""
        return torch.ones_like(t)

    def carry(self, x0: Tensor, solve: Solve, cond: Condition | None = None) -> Tensor:
        """Carry noise to data.

        Args:
            x0: Noise, [B, ...].
            solve: solve(v, x, span) integrates v(x, t) from span[0] to span[1]. For a two-time
                network v(x, t, r) is the average velocity up to r.
            cond: As in `__call__`.

        Returns:
            Data, [B, ...].
        """
        return solve(lambda x, t, r=None: self(x, t, cond, r), x0, self.span)

    def invert(self, x1: Tensor, solve: Solve, cond: Condition | None = None) -> Tensor:
        """Carry data to noise: solve(v, x, span) integrates v(x, t) from span[1] back to span[0]."""
        return solve(lambda x, t: self(x, t, cond), x1, self.span)

    def integrate(
        self,
        x: Tensor,
        config: SolverConfig,
        cond: Condition | None = None,
        *,
        backward: bool = False,
        before: Callable[[], None] | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """Carry noise to data, or data to noise, with the solver of a config.

        With Euler a two-time network goes from time to time by its average velocity (`solvers.jumps`).

        Args:
            x: Noise, or data where `backward`, [B, ...].
            config: The solver and its steps.
            cond: As in `__call__`.
            backward: Carry data to noise.
            before: Called before each evaluation; it may raise.
            keep: Gets the states at its times, which are some of `times`.

        Returns:
            The other end, [B, ...].
        """

        def solve(v: Callable[..., Tensor], x: Tensor, span: Span) -> Tensor:
            def field(*words: Any) -> Tensor:
                if before is not None:
                    before()
                return v(*words)

            if self._jumps(config.name) and not backward:
                return solvers.jumps(field, x, grids.make(config, config.steps), keep)
            return solvers.solve(field, x, config, span, backward=backward, keep=keep)

        return (self.invert if backward else self.carry)(x, solve, cond)

    def times(self, config: SolverConfig) -> list[float] | None:
        """List the times between noise and data at which `integrate` has states; None for any time."""
        return None if config.name == "dopri5" else solvers.times_of(config, self.span)

    def sample(
        self,
        x0: Tensor,
        config: SamplerConfig,
        steps: int,
        cond: Condition | None = None,
        *,
        seed: int,
        ids: Sequence[int] | np.ndarray,
    ) -> Tensor:
        """Carry noise to data in a number of steps with the sampler of a config.

        With Euler a two-time network goes from time to time by its average velocity (`solvers.jumps`).

        Args:
            x0: Noise, [B, ...].
            config: The sampler.
            steps: Number of its steps.
            cond: As in `__call__`.
            seed: With `ids`, what fresh noise is drawn from (`samplers.FreshNoise`).
            ids: A number for each sample of the batch, [B].

        Returns:
            Data, [B, ...].
        """

        def solve(v: VelocityField, x: Tensor, span: Span) -> Tensor:
            if self._jumps(config.name):
                return solvers.jumps(v, x, grids.make(config, steps))
            return samplers.sample(v, x, config, steps, span, seed=seed, ids=ids)

        return self.carry(x0, solve, cond)

    def labels(self, seed: int, ids: np.ndarray) -> np.ndarray:
        """Draw the labels of some pairs, int64 [B]; each depends on (seed, i) alone."""
        assert self.classes is not None, "a network that takes labels"
        return noise.labels(seed, ids, self.classes)

    def _jumps(self, name: str) -> bool:
        return self.second is not None and name == "euler"
