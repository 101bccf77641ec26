"""A pipeline's own run as an integration; its states as x_t on the line from noise to data.

A scheduler's state is y = a x1 + s x0, which is (a + s) x_t at t = a / (a + s). A flow has a + s = 1; a
diffusion that preserves the variance has a^2 + s^2 = 1, one that adds it a = 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data.prompts import PromptList
from flowmatch.flow.config import SolverConfig
from flowmatch.flow.solvers import Keep
from flowmatch.models.evidence import falling
from flowmatch.models.script import Script, answered_once, dtype_of
from flowmatch.models.text_velocity import TextVelocity
from flowmatch.models.velocity import Condition
from flowmatch.models.watch import Watch, quiet, run

OWN = "own"  # solver.name of the pipeline's own run


def places(seen: Watch, script: Script) -> list[tuple[float, float]]:
    """Return (t, f) for the state after each step but the last: x_t = f * state.

    Args:
        seen: A whole run of the pipeline.
        script: What was learnt of it.

    Raises:
        UserError: The scheduler does not show the noise levels of its states, or they do not fall.
    """
    steps, scheduler = seen.steps, seen.pipe.scheduler
    known = all(step.next_sigma is not None for step in steps[:-1])
    found: list[tuple[float, float]] = []
    if script.kind == "flow":
        sigmas = [float(step.next_sigma or 0) for step in steps[:-1]]
        found = [(1 - s if falling(seen) else s, 1.0) for s in sigmas]
    elif abs(script.scale - 1) < 1e-5:
        products = scheduler.alphas_cumprod.double()
        known = all(step.timestep == round(step.timestep) for step in steps[1:])
        for step in steps[1:] if known else ():
            product = products[round(step.timestep)]
            a, s = float(product.sqrt()), float((1 - product).sqrt())
            found.append((a / (a + s), 1 / (a + s)))
    else:
        found = [(1 / (1 + float(step.next_sigma or 0)),) * 2 for step in steps[:-1]]
    times = [0.0, *(t for t, _ in found), 1.0]
    if not known or times != sorted(set(times)):
        raise UserError(
            f"states: {type(scheduler).__name__} of {script.pipeline} does not show the times of its "
            "states; name a solver, or leave states out"
        )
    return found


def times_of(
    pipe: Any, script: Script, call: dict[str, Any], prompts: Sequence[str]
) -> list[float]:
    """List the times of the states of a run, whose network is called once for each size of a batch.

    Args:
        pipe: The pipeline.
        script: What was learnt of it.
        call: Arguments of the run.
        prompts: Of one sample.
    """
    noise = torch.zeros(
        1, *script.shape, dtype=dtype_of(pipe, script.network), device=pipe._execution_device
    )
    how: dict[str, Any] = dict(inject=script.inject, network=script.network, count=script.steps)
    with torch.no_grad(), quiet(), answered_once(getattr(pipe, script.network), {}):
        seen = run(pipe, prompts[:1], call, noise, **how)
    return [t for t, _ in places(seen, script)]


class OwnRun(TextVelocity):
    """The velocity of a teacher whose pairs may come from its own run.

    Args:
        pipe: The pipeline, on its device.
        call: Arguments of its call, with the negative prompt.
        prompts: The prompts.
        parts: Arguments of `TextVelocity`; guidance is that of our solvers.
    """

    def __init__(self, pipe: Any, call: dict[str, Any], prompts: PromptList, *parts: Any):
        super().__init__(*parts)
        self.pipe, self.call, self.prompts = pipe, call, prompts

    def labels(self, seed: int, ids: np.ndarray) -> np.ndarray:
        """Draw the prompts of some pairs, int64 [B]; each depends on (seed, i) and the list alone."""
        return self.prompts.number(seed, ids)

    def times(self, config: SolverConfig) -> list[float] | None:
        """List the times at which `integrate` has states; those of its own run are watched."""
        if config.name != OWN:
            return super().times(config)
        return times_of(self.pipe, self.script, self.call, self.prompts.texts)

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
        """Carry noise to data: by the pipeline's own run, or by the solver of a config."""
        if config.name != OWN:
            return super().integrate(x, config, cond, backward=backward, before=before, keep=keep)
        assert cond is not None, "a prompt for each sample"
        script = self.script
        prompts = [self.prompts.texts[i] for i in cond["label"].tolist()]
        noise = x.to(next(self.net.parameters()).dtype)
        if script.rides:  # the longest prompt of the set rides along, and is dropped
            prompts, noise = [*prompts, self.prompts.longest], torch.cat([noise, noise[-1:]])
        seen = run(
            self.pipe,
            prompts,
            self.call,
            noise,
            inject=script.inject,
            network=script.network,
            count=script.steps,
            before=before,
        )
        self.evaluations += script.evaluations
        for i, (t, factor) in enumerate(places(seen, script) if keep else ()):
            if keep is not None and t in keep:
                keep[t] = factor * seen.steps[i].after[: len(x)].to(x.dtype)
        return seen.steps[-1].after[: len(x)].to(x.dtype)
