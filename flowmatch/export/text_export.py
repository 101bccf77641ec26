"""A student that reads prompts, as a pipeline of its teacher's own class with stock parts.

Pipelines lay their grids in different ways. Which scheduler makes N steps of the class equal N Euler
steps of ours is found by trying a list of them on the pipeline itself: the last state is compared, and
the times that the network sees.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.export.scheduler import RectifiedFlowScheduler
from flowmatch.flow import grids, solvers
from flowmatch.models.conditions import Encoded
from flowmatch.models.evidence import levels, number_of
from flowmatch.models.learn import FAILURES
from flowmatch.models.schedule import betas_of
from flowmatch.models.script import unguided
from flowmatch.models.text import TextTeacher
from flowmatch.models.text_velocity import TextVelocity
from flowmatch.models.watch import Watch, noise_like, quiet, run

EXACT = 1e-5  # difference to our own steps, relative to the largest value: rounding
NEAR = 1e-2  # the same, of a scheduler that is taken where none is exact
PROMPTS = 2  # of the comparison
GRIDS = ("timesteps", "sigmas")  # arguments of a call


@dataclass(frozen=True, eq=False)
class Way:
    """A way to take N steps with the pipeline.

    Attributes:
        scheduler: A diffusers scheduler, or ours.
        place: The folder of the export that holds it.
        call: Arguments of the pipeline's call that it needs.
        own_grid: The grid that the pipeline lays, in our times, where it takes no other.
    """

    scheduler: Any
    place: str = "scheduler"
    call: dict[str, list[float]] = field(default_factory=dict)
    own_grid: list[float] | None = None

    @property
    def name(self) -> str:
        """Class of the scheduler."""
        return type(self.scheduler).__name__


@dataclass(frozen=True, eq=False)
class Found:
    """What was found for one number of steps.

    Attributes:
        way: The way to take, or None where the pipeline cannot take so many steps.
        difference: Of that way to our own steps.
        folder: Of the folder's own scheduler; infinite where it fails.
        failure: Why the pipeline cannot take so many steps.
        seen: The run.
    """

    way: Way | None
    difference: float = float("inf")
    folder: float = float("inf")
    failure: str = ""
    seen: Watch | None = None


@dataclass
class Choice:
    """What an export holds.

    Attributes:
        folder: The way of the folder's own scheduler.
        steps: What was found for each number of steps.
    """

    folder: Way
    steps: dict[int, Found]

    @property
    def schedulers(self) -> dict[str, Any]:
        """The schedulers by their folders."""
        ways = [found.way for found in self.steps.values() if found.way is not None]
        return {way.place: way.scheduler for way in [*ways, self.folder]}


class Trial:
    """Runs of a student's pipeline on a few prompts, beside our own steps from the same noise.

    Args:
        student: The student, in the place of its teacher's network.
        seed: Of the noise.
        base: The teacher's pipeline, where an adapter of it alone is exported.
    """

    def __init__(self, student: TextTeacher, seed: int, base: str = ""):
        self.base = base
        self.student, self.pipe, self.script = student, student.pipe, student.script
        listed = student.prompts
        self.prompts = [*listed.held_out, *listed.texts, *listed.texts][:PROMPTS]
        like = next(student.net.parameters())
        self.noise = noise_like((PROMPTS, *student.shape), seed, like)
        self.seed = seed
        self._own: dict[tuple[float, ...], Tensor] = {}
        self._seen: dict[tuple[int, Way], Watch | str] = {}

    def arguments(self, steps: int, way: Way) -> dict[str, Any]:
        """Return the arguments of the student's call, without prompt and noise."""
        given = self.student.call.items()
        call = {k: v for k, v in given if k not in GRIDS and not k.startswith("negative_prompt")}
        known = inspect.signature(self.pipe.__call__).parameters
        count = {"num_inference_steps": steps} if "num_inference_steps" in known else {}
        return call | count | self.script.off | way.call

    def stock(self, steps: int, way: Way, given: bool = True) -> Watch:
        """Run the pipeline in a way, from the trial's noise or from its own."""
        before, self.pipe.scheduler = self.pipe.scheduler, way.scheduler
        script, noise = self.script, self.noise if given else None
        how: dict[str, Any] = dict(inject=script.inject, network=script.network, seed=self.seed)
        try:
            with quiet(), unguided(self.pipe, script), torch.no_grad():
                return run(self.pipe, self.prompts, self.arguments(steps, way), noise, **how)
        finally:
            self.pipe.scheduler = before

    def seen(self, steps: int, way: Way) -> Watch | str:
        """Return a run of the pipeline, or why it fails."""
        key = (steps, way)
        if key not in self._seen:
            try:
                self._seen[key] = self.stock(steps, way)
            except (*FAILURES, ArithmeticError) as error:
                self._seen[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return self._seen[key]

    @cached_property
    def velocity(self) -> TextVelocity:
        """The student's velocity for the trial's prompts, padded as the pipeline pads them."""
        student, script = self.student, replace(self.script, rides=False)
        table = Encoded(self.pipe, script, student.call, self.prompts, "", self.prompts[0])
        return TextVelocity(student.net, script, table, student.schedule)

    def own(self, grid: Sequence[float]) -> Tensor:
        """Take Euler steps of ours through times of ours."""
        key = tuple(grid)
        if key not in self._own:
            v, cond = self.velocity, {"label": torch.arange(PROMPTS)}
            points = torch.tensor(key, dtype=torch.float64)
            with quiet(), torch.no_grad():
                self._own[key] = solvers.integrate(
                    lambda x, t: v(x, t, cond), self.noise.float(), points
                )
        return self._own[key]

    def grid(self, steps: int) -> list[float]:
        """The times of N steps: uniform for a flow, those of DDIM's trailing timesteps for v."""
        if self.student.schedule is None:
            return grids.uniform_grid(steps).tolist()
        times = self.student.schedule.times
        T = len(times)
        return [float(times[T - 1 - k]) for k in trailing(T, steps)] + [1.0]

    def difference(self, steps: int, way: Way) -> float:
        """Compare a way with our own steps: the last state, and the times that the network sees.

        Returns:
            The larger of both relative differences; infinity where the pipeline fails.
        """
        seen, grid = self.seen(steps, way), way.own_grid or self.grid(steps)
        if isinstance(seen, str) or len(seen.steps) != len(grid) - 1:
            return float("inf")
        own, state = self.own(grid), seen.steps[-1].after.float()
        apart = float((state - own).abs().max() / own.abs().max().clamp(min=1e-30))
        found = [number_of(step.calls[-1].arguments[self.script.time]) for step in seen.steps]
        schedule, script = self.student.schedule, self.script
        t = torch.tensor(grid[:-1], dtype=torch.float64)
        clock = 1 - t if schedule is None else schedule.timestep(t) / len(schedule.times)
        scale = script.slope * (1 if schedule is None else len(schedule.times))
        late = [
            abs((float("nan") if time is None else time) - script.offset - scale * c) / abs(scale)
            for time, c in zip(found, clock.tolist(), strict=True)
        ]
        worst = max(apart, *late)
        return worst if worst == worst else float("inf")  # NaN is a failure

    def laid(self, steps: int, way: Way) -> Way | None:
        """Return a way with the grid that the pipeline itself lays, where it runs."""
        seen = self.seen(steps, way)
        if isinstance(seen, str) or seen.steps[0].sigma is None:
            return None
        laid = replace(way, own_grid=[1 - level for level in levels(seen)] + [1.0])
        self._seen[steps, laid] = seen
        return laid


def trailing(count: int, steps: int) -> list[int]:
    """Return DDIM's trailing timesteps: N of them, evenly spaced down from the last."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(num_train_timesteps=count, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return [int(k) for k in scheduler.timesteps]


def euler(teacher: Any, **more: Any) -> Any:
    """Make the stock Euler scheduler on a uniform grid, in the terms of a teacher's scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = teacher.config
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        invert_sigmas=bool(config.get("invert_sigmas", False)),
        **more,
    )


