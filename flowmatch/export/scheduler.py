"""RectifiedFlowScheduler: few steps along a rectified flow, in diffusers' terms.

There sigma = 1 is noise and 0 is data, x = sigma noise + (1 - sigma) data, the network predicts
noise - data and sees timestep = 1000 sigma, and an Euler step is prev = x + (sigma_next - sigma) output.
The stock flow scheduler spaces N default steps from 1000 to 1 and appends 0, so its two steps are one
and a no-op; this one takes sigma = 1 - i/N, then 0.

This file needs torch and diffusers alone, so that it can be copied beside exported weights.
"""

import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# A solver is the stages of its step: each evaluates the network, then goes from the beginning of the
# step to a place in it (0: sigma, 1: sigma_next) along the mean of all slopes so far, with weights.
# The first evaluation is at place 0, each later one where the stage before it went.
Stage = tuple[float, tuple[int, ...]]  # (place, weights)
Time = float | Tensor
SOLVERS: dict[str, tuple[Stage, ...]] = {
    "euler": ((1, (1,)),),
    "midpoint": ((0.5, (1,)), (1, (0, 1))),
    "heun": ((1, (1,)), (1, (1, 1))),
    "rk4": ((0.5, (1,)), (0.5, (0, 1)), (1, (0, 0, 1)), (1, (1, 2, 2, 1))),
    "ab2": ((1, (1,)),),  # its first step; the others are `adams_bashforth`
}
# In another class's config: what makes another grid of it, or means another network, if not this.
FLAGS = "karras_sigmas exponential_sigmas beta_sigmas lu_lambdas dynamic_shifting"
USUAL: dict[str, Any] = {f"use_{flag}": False for flag in FLAGS.split()}
USUAL |= {"invert_sigmas": False, "stochastic_sampling": False, "shift_terminal": None}
USUAL |= {"final_sigmas_type": "zero", "prediction_type": "flow_prediction"}


def runge_kutta(x: Tensor, h: float, slopes: list[Tensor], stage: Stage) -> Tensor:
    """Do one stage of the table in a step of length h (negative: sigma falls)."""
    place, weights = stage
    total = sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)
    return x + h * place / sum(weights) * total


def adams_bashforth(x: Tensor, h: float, slope: Tensor, before: tuple[float, Tensor]) -> Tensor:
    """Follow the line through this slope and the last step's. before: that step's h and slope."""
    back = h / (2 * before[0])
    return x + h * ((1 + back) * slope - back * before[1])


