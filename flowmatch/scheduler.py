"""RectifiedFlowScheduler: few uniform steps along a rectified flow, in diffusers' terms.

There sigma = 1 is noise and 0 is data, x = sigma noise + (1 - sigma) data, the network predicts
noise - data and sees timestep = 1000 sigma, and an Euler step is
prev = x + (sigma_next - sigma) output. The stock flow scheduler spaces N default steps from 1000
to 1 and appends 0, so its two steps are one and a no-op; this one takes sigma = 1 - i/N, then 0.

This file needs torch and diffusers alone, so that it can be copied beside exported weights.
"""

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor


@dataclass
class Interval:
    """One step of the grid under way: where it began, and what the network said so far."""

    x: Tensor  # the state at sigma, float32 or float64
    sigma: float
    h: float  # sigma of the next point less this one's: negative
    outputs: list[Tensor] = field(default_factory=list)  # of the network, one a finished stage


def euler(step: Interval) -> Tensor:
    """Follow the slope at the beginning."""
    return step.x + step.h * step.outputs[0]


def heun(step: Interval) -> Tensor:
    """Follow the slope at the beginning, then the mean of it and the one found there."""
    if len(step.outputs) == 1:
        return step.x + step.h * step.outputs[0]
    return step.x + 0.5 * step.h * (step.outputs[0] + step.outputs[1])