def first_order(teacher: Any) -> Any:
    """Make the stock scheduler that takes any number of steps of a flow, but for 1/1000 at its start."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=teacher.config.get("num_train_timesteps", 1000),
        solver_order=1,
        algorithm_type="dpmsolver++",
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=1.0,
        final_sigmas_type="zero",
    )


def given_times(pipe: Any, steps: int) -> Iterator[dict[str, list[float]]]:
    """List the arguments by which a call may name its grid: sigmas, timesteps, or both."""
    known = inspect.signature(pipe.__call__).parameters
    count = pipe.scheduler.config.get("num_train_timesteps", 1000)
    sigmas = [1 - i / steps for i in range(steps)]
    both = {"sigmas": sigmas, "timesteps": [count * sigma for sigma in sigmas]}
    names = [name for name in both if name in known]
    for some in [[name] for name in names] + ([names] if len(names) > 1 else []):
        yield {name: both[name] for name in some}


def ddim(betas: Tensor, config: Any) -> Any:
    """Make the stock scheduler of a v-prediction student: DDIM, with no signal at the last timestep.

    Args:
        betas: Of the teacher's schedule, [T].
        config: Of the teacher's scheduler, whose own words are used where they give these betas.
    """
    from diffusers import DDIMScheduler

    fixed: dict[str, Any] = dict(
        num_train_timesteps=len(betas),
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=1,
    )
    names = ("beta_schedule", "beta_start", "beta_end")
    words = {name: config[name] for name in names if name in config}
    listed: Any = DDIMScheduler(**fixed, trained_betas=betas.tolist())
    try:
        named: Any = DDIMScheduler(**fixed, **words)
    except NotImplementedError:
        return listed
    return named if torch.allclose(named.alphas_cumprod, listed.alphas_cumprod, 1e-4) else listed


def candidates(trial: Trial, steps: int, plain: Way, folder: Way) -> Iterator[Way]:
    """List the ways to take N steps, the plainest first.

    Args:
        trial: Runs them.
        steps: N.
        plain: Takes any number of steps, in pipelines that lay a uniform grid.
        folder: Of the folder's own scheduler.
    """
    place = "scheduler" if folder is plain else f"scheduler_{steps}"
    own = plain if folder is plain else replace(plain, place=place)
    yield own
    if trial.student.schedule is not None:
        return
    teacher = trial.pipe.scheduler
    if steps > 1:
        yield Way(euler(teacher, shift_terminal=1 / steps), f"scheduler_{steps}")
    for call in given_times(trial.pipe, steps):
        yield replace(own, call=call)
    if folder is not plain:
        yield folder
    if not teacher.config.get("invert_sigmas"):
        yield Way(RectifiedFlowScheduler(reflow_round=trial.student.round), "scheduler_flowmatch")
    laid = trial.laid(steps, own)
    if laid is not None:
        yield laid


def best(trial: Trial, steps: int, plain: Way, folder: Way) -> Found:
    """Find the first way that is exact, or else the one with the least difference.

    Raises:
        UserError: It differs by more than `NEAR`.
    """
    tried: list[tuple[float, Way]] = []
    for way in candidates(trial, steps, plain, folder):
        tried.append((trial.difference(steps, way), way))
        if tried[-1][0] <= EXACT:
            break
    difference, way = min(tried, key=lambda one: one[0])
    seen = trial.seen(steps, way)
    if isinstance(seen, str):
        return Found(None, failure=seen)
    if not difference <= NEAR:
        raise UserError(
            f"steps={steps}: {trial.script.pipeline} cannot take our {steps} steps with any scheduler "
            f"that was tried; {way.name} comes nearest and differs by {difference:.2g} of the largest "
            f"value, expected at most {NEAR:g}; leave {steps} out of steps="
        )
    return Found(way, difference, trial.difference(steps, folder), "", seen)


def choose(trial: Trial, steps: Sequence[int]) -> Choice:
    """Find the first scheduler of a list that reproduces our own samples, for each number of steps.

    The folder's own is the first that does so for all of them, or else the nearest of those that take
    any number of steps.

    Raises:
        UserError: None does so to `NEAR`, or the pipeline runs at none of these numbers.
    """
    teacher, schedule = trial.pipe.scheduler, trial.student.schedule
    plain = Way(euler(teacher) if schedule is None else ddim(betas_of(teacher), teacher.config))
    folder = plain
    if schedule is None and any(trial.difference(n, plain) > EXACT for n in sorted(steps)[::-1]):
        other = Way(first_order(teacher))
        runs = [n for n in steps if not isinstance(trial.seen(n, plain), str)] or steps
        folder = min(plain, other, key=lambda way: max(trial.difference(n, way) for n in runs))
    found = {n: best(trial, n, plain, folder) for n in steps}
    if all(one.way is None for one in found.values()):
        told = "; ".join(f"{n}: {one.failure}" for n, one in found.items())
        raise UserError(
            f"steps={list(steps)}: {trial.script.pipeline} runs at none of them: {told}"
        )
    return Choice(folder, found)
