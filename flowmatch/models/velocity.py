"""The one bridge between a network's terms and the math's: v(x, t)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.models import two_time


def classes_of(net: Any) -> int | None:
    """Read the number of classes K from a network's own config (its null class is K)."""
    if "num_embeds_ada_norm" in net.config:
        return net.config.num_embeds_ada_norm
    embeds = net.config.get("num_class_embeds")
    return None if embeds is None else embeds - 1


def sample_shape(net: Any) -> tuple[int, ...]:
    """Read the shape of one sample, [C, H, W] or [D], from a network's own config."""
    channels = net.config.in_channels
    if "sample_size" not in net.config:
        return (channels,)
    size = net.config.sample_size
    if size is None:
        raise UserError(f"{type(net).__name__} has no sample_size in its config.json; add it there")
    return (channels, *((size, size) if isinstance(size, int) else size))


class Velocity:
    """The bridge: v(x, t) of the math from a network in diffusers' terms.

    v = -net(x, 1000 (1 - t)). With guidance w != 1: v = v_null + w (v_cond - v_null) (Ho & Salimans
    2022, arXiv 2207.12598, in velocities); both halves run as one batch and count as two evaluations.
    """

    span = (0.0, 1.0)  # the times at which it is valid
    extra = 0  # evaluations of `carry` beyond those of its solver

    def __init__(self, net: Any, guidance: float = 1.0):
        self.net = net
        self.guidance = guidance
        self.evaluations = 0  # of the network, a sample; guidance counts two
        inner = getattr(net, "module", net)  # DDP hides the config
        inner = getattr(inner, "_orig_mod", inner)
        self.classes = classes_of(inner)
        self.second = two_time.argument(inner)  # which takes the second time, if there is one
        self.null = self.classes  # the null class is the one after the last
        if guidance != 1 and self.classes is None:
            raise UserError(f"guidance={guidance}: this network takes no labels; use guidance=1")

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: dict[str, Tensor] | None = None,
        r: Tensor | float | None = None,
    ) -> Tensor:
        """Evaluate the velocity. x: [B, ...]; t: [B] or a float, in [0, 1] -> v: [B, ...].

        cond["label"]: int64 [B]; K is the null class, and what a conditional network gets without
        labels. r, like t: the time up to which a two-time network averages; None is t, the velocity.
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
        cond: dict[str, Tensor] | None,
        second: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network itself, guided. timestep: [B], as it sees it -> [B, ...], as it says it.

        The timestep is a float tensor: UNet2DModel casts a Python number to long. second: like it.
        """
        more: dict[str, Any] = {} if self.second is None else {self.second: second}
        # a float64 state is the solver's; the network keeps its own dtype
        given = x.to(next(self.net.parameters()).dtype) if x.dtype == torch.float64 else x
        if self.classes is None:
            if cond:
                raise UserError(f"conditions {sorted(cond)} are given; this network takes none")
            self.evaluations += 1
            return self.net(given, timestep, **more).sample.to(x.dtype)
        if self.null is None and cond is None:
            raise UserError("this network has no null class; give it labels")
        null = torch.full((x.shape[0],), self.null or 0, dtype=torch.long, device=x.device)
        label = null if cond is None else cond["label"]
        if self.guidance == 1:
            self.evaluations += 1
            return self.net(given, timestep, class_labels=label, **more).sample.to(x.dtype)
        self.evaluations += 2
        both = self.net(
            torch.cat([given, given]),
            torch.cat([timestep, timestep]),
            class_labels=torch.cat([null, label]),
            **{name: torch.cat([value, value]) for name, value in more.items()},
        )
        out_null, out_cond = both.sample.to(x.dtype).chunk(2)
        return out_null + self.guidance * (out_cond - out_null)

    def carry(
        self, x0: Tensor, solve: Callable[..., Tensor], cond: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Carry noise to data: solve(v, x, span) integrates v(x, t) from span[0] to span[1].

        Of a two-time network, v(x, t, r) is the average velocity up to r.
        """
        return solve(lambda x, t, r=None: self(x, t, cond, r), x0, self.span)

    def invert(
        self, x1: Tensor, solve: Callable[..., Tensor], cond: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Carry data to noise: solve(v, x, span) integrates v(x, t) from span[1] back to span[0]."""
        return solve(lambda x, t: self(x, t, cond), x1, self.span)
