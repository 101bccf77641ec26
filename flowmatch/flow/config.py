"""The configs of the math: couplings, times, losses, objectives, grids, solvers, samplers."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import pydantic

from flowmatch.config import Config, LocalPath, UserError, option, used


class CouplingConfig(Config):
    """How stage 1 pairs noise with data."""

    name: Literal["independent", "optimal_transport"] = option(
        "independent",
        "independent: fresh noise for each sample; optimal_transport: the noises of a block of the "
        "batch are permuted to the smallest sum of |x1 - x0|^2",
    )
    block: int = option(
        64,
        "optimal_transport: consecutive positions of the global batch that are matched together; "
        "the micro-batch of a process must be a multiple",
        ge=2,
    )

    @pydantic.field_validator("block")
    @classmethod
    def _used(cls, value: int, info: pydantic.ValidationInfo) -> int:
        return used(cls, value, info, "name", "optimal_transport")


class TimesConfig(Config):
    """The density of the times of a training stage."""

    name: Literal["uniform", "logit_normal", "u_shape", "noise_heavy"] = option(
        "uniform", "density of t in [0, 1]"
    )
    mean: float = option(0.0, "logit_normal: mean of logit(t)")
    std: float = option(1.0, "logit_normal: standard deviation of logit(t)", gt=0)
    a: float = option(
        4.0, "u_shape: steepness; towards 0 it is uniform, 4 is that of 2-rectified flow++", gt=0
    )
    zero: float = option(
        0.0,
        "share of times that are exactly 0; with objective.name=segments, the starts of the windows, in "
        "equal parts",
        ge=0,
        le=1,
    )

    @pydantic.field_validator("mean", "std", "a")
    @classmethod
    def _used(cls, value: float, info: pydantic.ValidationInfo) -> float:
        name = "u_shape" if info.field_name == "a" else "logit_normal"
        return used(cls, value, info, "name", name)


class LossConfig(Config):
    """The loss on the velocity."""

    name: Literal["mse", "pseudo_huber", "normalised", "feature"] = option(
        "mse",
        "loss on the velocity of a sample; feature: pseudo-Huber on features of the predicted data "
        "(reflow only)",
    )
    c: float = option(
        0.5,
        "pseudo_huber, feature with power=0: where it turns from quadratic to linear, in units of |v|",
        gt=0,
    )
    features: LocalPath | None = option(
        None,
        "feature: sealed folder of train_classifier, not the one that scores the student; or a file "
        "NAME.pt2 from torch.export.save, such as the network of LPIPS with your weights (torch reads "
        "it with pickle: use only a file that you trust); or random, convolutions of random weights, "
        "which need no training",
        run=True,
        validate_default=True,
    )
    power: float = option(
        0.0,
        "normalised, feature: p; the gradient of an error is divided by (|e|^2 + eps)^p; with 1 each "
        "sample has the same weight; 0, for feature alone, is pseudo-Huber",
        ge=0,
        le=1,
        validate_default=True,
    )
    eps: float = option(1e-3, "normalised, feature with power>0: eps, in units of |v|^2", gt=0)

    crop: int | None = option(
        None,
        "feature: side of the square of each sample, at a random place, on which features are compared, "
        "in values (of latents, in theirs); default: all of it",
        ge=1,
    )
    checkpointing: bool = option(
        False,
        "feature, on latents: decode them one by one and again in the backward pass, with the memory "
        "of one picture",
        run=True,
    )
    vae: LocalPath | None = option(
        None,
        "feature, on latents: the VAE that decodes them (default: that of the run of encode, or of the "
        "pipeline)",
        run=True,
    )

    @pydantic.field_validator("crop", "checkpointing", "vae")
    @classmethod
    def _of_feature(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        return used(cls, value, info, "name", "feature")

    @pydantic.field_validator("c", "power", "eps")
    @classmethod
    def _used(cls, value: float, info: pydantic.ValidationInfo) -> float:
        field, chosen = str(info.field_name), info.data.get("name")
        usual = {key: cls.model_fields[key].default for key in ("c", "eps")}
        if field == "power" and not value and chosen == "normalised":
            raise ValueError("name=normalised needs one above 0; use 1")
        if field == "power" and value and info.data.get("c", usual["c"]) != usual["c"]:
            raise ValueError(
                f"with a power more than 0, c has no effect; leave c={info.data['c']} out"
            )
        bare = (chosen, info.data.get("power")) == ("feature", 0)
        if field == "eps" and bare and value != usual["eps"]:
            raise ValueError("with power=0 there is no use for eps; leave it out")
        name = "pseudo_huber" if field == "c" else "normalised"
        return used(cls, value, info, "name", name, "feature")

    @pydantic.field_validator("features")
    @classmethod
    def _named(cls, value: str | None, info: pydantic.ValidationInfo) -> str | None:
        name = info.data.get("name")
        if name == "feature" and value is None:
            raise ValueError(
                "name=feature needs the sealed folder of a train_classifier stage, a .pt2 file, or "
                "features=random"
            )
        return used(cls, value, info, "name", "feature")


class ObjectiveConfig(Config):
    """What a training stage learns."""

    name: Literal["velocity", "meanflow", "segments", "cmt"] = option(
        "velocity",
        "velocity; meanflow: the average velocity u(x, t, r) from t to r, with a second time in the "
        "network: one step is x1 = x0 + u(x0, 0, 1); segments: from each state of a path straight to "
        "the next, for as many equal steps; cmt: from any point of a path straight to its end (both "
        "need pairs.states)",
    )
    equal: float = option(
        0.25, "meanflow: share of samples with r = t, the velocity itself", ge=0, le=1
    )
    end: float = option(
        0.5,
        "meanflow: share of samples with r = 1; the others have a uniform r between t and 1",
        ge=0,
        le=1,
    )
    step: float = option(
        0.05,
        "meanflow: the slope of u along a line is its difference between t - step and t + step; 0 is "
        "the exact derivative, with which networks of sinusoids of 1000 t did not train",
        ge=0,
        le=0.5,
    )

    @pydantic.field_validator("equal", "end", "step")
    @classmethod
    def _used(cls, value: float, info: pydantic.ValidationInfo) -> float:
        return used(cls, value, info, "name", "meanflow")

    @property
    def on_states(self) -> bool:
        """Whether it learns from states of the paths, beside their ends."""
        return self.name in ("segments", "cmt")


class GridConfig(Config):
    """The spacing of a time grid."""

    grid: Literal["uniform", "shift", "sigmoid", "edm", "list"] = option(
        "uniform",
        "spacing of the times from 0 to 1; shift: short steps at the noise, as in diffusers' flow "
        "schedulers; sigmoid: short steps at both ends; edm: uniform in sigma^(1/rho), sigma = "
        "(1 - t) / t; list: the times in points",
    )
    shift: float = option(
        3.0, "grid=shift: 1 is uniform; larger values put more steps at the noise", gt=0
    )
    kappa: float = option(10.0, "grid=sigmoid: steepness; towards 0 it is uniform", gt=0, le=100)
    rho: float = option(7.0, "grid=edm: larger values put more steps at the data", gt=0)
    sigma_min: float = option(0.002, "grid=edm: sigma of the last time before 1", gt=0)
    sigma_max: float = option(
        80.0, "grid=edm: sigma of the first time in EDM, which is moved to 0", gt=0
    )
    points: list[float] = option(
        [], "grid=list: the N + 1 times, from 0 to 1", validate_default=True
    )

    @pydantic.field_validator("shift", "kappa", "rho", "sigma_min", "sigma_max")
    @classmethod
    def _of_grid(cls, value: float, info: pydantic.ValidationInfo) -> float:
        grid = {"shift": "shift", "kappa": "sigmoid"}.get(str(info.field_name), "edm")
        return used(cls, value, info, "grid", grid)

    @pydantic.field_validator("sigma_max")
    @classmethod
    def _ordered(cls, value: float, info: pydantic.ValidationInfo) -> float:
        if value <= info.data.get("sigma_min", 0):
            raise ValueError(f"expected more than sigma_min={info.data['sigma_min']}")
        return value

    @pydantic.field_validator("points")
    @classmethod
    def _listed(cls, value: list[float], info: pydantic.ValidationInfo) -> list[float]:
        used(cls, value, info, "grid", "list")
        if info.data.get("grid") == "list":
            check_times(value)
            if (value[0], value[-1]) != (0, 1):
                raise ValueError("expected times from 0 to 1")
        return value


def check_times(points: Sequence[float]) -> None:
    """Check that times are two or more, strictly monotone, and in [0, 1].

    Raises:
        UserError: They are not.
    """
    steps = [after - before for before, after in pairwise(points)]
    if not steps or not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
        raise UserError(f"grid={list(points)}: expected at least two strictly monotone times")
    if min(points) < 0 or max(points) > 1:
        raise UserError(f"grid={list(points)}: expected times in [0, 1]")


MOST_STEPS = 100_000  # of a sampler
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 1}  # of v, in one step
Fixed = Literal["euler", "midpoint", "heun", "rk4", "ab2"]  # solvers that take the steps of a grid
FIXED = get_args(Fixed)


class SolverConfig(GridConfig):
    """The solver of the ODE from noise to data."""

    name: Literal[Fixed, "dopri5", "own"] = option(
        "heun",
        "ODE solver; dopri5 chooses its own steps from rtol and atol; own, for pairs of prompts, is the "
        "run of the pipeline itself, with its scheduler, steps and guidance",
    )
    steps: int = option(
        32,
        "all but dopri5: steps from noise to data; evaluations in a step: 1 of euler and ab2, 2 of "
        "midpoint and heun, 4 of rk4",
        validate_default=True,
        ge=1,
        le=MOST_STEPS,
    )
    rtol: float = option(1e-5, "dopri5: allowed error of a step, relative to the state", gt=0, lt=1)
    atol: float = option(1e-5, "dopri5: allowed error of a step, absolute", gt=0, lt=1)
    state: Literal["float32", "float64"] = option(
        "float32", "dtype of the state that is integrated"
    )

    @pydantic.field_validator("name")
    @classmethod
    def _own_steps(cls, value: str, info: pydantic.ValidationInfo) -> str:
        if value == "dopri5" and info.data.get("grid", "uniform") != "uniform":
            raise ValueError(f"dopri5 chooses its own steps; leave out grid={info.data['grid']}")
        return value

    @pydantic.field_validator("rtol", "atol")
    @classmethod
    def _used(cls, value: float, info: pydantic.ValidationInfo) -> float:
        return used(cls, value, info, "name", "dopri5")

    @pydantic.field_validator("steps")
    @classmethod
    def _as_listed(cls, value: int, info: pydantic.ValidationInfo) -> int:
        listed = len(info.data.get("points", [])) - 1
        if info.data.get("grid") == "list" and listed > 0 and value != listed:
            raise ValueError(
                f"points has {listed + 1} times, which make {listed} steps; use steps={listed}"
            )
        return value

    @property
    def evaluations(self) -> int | None:
        """Evaluations of the velocity in one integration; None where the solver decides."""
        return self.steps * EVALUATIONS[self.name] if self.name in FIXED else None


class SamplerConfig(GridConfig):
    """The sampler for a given number of steps."""

    name: Literal[Fixed, "sde", "ddim", "ddpm", "anchored"] = option(
        "euler",
        "an ODE solver; or, before reflow, a sampler that adds noise (sde, ddim, ddpm); or, after "
        "reflow, anchored",
    )
    c: float = option(1.0, "sde: c of the diffusion w^2 = 2 c (1 - t); 0 is Euler", ge=0, le=2)
    eta: float = option(
        0.0,
        "ddim: share of the noise that is fresh; 0 is Euler, 1 is ddpm",
        ge=0,
        le=1,
        validate_default=True,
    )

    @pydantic.field_validator("c", "eta")
    @classmethod
    def _used(cls, value: float, info: pydantic.ValidationInfo) -> float:
        return used(cls, value, info, "name", {"c": "sde", "eta": "ddim"}[str(info.field_name)])
