"""RectifiedFlowScheduler: few steps along a rectified flow, with the interface of diffusers.

diffusers' terms: sigma = 1 is noise and 0 is data, x = sigma noise + (1 - sigma) data, the network
predicts noise - data and takes timestep = 1000 sigma, and an Euler step is
prev = x + (sigma_next - sigma) output. By default the stock flow scheduler spaces N steps from 1000 to 1
and appends 0, which makes its two steps one step and a step of almost no length. This scheduler uses
sigma = 1 - i/N, then 0.

This file imports torch and diffusers only: users may copy it next to weights. It repeats two formulas of
`flowmatch.flow` (shift, AB2), in a form that matches the stock class bit for bit in float32 and does not
call the network.
"""

import inspect
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# A solver is a tuple of stages. A stage takes a network output, then goes from the beginning of the step
# to a place in it (0: sigma, 1: sigma_next) along the weighted mean of all slopes of the step. The first
# evaluation of the network is at place 0, each later one at the place of the stage before it.
Stage = tuple[float, tuple[int, ...]]  # (place, weights)
Time = float | Tensor
Number = float | Tensor  # a tensor [], float64 on the CPU, in a compiled step
SOLVERS: dict[str, tuple[Stage, ...]] = {
    "euler": ((1, (1,)),),
    "midpoint": ((0.5, (1,)), (1, (0, 1))),
    "heun": ((1, (1,)), (1, (1, 1))),
    "rk4": ((0.5, (1,)), (0.5, (0, 1)), (1, (0, 0, 1)), (1, (1, 2, 2, 1))),
    "ab2": ((1, (1,)),),  # its first step; later ones use `adams_bashforth`
}
# Values that these keys must have in the config of another class; others mean another grid or network.
FLAGS = "karras_sigmas exponential_sigmas beta_sigmas lu_lambdas dynamic_shifting"
USUAL: dict[str, Any] = {f"use_{flag}": False for flag in FLAGS.split()}
USUAL |= {"invert_sigmas": False, "stochastic_sampling": False, "shift_terminal": None}
USUAL |= {"final_sigmas_type": "zero", "prediction_type": "flow_prediction"}
# In every config, for from_config of other classes: multistep solvers then take the same flow, and those
# that know no flow raise an error, where they would otherwise sample as if the network predicted noise.
OTHERS: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW = {"shift", "flow_shift", "prediction_type", "use_flow_sigmas"}  # one is in each flow's config


def runge_kutta(x: Tensor, h: Number, slopes: list[Tensor], stage: Stage) -> Tensor:
    """Compute the state after one stage of a step.

    Args:
        x: State at the beginning of the step, [B, ...].
        h: sigma_next - sigma, negative.
        slopes: Network outputs of the step so far.
        stage: Of SOLVERS.
    """
    place, weights = stage
    total = sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)
    return x + h * place / sum(weights) * total


def adams_bashforth(x: Tensor, h: Number, slope: Tensor, before: tuple[Number, Tensor]) -> Tensor:
    """Take a step of Adams-Bashforth 2.

    Args:
        x: State at the beginning of the step, [B, ...].
        h: sigma_next - sigma, negative.
        slope: Network output at x.
        before: h and slope of the previous step.
    """
    back = h / (2 * before[0])
    return x + h * ((1 + back) * slope - back * before[1])