# A solver evaluates the network at these places of a step (0: sigma, 1: sigma_next; the first is
# 0), and after each evaluation says where the next one is or, after the last, where the step ends.
SOLVERS: dict[str, tuple[tuple[float, ...], Callable[[Interval], Tensor]]] = {
    "euler": ((0.0,), euler),
    "heun": ((0.0, 1.0), heun),
}


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):
    """Integrate a rectified flow in N uniform steps, or on a grid of one's own.

    num_train_timesteps: timestep = num_train_timesteps * sigma; 1000 for every network of ours.
    solver: "euler" (one evaluation a step) or "heun" (two, the last step included: second order).
    reflow_round: how often the flow was rectified (0: independent coupling); None is unknown. It is
    a record for samplers that hold for some rounds only, and changes nothing here.

    The scheduler is a state machine: `timesteps` lists every evaluation of the network, `order` of
    them a step, and `sigmas` the sigma of each and a closing 0. Call `step` once for each timestep.

    The state is never half precision. Arithmetic is in float32 (float64 for a float64 sample), and
    the result has the dtype of the SAMPLE passed in, not of the network's output: keep the sample
    in float32 and a half-precision network does not round it. A stock pipeline hands such a network
    half-precision samples; it gets them back so, while the scheduler remembers the float32 value
    behind each and goes on from that wherever the sample comes back unchanged.
    """

    if __name__.startswith("flowmatch."):  # not as remote code, where there is no such package
        __module__ = "flowmatch"  # what model_index.json records and later looks up

    # diffusers drops the keys of these from a foreign config without a warning
    _compatibles: ClassVar[list[str]] = [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
    ]
    order = 1
    init_noise_sigma = 1.0

    num_inference_steps: int | None
    _step_index: int | None
    _begin_index: int | None
    _interval: Interval | None  # the step under way
    _unrounded: Tensor | None  # the float32 state behind a half-precision sample just returned

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        solver: str = "euler",
        reflow_round: int | None = None,
    ):
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r}: expected one of {', '.join(SOLVERS)}")
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps={num_train_timesteps}: expected at least 1")
        if reflow_round is not None and reflow_round < 0:
            raise ValueError(f"reflow_round={reflow_round}: expected None, or 0, 1, 2, ...")
        # A saved config lists every argument. Those at their default count as not given, so that
        # another class's from_config warns only where something would be lost.
        defaults = {"num_train_timesteps": 1000, "solver": "euler", "reflow_round": None}
        plain = [key for key, value in defaults.items() if self.config[key] == value]
        self.register_to_config(_use_default_values=plain)
        self._places, self._advance = SOLVERS[solver]
        self.order = len(self._places)
        self.num_inference_steps = None
        sigmas = _uniform(num_train_timesteps)
        self._lay_out(sigmas, sigmas * num_train_timesteps, None)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of the next evaluation; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position at which the first step begins, if `set_begin_index` gave one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at timesteps[begin_index], a multiple of `order` (image to image)."""
        if not 0 <= begin_index < len(self.timesteps) or begin_index % self.order:
            raise ValueError(
                f"begin_index={begin_index}: expected a multiple of order={self.order} below "
                f"{len(self.timesteps)}, the number of timesteps"
            )
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Choose the grid, and start afresh.

        Give one of num_inference_steps: N steps at sigma = 1 - i/N; sigmas: strictly falling, in
        (0, 1], without the final 0; timesteps: the same times num_train_timesteps. (The first may
        stand beside another whose length it is.) device: where `timesteps` go; `sigmas` stay on the
        CPU. mu: ignored, as by the stock class without dynamic shifting: some pipelines always pass
        it, and this grid is never shifted. Raises ValueError for any other grid.
        """
        steps = num_inference_steps
        if steps is not None and not (isinstance(steps, numbers.Integral) and steps >= 1):
            raise ValueError(f"num_inference_steps={steps}: expected an integer of at least 1")
        if sigmas is not None and timesteps is not None:
            raise ValueError("both sigmas and timesteps are given: one grid; give one of them")
        if sigmas is None and timesteps is None:
            if steps is None:
                raise ValueError("no grid is given: pass num_inference_steps, sigmas or timesteps")
            sigmas = _uniform(steps)
        given, top = (sigmas, 1) if timesteps is None else (timesteps, len(self))
        name = "sigmas" if timesteps is None else "timesteps"
        points = torch.as_tensor(given, dtype=torch.float32, device="cpu")
        falling = points.ndim == 1 and len(points) > 0 and bool((points[1:] < points[:-1]).all())
        if not (falling and points[0] <= top and points[-1] > 0):  # NaN fails too
            raise ValueError(
                f"{name}={given}: expected strictly falling numbers in (0, {top}]; "
                "the final 0 is appended by the scheduler"
            )
        if steps not in (None, len(points)):
            raise ValueError(
                f"num_inference_steps={steps}, but {name} has {len(points)} entries; "
                "leave num_inference_steps out"
            )
        self.num_inference_steps = len(points)
        # in float32, so that both are bit for bit what the stock class makes of either
        both = (points, points * len(self)) if timesteps is None else (points / top, points)
        self._lay_out(*both, device)

    def _lay_out(self, sigmas: Tensor, times: Tensor, device: Any) -> None:
        """List the evaluations of a grid. sigmas, times: float32 [N], without the final 0."""
        place = torch.tensor(self._places, dtype=torch.float64)
        zero = sigmas.new_zeros(1)
        grid, time = (torch.cat([points, zero]).double() for points in (sigmas, times))
        # in float64 places 0 and 1 are exactly the points of the grid
        inner, timesteps = (
            ((1 - place) * points[:-1, None] + place * points[1:, None]).flatten().float()
            for points in (grid, time)
        )
        self.sigmas = torch.cat([inner, zero])
        self.timesteps = timesteps.to(device)
        self._grid: list[float] = grid.tolist()
        self._times: list[float] = timesteps.tolist()
        self._step_index = None
        self._begin_index = None
        self._interval = None
        self._unrounded = None

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """Find the position in `timesteps` of the step that begins at this timestep.

        Heun evaluates most times twice, at the end of a step and at the beginning of the next; the
        latter is meant. Raises ValueError for a time at which no step begins.
        """
        time = _one_time(timestep)
        times = self._times if schedule_timesteps is None else schedule_timesteps.tolist()
        for index in range(0, len(times), self.order):
            if times[index] == time:
                return index
        raise ValueError(
            f"timestep={time:g}: no step of this schedule begins there; pass one of "
            f"scheduler.timesteps: {_listed(times[:: self.order])}"
        )

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the sample as it is: a flow network takes it unscaled."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the network's output at `timestep`, and say at which sample to evaluate it next.

        model_output: noise - data, [B, ...] as sample. timestep: the entry of `timesteps` whose
        turn it is. sample: the noise, or what `step` returned last; within a step (Heun's second
        evaluation) it is not read, the step goes on from its beginning. generator: pipelines pass
        it; these solvers draw nothing. Returns prev_sample in the dtype of sample. Raises
        ValueError for an integer timestep, one whose turn it is not, and a call past the end.
        """
        time = _one_time(timestep)
        if self.num_inference_steps is None:
            raise ValueError("step before set_timesteps: call scheduler.set_timesteps(N) first")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output is {list(model_output.shape)}, sample {list(sample.shape)}: expected"
                " the same; a network that predicts a variance too is no velocity network"
            )
        index = self._step_index if self._step_index is not None else self._begin_index
        if index is None:
            index = self.index_for_timestep(time)
        if index >= len(self._times):
            raise ValueError(
                f"step past the end: all {len(self._times)} evaluations of this schedule are done; "
                "call scheduler.set_timesteps before the next sample"
            )
        if time != self._times[index]:
            raise ValueError(
                f"timestep={time:g}, but evaluation {index} of this schedule is at "
                f"{self._times[index]:g}; go through scheduler.timesteps in order: "
                f"{_listed(self._times)}"
            )
        if self._interval is None:
            x = sample.to(torch.promote_types(sample.dtype, torch.float32))
            kept = self._unrounded
            if kept is not None and kept.shape == x.shape and kept.device == x.device:
                x = torch.where(kept.to(sample.dtype) == sample, kept, x)
            sigma, sigma_next = self._grid[index // self.order :][:2]
            self._interval = Interval(x, sigma, sigma_next - sigma)
        step = self._interval
        step.outputs.append(model_output.to(step.x.dtype))
        following = self._advance(step)
        prev_sample = following.to(sample.dtype)
        self._step_index = index + 1
        if self._step_index % self.order == 0:
            self._interval = None
            self._unrounded = following if prev_sample.dtype != following.dtype else None
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Put data on the straight path, sigma noise + (1 - sigma) sample (arXiv 2209.03003).

        sample, noise: [B, ...]; timestep: a number, 0-dim, [1] or [B], anywhere in [0, 1000]: it
        need not be on the schedule, and an integer is a time like any other. Computed in float32,
        returned in the dtype of sample.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        time = torch.as_tensor(timestep, dtype=dtype, device=sample.device)
        if time.ndim > 1 or time.numel() not in (1, len(sample)) or noise.shape != sample.shape:
            raise ValueError(
                f"sample is {list(sample.shape)}, noise {list(noise.shape)}, timestep "
                f"{list(time.shape)}: expected noise like sample, and one timestep or one a sample"
            )
        sigma = (time / len(self)).reshape(-1, *[1] * (sample.ndim - 1))
        return (sigma * noise.to(dtype) + (1 - sigma) * sample.to(dtype)).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Do what `scale_noise` does, under the name that older pipelines call."""
        return self.scale_noise(original_samples, timesteps, noise)


def _uniform(steps: int) -> Tensor:
    """Space N steps evenly from noise: sigma = 1 - i/N, float32 [N], without the final 0."""
    return torch.tensor([1 - i / steps for i in range(steps)], dtype=torch.float32)


def _one_time(timestep: Any) -> float:
    """Read one float timestep, rounded to float32 as the schedule is; refuse integers."""
    tensor = torch.is_tensor(timestep)
    if tensor and timestep.numel() != 1:
        raise ValueError(f"timestep is {list(timestep.shape)}: expected one for the whole batch")
    if isinstance(timestep, numbers.Integral) or (tensor and not timestep.is_floating_point()):
        raise ValueError(
            f"timestep={timestep} is an integer, so an index or a rounded time; pass one of "
            "scheduler.timesteps, which are floats"
        )
    return torch.tensor(float(timestep), dtype=torch.float32).item()


def _listed(times: list[float]) -> str:
    """Write a schedule for an error, or at least its beginning."""
    return f"[{', '.join(f'{time:g}' for time in times[:8])}{', ...' * (len(times) > 8)}]"