def stochastic(
    x: Tensor, sigma: float, after: float, slope: Tensor, eta: float, churn: float, generator: Any
) -> Tensor:
    """Do an Euler step to sigma = after, and exchange some of the noise in x for fresh noise z.

    eta: DDIM's step to data + after (rho noise + sqrt(1 - rho^2) z), which is DDPM's for eta = 1
    (arXiv 2010.02502, 12 and 16). churn: Euler-Maruyama on the SDE with the same marginals,
    dx = [v + w^2 score / 2] dt + w dW with w^2 = 2 churn sigma, so that the drift is
    (1 + churn t) v - churn x = v - churn noise in the math's time t. The last step is Euler's alone.
    """
    h = after - sigma
    if after == 0:
        return x + h * slope
    if eta:
        kept = (1 - sigma) * after / ((1 - after) * sigma)
        share = eta * (1 - kept**2) ** 0.5  # sqrt(1 - rho^2)
        lost, fresh = after * (1 - (1 - share**2) ** 0.5), after * share
    else:
        lost, fresh = -churn * h, (-2 * churn * sigma * h) ** 0.5
    end = x + h * slope - lost * (x + (1 - sigma) * slope)
    return end + fresh * randn_tensor(x.shape, generator, x.device, x.dtype)


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):
    """Integrate a rectified flow in N steps, uniform or shifted, or on a grid of one's own.

    num_train_timesteps: timestep = num_train_timesteps * sigma; 1000 for every network of ours.
    shift: sigma' = shift sigma / (1 + (shift - 1) sigma) for every grid of sigmas, those that a caller
    gives too, as the stock class has it; above 1 steps are short at the noise (arXiv 2403.03206, 23).
    solver: "euler" (first order), "midpoint" or "heun" (second, two evaluations a step), "rk4"
    (fourth, four), "ab2" (second with one: it looks back a step; its first step is Euler's).
    reflow_round: how often the flow was rectified (0: independent coupling); None is unknown.
    eta, churn: with "euler", one of them draws fresh noise: DDIM with eta in [0, 1] (1: DDPM), or the
    SDE with w^2 = 2 churn sigma, churn in [0, 2]. Both take a score from the velocity, which holds
    for an independent coupling only: refused for reflow_round >= 1.

    A state machine: `timesteps` lists every evaluation of the network, `order` of them a step, and
    `sigmas` the sigma of each and a closing 0. Call `step` once for each timestep.

    The state is never half precision: arithmetic is in float32 (float64 for a float64 sample), and the
    result has the dtype of the SAMPLE passed in, not of the network's output. Behind a half-precision
    sample stays the float32 value, from which it goes on where the sample comes back unchanged.
    """

    if __name__.startswith("flowmatch."):  # not as remote code, where there is no such package
        __module__ = "flowmatch"  # what model_index.json records and later looks up

    # diffusers drops the keys of these from a foreign config without a warning: see from_config
    _compatibles: ClassVar[list[str]] = ["DPMSolverMultistepScheduler"]
    _compatibles += ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        solver: str = "euler",
        reflow_round: int | None = None,
        eta: float = 0.0,
        churn: float = 0.0,
        shift: float = 1.0,
    ):
        noise, noisy = f"eta={eta}, churn={churn}", bool(eta or churn)
        no_score = "after reflow noise and data are not independent, so the velocity gives no score"
        in_range = 0 <= eta <= 1 and 0 <= churn <= 2  # NaN is not
        for wrong, message in (
            (solver not in SOLVERS, f"solver={solver!r}: expected one of {', '.join(SOLVERS)}"),
            (num_train_timesteps < 1, f"{num_train_timesteps=}: expected at least 1"),
            (not 0 < shift < float("inf"), f"{shift=}: expected more than 0; 1 is uniform"),
            ((reflow_round or 0) < 0, f"{reflow_round=}: expected None, or 0, 1, 2, ..."),
            (not in_range, f"{noise}: expected eta in [0, 1] and churn in [0, 2]"),
            (eta and churn, f"{noise}: these are two samplers; leave one of them at 0"),
            (noisy and solver != "euler", f"{noise} with {solver=}: only Euler's steps take noise"),
            (noisy and reflow_round, f"{noise} with {reflow_round=}: {no_score}; leave both at 0"),
        ):
            if wrong:
                raise ValueError(message)
        # A saved config lists every argument. Those at their default count as not given, so that
        # another class's from_config warns only where something would be lost.
        usual = {"num_train_timesteps": 1000, "solver": "euler", "eta": 0, "churn": 0, "shift": 1}
        plain = [key for key in self.config if self.config[key] == usual.get(key)]
        self.register_to_config(_use_default_values=plain)
        self.order = len(SOLVERS[solver])
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps: int | None = None  # the grid is not chosen yet

    @classmethod
    def from_config(cls, config: Any, *others: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Take over another flow scheduler's config, with its `flow_shift` as `shift`.

        Raises ValueError for what of it would be lost and bends the grid. So does shift_terminal: 1/N
        is uniform in N steps, not in other numbers of them, and nothing here says how many come.
        """
        config = {**config, **{k: kwargs.pop(k) for k in (*USUAL, "flow_shift") if k in kwargs}}
        lost = {k: config[k] for k, usual in USUAL.items() if (config.get(k) or usual) != usual}
        if lost:
            given, plain = (", ".join(f"{k}={d[k]!r}" for k in lost) for d in (lost, USUAL))
            raise ValueError(
                f"{given}: steps here are uniform or moved by shift alone, for networks that predict "
                f"noise - data; to go on with that, pass {plain} as well"
            )
        if "flow_shift" in config:
            kwargs = {"shift": config.pop("flow_shift") or 1, **kwargs}
        return super().from_config(config, *others, **kwargs)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

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
        (0, 1], without the final 0; timesteps: the same times num_train_timesteps. All but timesteps
        are shifted. device: where `timesteps` go; `sigmas` stay on the CPU. mu: ignored, as the stock
        class does unless it shifts dynamically. Raises ValueError for any other grid.
        """
        steps = num_inference_steps
        if sigmas is not None and timesteps is not None:
            raise ValueError("both sigmas and timesteps are given: one grid; give one of them")
        if sigmas is None and timesteps is None:
            if not isinstance(steps, numbers.Integral) or steps < 1:
                raise ValueError(f"num_inference_steps={steps}: expected an integer of at least 1")
            sigmas = [1 - i / steps for i in range(int(steps))]
        given, top = (sigmas, 1) if timesteps is None else (timesteps, len(self))
        name = "sigmas" if timesteps is None else "timesteps"
        points = torch.as_tensor(given, dtype=torch.float32, device="cpu")
        falling = points.ndim == 1 and len(points) > 0 and bool((points[1:] < points[:-1]).all())
        if not (falling and points[0] <= top and points[-1] > 0):  # NaN fails too
            expected = f"expected strictly falling numbers in (0, {top}]"
            raise ValueError(f"{name}={given}: {expected}; the final 0 is appended by itself")
        if steps not in (None, len(points)):
            raise ValueError(f"num_inference_steps={steps}, but {name} has {len(points)} entries")
        self.num_inference_steps = len(points)
        if timesteps is None:  # in float32, so that both are bit for bit what the stock class makes
            points = self.config["shift"] * points / (1 + (self.config["shift"] - 1) * points)
            self._lay_out(points, points * len(self), device)
        else:
            self._lay_out(points / len(self), points, device)

    def _lay_out(self, sigmas: Tensor, times: Tensor, device: Any) -> None:
        """List the evaluations of a grid. sigmas, times: float32 [N], without the final 0."""
        place = torch.tensor([0.0, *(p for p, _ in SOLVERS[self.config["solver"]][:-1])]).double()
        both = torch.stack([sigmas, times]).double()
        both = torch.cat([both, both.new_zeros(2, 1)], dim=1)  # of sigmas and of times, [2, N + 1]
        # in float64 places 0 and 1 are exactly the points of the grid
        inner = (1 - place) * both[:, :-1, None] + place * both[:, 1:, None]
        sigmas, timesteps = inner.flatten(1).float()
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self.timesteps = timesteps.to(device)
        self._grid: list[float] = both[0].tolist()
        self._times: list[float] = timesteps.tolist()
        self.step_index: int | None = None  # in `timesteps`, of the next evaluation
        self.begin_index: int | None = None  # and of the first, where set_begin_index gave it
        self._slopes: list[Tensor] = []  # noise - data, one a finished stage of the step under way
        self._before: tuple[float, Tensor] | None = None  # h and slope of the last step, for AB2
        self._unrounded: Tensor | None = None  # the state behind a half-precision sample returned

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at timesteps[begin_index], a multiple of `order` (image to image)."""
        if not 0 <= begin_index < len(self.timesteps) or begin_index % self.order:
            fits = f"a multiple of order={self.order} below {len(self.timesteps)}"
            raise ValueError(f"{begin_index=}: expected {fits}, the number of timesteps")
        self.begin_index = begin_index

    def index_for_timestep(self, timestep: Time, schedule_timesteps: Tensor | None = None) -> int:
        """Find the position in `timesteps` of the step that begins at this timestep.

        Heun evaluates most times twice, at the end of a step and at the beginning of the next; the
        latter is meant. Raises ValueError for a time at which no step begins.
        """
        time = _one_time(timestep)
        times = self._times if schedule_timesteps is None else schedule_timesteps.tolist()
        starts = times[:: self.order]
        if time not in starts:
            listed = ", ".join([f"{start:g}" for start in starts[:8]] + ["..."] * (len(starts) > 8))
            why = "no step of this schedule begins there; pass one of scheduler.timesteps"
            raise ValueError(f"timestep={time:g}: {why}: [{listed}]")
        return self.order * starts.index(time)

    def scale_model_input(self, sample: Tensor, timestep: Time | None = None) -> Tensor:
        """Return the sample as it is: a flow network takes it unscaled."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Time,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the network's output at `timestep`, and say at which sample to evaluate it next.

        model_output: noise - data, [B, ...] as sample. timestep: the entry of `timesteps` whose turn it
        is. sample: the noise, or what `step` returned last; within a step (Heun's second evaluation) it
        is not read, the step goes on from its beginning. generator: what eta and churn draw from, one,
        or one a sample, which then does not depend on its batch; torch's own where a pipeline
        (StableDiffusion3Pipeline) passes none. Returns prev_sample in the dtype of sample. Raises
        ValueError for an integer timestep, or one whose turn it is not.
        """
        time = _one_time(timestep)
        if self.num_inference_steps is None:
            raise ValueError("step before set_timesteps: call scheduler.set_timesteps(N) first")
        if model_output.shape != sample.shape:
            shapes = f"model_output is {list(model_output.shape)}, sample {list(sample.shape)}"
            why = "a network that predicts a variance too is no velocity network"
            raise ValueError(f"{shapes}: expected the same; {why}")
        if isinstance(generator, list) and len(generator) != len(sample):
            raise ValueError(f"generator is a list of {len(generator)}: expected {len(sample)}")
        index = self.step_index if self.step_index is not None else self.begin_index
        if index is None:
            index = self.index_for_timestep(time)
        if index >= (n := len(self._times)):
            raise ValueError(f"step past the end: all {n} evaluations are done; call set_timesteps")
        if time != (due := self._times[index]):
            at = f"evaluation {index} of this schedule is at {due:g}"
            raise ValueError(f"timestep={time:g}, but {at}; take scheduler.timesteps in order")
        if not self._slopes:
            self._x = sample.to(torch.promote_types(sample.dtype, torch.float32))
            kept = self._unrounded
            if kept is not None and kept.shape == sample.shape and kept.device == sample.device:
                self._x = torch.where(kept.to(sample.dtype) == sample, kept, self._x)
        x, slopes = self._x, [*self._slopes, model_output.to(self._x.dtype)]
        solver, eta, churn = (self.config[key] for key in ("solver", "eta", "churn"))
        turn, stage = divmod(index, self.order)
        sigma, after = self._grid[turn : turn + 2]
        if eta or churn:
            end = stochastic(x, sigma, after, slopes[0], eta, churn, generator)
        elif self._before is not None:
            end = adams_bashforth(x, after - sigma, slopes[0], self._before)
        else:
            end = runge_kutta(x, after - sigma, slopes, SOLVERS[solver][stage])
        prev_sample = end.to(sample.dtype)
        self.step_index, self._slopes = index + 1, slopes
        if stage + 1 == self.order:
            self._slopes = []
            self._before = (after - sigma, slopes[0]) if solver == "ab2" else None
            self._unrounded = end if prev_sample.dtype != end.dtype else None
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def scale_noise(self, sample: Tensor, timestep: Time, noise: Tensor) -> Tensor:
        """Put data on the straight path, sigma noise + (1 - sigma) sample (arXiv 2209.03003).

        sample, noise: [B, ...]; timestep: a number, 0-dim, [1] or [B], anywhere in [0, 1000], on the
        schedule or not, integer or not. Computed in float32, returned in the dtype of sample.
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


def _one_time(timestep: Any) -> float:
    """Read one float timestep, rounded to float32 as the schedule is; refuse integers."""
    time = torch.as_tensor(timestep)
    if time.numel() != 1:
        raise ValueError(f"timestep is {list(time.shape)}: expected one for the whole batch")
    if not time.is_floating_point():
        what = "an integer, so an index or a rounded time, and these are floats"
        raise ValueError(f"timestep={timestep} is {what}; pass one of scheduler.timesteps")
    return time.float().item()