def stochastic(
    x: Tensor, sigma: Number, after: Number, slope: Tensor, eta: float, churn: float, generator: Any
) -> Tensor:
    """Take an Euler step, and replace some of the noise in x with fresh noise z.

    eta is DDIM's: the step goes to data + after (rho noise + sqrt(1 - rho^2) z); eta = 1 is DDPM (arXiv
    2010.02502, eq. 12 and 16). churn is Euler-Maruyama on the SDE with the same marginals,
    dx = [v + w^2 score / 2] dt + w dW with w^2 = 2 churn sigma, whose drift is
    (1 + churn t) v - churn x = v - churn noise in the time t of the math. Not for the last step, to 0,
    which is Euler's alone.

    Args:
        x: State, [B, ...].
        sigma: Of x.
        after: sigma after the step.
        slope: Network output at x.
        eta: In [0, 1].
        churn: In [0, 2]; used if eta is 0.
        generator: As in `RectifiedFlowScheduler.step`.
    """
    h = after - sigma
    if eta:
        kept = (1 - sigma) * after / ((1 - after) * sigma)
        share = eta * (1 - kept**2) ** 0.5  # sqrt(1 - rho^2)
        lost, fresh = after * (1 - (1 - share**2) ** 0.5), after * share
    else:
        lost, fresh = -churn * h, (-2 * churn * sigma * h) ** 0.5
    end = x + h * slope - lost * (x + (1 - sigma) * slope)
    return end + fresh * randn_tensor(x.shape, generator, x.device, x.dtype)


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):
    """Integrate a rectified flow in N steps, on a uniform, shifted or explicit grid.

    `timesteps` lists every evaluation of the network, `order` of them per step; `sigmas` lists the sigma
    of each and a final 0. Call `step` once for each timestep, in order.

    Arithmetic is in float32 (float64 for a float64 sample), and the result has the dtype of the sample
    passed in, not of the network's output. For a half-precision sample the scheduler keeps the float32
    state, and continues from it if the sample comes back unchanged.

    Args:
        num_train_timesteps: timestep = num_train_timesteps * sigma; 1000 for all networks of flowmatch.
        solver: "euler" (first order), "midpoint" or "heun" (second order, two evaluations per step),
            "rk4" (fourth order, four evaluations), "ab2" (second order, one evaluation: it uses the
            slope of the previous step; its first step is Euler's).
        reflow_round: How often the flow was rectified (0: independent coupling); None if unknown.
        eta: With "euler": DDIM's fresh noise, in [0, 1]; 1 is DDPM.
        churn: With "euler": fresh noise of the SDE with w^2 = 2 churn sigma, in [0, 2]. Only one of eta
            and churn may be set. Both derive a score from the velocity, which is valid for independent
            coupling only; they are rejected if reflow_round >= 1.
        shift: sigma' = shift sigma / (1 + (shift - 1) sigma), for every grid of sigmas including
            explicit ones, as in the stock class; above 1 steps are short near noise (arXiv 2403.03206,
            eq. 23).

    Raises:
        ValueError: For values outside these ranges.
    """

    if __name__.startswith("flowmatch."):  # remote code has no such package
        __module__ = "flowmatch"  # written to model_index.json, and imported when it is loaded

    # diffusers drops keys of these classes without a warning; from_config checks them
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
        no_score = "after reflow, noise and data are dependent, and the velocity yields no score"
        in_range = 0 <= eta <= 1 and 0 <= churn <= 2  # NaN is not
        for wrong, message in (
            (solver not in SOLVERS, f"solver={solver!r}: expected one of {', '.join(SOLVERS)}"),
            (num_train_timesteps < 1, f"{num_train_timesteps=}: expected at least 1"),
            (
                not 0 < shift < float("inf"),
                f"{shift=}: expected more than 0, and finite; 1 is uniform",
            ),
            ((reflow_round or 0) < 0, f"{reflow_round=}: expected None, or 0, 1, 2, ..."),
            (not in_range, f"{noise}: expected eta in [0, 1] and churn in [0, 2]"),
            (eta and churn, f"{noise}: these are two different samplers; set one of them to 0"),
            (
                noisy and solver != "euler",
                f"{noise} with {solver=}: fresh noise needs solver='euler'",
            ),
            (noisy and reflow_round, f"{noise} with {reflow_round=}: {no_score}; set both to 0"),
        ):
            if wrong:
                raise ValueError(message)
        self.register_to_config(**OTHERS, flow_shift=shift)
        self.order = len(SOLVERS[solver])
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps: int | None = None  # the grid is not chosen yet

    @classmethod
    def from_config(cls, config: Any, *others: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Create a scheduler from the config of another flow scheduler, with `flow_shift` as `shift`.

        Args:
            config: Config of this or of another class.
            others: As in diffusers.
            kwargs: Values that override the config.

        Raises:
            ValueError: For two different shifts, for a class that knows no flow, and for values that
                change the grid or the prediction in ways that this class does not have. shift_terminal
                is one: 1/N is uniform for N steps only, and the number of steps is unknown here.
        """
        config = {**config, **{k: kwargs.pop(k) for k in USUAL if k in kwargs}}
        known = inspect.signature(cls).parameters.keys() | FLOW
        strange = [key for key in config if key not in known and not key.startswith("_")]
        if strange and not FLOW & config.keys():
            raise ValueError(
                f"a config of {', '.join(strange[:3])} ... does not say that the network predicts noise "
                "- data; if it does, pass prediction_type='flow_prediction' as well"
            )
        lost = {k: config[k] for k, usual in USUAL.items() if (config.get(k) or usual) != usual}
        if lost:
            given, plain = (", ".join(f"{k}={d[k]!r}" for k in lost) for d in (lost, USUAL))
            raise ValueError(
                f"{given}: grids are uniform or shifted here, and networks predict noise - data; "
                f"pass {plain} as well to ignore it"
            )
        # After a switch a config has both names: that of its class, and what the class before left.
        moved = kwargs.pop("flow_shift", config.pop("flow_shift", None))
        if moved is not None and "shift" not in kwargs:
            if config.get("shift", moved) != moved:
                raise ValueError(
                    f"shift={config['shift']} and flow_shift={moved}: the config has both, of two "
                    "classes; pass shift= as well"
                )
            if "shift" not in config and moved != 1:
                kwargs = {"shift": moved, **kwargs}
        if config.get("shift", 1) != 1:  # diffusers drops it where it is the other class's default
            kwargs = {"shift": config["shift"], **kwargs}
        own = {key: value for key, value in config.items() if key not in OTHERS}
        return super().from_config(own, *others, **kwargs)

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
        """Choose the grid and reset the state. Give one of num_inference_steps, sigmas and timesteps.

        Some pipelines pass the default grid of the stock class, N numbers from 1 to
        1 / num_train_timesteps, or its rounded timesteps, or both (Bria, CogView4). Of its N steps the
        last has no length; it is taken as N steps at sigma = 1 - i/N.

        Args:
            num_inference_steps: N steps at sigma = 1 - i/N.
            device: Of `timesteps`; `sigmas` stay on the CPU.
            sigmas: Strictly falling, in (0, 1], without the final 0.
            mu: Ignored, as in the stock class without dynamic shifting.
            timesteps: num_train_timesteps times the sigmas; not shifted. Beside sigmas they must be
                equal to them, but for rounding to integers, and the sigmas count.

        Raises:
            ValueError: For any other grid.
        """
        steps = num_inference_steps
        if sigmas is not None and timesteps is not None:
            apart = len(sigmas) != len(timesteps) or any(
                abs(len(self) * float(s) - float(t)) > 1
                for s, t in zip(sigmas, timesteps, strict=True)
            )
            if apart:
                raise ValueError(
                    f"both sigmas={sigmas} and timesteps={timesteps} are given, and timesteps are not "
                    f"{len(self)} times the sigmas; pass one of them"
                )
            timesteps = None
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
            raise ValueError(f"{name}={given}: {expected}; the final 0 is appended automatically")
        if steps not in (None, len(points)):
            raise ValueError(f"num_inference_steps={steps}, but {name} has {len(points)} entries")
        self.num_inference_steps = N = len(points)
        usual = torch.linspace(top, top / len(self), N)  # of the stock class
        if 1 < N < len(self) / 2 and float((points - usual).abs().max()) <= 1.001 * top / len(self):
            points = torch.tensor([top * (1 - i / N) for i in range(N)])
        if timesteps is None:  # in float32, to equal the stock class bit for bit
            points = self.config["shift"] * points / (1 + (self.config["shift"] - 1) * points)
            self._lay_out(points, points * len(self), device)
        else:
            self._lay_out(points / len(self), points, device)

    def _lay_out(self, sigmas: Tensor, times: Tensor, device: Any) -> None:
        """Compute the evaluations of a grid. sigmas, times: float32 [N], without the final 0."""
        place = torch.tensor([0.0, *(p for p, _ in SOLVERS[self.config["solver"]][:-1])]).double()
        both = torch.stack([sigmas, times]).double()
        both = torch.cat([both, both.new_zeros(2, 1)], dim=1)  # of sigmas and of times, [2, N + 1]
        # in float64, places 0 and 1 are exactly the points of the grid
        inner = (1 - place) * both[:, :-1, None] + place * both[:, 1:, None]
        sigmas, timesteps = inner.flatten(1).float()
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self.timesteps = timesteps.to(device)
        self._grid: list[float] = both[0].tolist()
        self._times: list[float] = timesteps.tolist()
        self._traced = (
            both[0],
            timesteps,
        )  # the same for a compiled step, of one graph for any index
        self.step_index: int | None = None  # position in `timesteps` of the next evaluation
        self.begin_index: int | None = None  # position of the first, if set_begin_index was called
        self._slopes: list[Tensor] = []  # noise - data, for each finished stage of the current step
        self._before: tuple[Number, Tensor] | None = (
            None  # h and slope of the previous step, for AB2
        )
        self._unrounded: Tensor | None = None  # float32 state of a returned half-precision sample

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at timesteps[begin_index], for image-to-image sampling.

        Args:
            begin_index: A multiple of `order`.

        Raises:
            ValueError: For an index at which no step begins.
        """
        if not 0 <= begin_index < len(self.timesteps) or begin_index % self.order:
            fits = f"a multiple of order={self.order} below {len(self.timesteps)}"
            raise ValueError(f"{begin_index=}: expected {fits}, the number of timesteps")
        self.begin_index = begin_index

    def index_for_timestep(self, timestep: Time, schedule_timesteps: Tensor | None = None) -> int:
        """Return the position in `timesteps` of the step that begins at a timestep.

        Heun evaluates most times twice, at the end of a step and at the beginning of the next; the
        position is that of the beginning.

        Args:
            timestep: A number of `timesteps`.
            schedule_timesteps: Timesteps to search instead.

        Raises:
            ValueError: For a time at which no step begins.
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
        """Return the sample unchanged: flow networks take unscaled input."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Time,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the network's output at `timestep`, and return the sample for the next evaluation.

        Args:
            model_output: noise - data, [B, ...] like sample.
            timestep: The next entry of `timesteps`. Where its value is unknown without waiting for a
                device (a copy of an entry on a GPU, a compiled step), one out of turn makes NaN.
            sample: The noise, or the result of the previous call. Within a step (Heun's second
                evaluation) it is ignored: the step continues from its beginning.
            generator: Source of the noise of eta and churn: one, or one per sample, which makes a
                sample independent of its batch; torch's default if a pipeline passes none, like
                StableDiffusion3Pipeline.
            return_dict: Whether to return a SchedulerOutput instead of a tuple.

        Returns:
            prev_sample, in the dtype of sample.

        Raises:
            ValueError: For an integer timestep, one out of turn, and shapes that do not match.
        """
        time = self._known(timestep)
        if self.num_inference_steps is None:
            raise ValueError("step before set_timesteps: call scheduler.set_timesteps(N) first")
        if model_output.shape != sample.shape:
            shapes = (
                f"model_output has shape {list(model_output.shape)}, sample {list(sample.shape)}"
            )
            why = "a network that also predicts a variance is not supported"
            raise ValueError(f"{shapes}: expected the same shape ({why})")
        if isinstance(generator, list) and len(generator) != len(sample):
            raise ValueError(f"generator is a list of {len(generator)}: expected {len(sample)}")
        compiling = torch.compiler.is_compiling()
        index = self.step_index if self.step_index is not None else self.begin_index
        if index is None:
            if time is None and not compiling:
                time = _one_time(timestep)  # like the stock class, which waits once, too
            index = 0 if time is None else self.index_for_timestep(time)
        if index >= (n := len(self._times)):
            raise ValueError(f"step past the end: all {n} evaluations are done; call set_timesteps")
        grid, times = self._traced if compiling else (self._grid, self._times)
        due = times[index]
        if time is not None and time != due:
            at = f"evaluation {index} of this schedule is at {due:g}"
            raise ValueError(f"timestep={time:g}, but {at}; use scheduler.timesteps in order")
        if not self._slopes:
            self._x = sample.to(torch.promote_types(sample.dtype, torch.float32))
            kept = self._unrounded
            if kept is not None and kept.shape == sample.shape and kept.device == sample.device:
                self._x = torch.where(kept.to(sample.dtype) == sample, kept, self._x)
        x, slopes = self._x, [*self._slopes, model_output.to(self._x.dtype)]
        solver, eta, churn = (self.config[key] for key in ("solver", "eta", "churn"))
        turn, stage = index // self.order, index % self.order  # dynamo has no divmod
        sigma, after = grid[turn], grid[turn + 1]
        if (eta or churn) and turn + 1 < self.num_inference_steps:
            end = stochastic(x, sigma, after, slopes[0], eta, churn, generator)
        elif self._before is not None:
            end = adams_bashforth(x, after - sigma, slopes[0], self._before)
        else:
            end = runge_kutta(x, after - sigma, slopes, SOLVERS[solver][stage])
        if time is None:
            assert isinstance(timestep, Tensor)
            end = end + torch.where(timestep.float() == due, 0.0, float("nan")).reshape(())
        prev_sample = end.to(sample.dtype)
        self.step_index, self._slopes = index + 1, slopes
        if stage + 1 == self.order:
            self._slopes = []
            self._before = (after - sigma, slopes[0]) if solver == "ab2" else None
            self._unrounded = end if prev_sample.dtype != end.dtype else None
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _known(self, timestep: Time) -> float | None:
        """Return a timestep as a number, rounded like the schedule; None if that waits for a device.

        An entry of `timesteps` is known by its place, on any device.
        """
        if not isinstance(timestep, Tensor):
            return _one_time(timestep)
        _check_time(timestep)
        if torch.compiler.is_compiling():
            return None
        mine, given = (t.untyped_storage().data_ptr() for t in (self.timesteps, timestep))
        if mine == given != 0 and timestep.dtype == self.timesteps.dtype:
            place = timestep.storage_offset() - self.timesteps.storage_offset()
            if 0 <= place < len(self._times):
                return self._times[place]
        return _one_time(timestep) if timestep.device.type == "cpu" else None

    def scale_noise(self, sample: Tensor, timestep: Time, noise: Tensor) -> Tensor:
        """Interpolate between data and noise: sigma noise + (1 - sigma) sample (arXiv 2209.03003).

        Args:
            sample: Data [B, ...].
            timestep: In [0, 1000], on the schedule or not, integer or not: a number, or a tensor [],
                [1] or [B].
            noise: Like sample.

        Returns:
            [B, ...] in the dtype of sample, computed in float32.

        Raises:
            ValueError: For shapes that do not match.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        time = torch.as_tensor(timestep, dtype=dtype, device=sample.device)
        if time.ndim > 1 or time.numel() not in (1, len(sample)) or noise.shape != sample.shape:
            raise ValueError(
                f"sample has shape {list(sample.shape)}, noise {list(noise.shape)}, timestep "
                f"{list(time.shape)}: expected noise like sample, and one timestep or one per sample"
            )
        sigma = (time / len(self)).reshape(-1, *[1] * (sample.ndim - 1))
        return (sigma * noise.to(dtype) + (1 - sigma) * sample.to(dtype)).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Call `scale_noise`, under the name that older pipelines use."""
        return self.scale_noise(original_samples, timesteps, noise)


def _one_time(timestep: Any) -> float:
    """Return a float timestep, rounded to float32 like the schedule. Raise ValueError for an integer."""
    time = torch.as_tensor(timestep)
    _check_time(time)
    return time.float().item()


def _check_time(time: Tensor) -> None:
    if time.numel() != 1:
        raise ValueError(f"timestep has shape {list(time.shape)}: expected one for the whole batch")
    if not time.is_floating_point():
        what = "an integer: an index, or a rounded time"
        raise ValueError(f"timestep={time} is {what}; pass a float of scheduler.timesteps")
