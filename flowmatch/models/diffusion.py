"""Teachers that are no flow models: a diffusers pipeline whose network predicts noise, data or v.

Its scheduler's config tells what the network was trained on; `conversions.Foreign` turns the
prediction into the velocity of our path, within the noise levels that the network knows.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import NotReady, UserError
from flowmatch.flow.conversions import Foreign
from flowmatch.flow.path import expand
from flowmatch.models import networks
from flowmatch.models.velocity import Velocity, classes_of

NETWORKS = ("unet", "transformer")  # the network of a pipeline, by the name of its component
OTHERS = {"scheduler", "vae"}  # what a pipeline may hold beside it; text encoders are beyond us
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Diffusion:
    """What a network was trained to predict, at which noise levels sigma of x1 + sigma x0.

    prediction: "epsilon" (noise), "sample" (data) or "v_prediction". sigmas: the level of timestep 0, 1,
    ..., rising, of a variance-preserving schedule; or, with data_std, the least and the greatest
    level of an EDM network, which is preconditioned for data of that standard deviation.
    """

    prediction: str
    sigmas: tuple[float, ...] = field(repr=False)
    data_std: float | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest holds of it: all that the velocity hangs on beside the network."""
        return asdict(self) | {"sigmas": [self.sigmas[0], self.sigmas[-1], len(self.sigmas)]}

    @cached_property
    def levels(self) -> np.ndarray:
        """Logarithms of the sigmas."""
        return np.log(np.array(self.sigmas))

    def inputs(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Give the factor of y = x1 + sigma x0 and the timestep that the network sees. sigma: [B].

        Between two timesteps of a training schedule it is linear in log sigma. EDM: arXiv 2206.00364,
        table 1.
        """
        if self.data_std is not None:
            return (sigma**2 + self.data_std**2).rsqrt(), sigma.log() / 4
        steps = np.interp(
            sigma.double().log().cpu().numpy(), self.levels, np.arange(len(self.sigmas))
        )
        return (sigma**2 + 1).rsqrt(), torch.from_numpy(steps).to(sigma)

    def data(self, y: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        """Turn the network's output at y = x1 + sigma x0 into a data prediction. y, out: [B, ...]."""
        sigma = expand(sigma, y)
        std = 1.0 if self.data_std is None else self.data_std
        root = (sigma**2 + std**2).sqrt()
        if self.prediction == "sample":
            return out
        if self.prediction == "epsilon" and self.data_std is None:
            return y - sigma * out
        # EDM's output scaling; v = alpha x0 - s x1 is the same with the other sign and std 1
        sign = -1.0 if self.prediction == "v_prediction" else 1.0
        return std**2 / root**2 * y + sign * std * sigma / root * out


class DiffusionVelocity(Velocity):
    """The velocity of a network that predicts noise or data.

    Valid on `span`, the times of the noise levels it knows, and raises UserError outside; `carry` goes
    from noise to data by one evaluation more, the last step, by its data prediction. Guidance is
    linear in the prediction, and so the same as in the velocity. Of a network that gives a variance
    as well (twice the channels) the first half is taken.
    """

    extra = 1

    def __init__(self, net: Any, diffusion: Diffusion, guidance: float = 1.0):
        super().__init__(net, guidance)
        self.diffusion, self.classes = diffusion, own_classes(net)
        if has_no_null(net):
            self.null = None
            if guidance != 1:
                raise UserError(
                    f"guidance={guidance}: this teacher has no null class; use guidance=1"
                )
        self.span = (self._field(None).t_min, self._field(None).t_max)

    def _field(self, cond: dict[str, Tensor] | None) -> Foreign:
        noise = self.diffusion.prediction == "epsilon" and self.diffusion.data_std is None
        return Foreign(
            partial(self._prediction, cond=cond, noise=noise),
            "noise" if noise else "data",
            sigma_min=self.diffusion.sigmas[0],
            sigma_max=self.diffusion.sigmas[-1],
        )

    def _prediction(
        self, y: Tensor, sigma: Tensor, *, cond: dict[str, Tensor] | None, noise: bool
    ) -> Tensor:
        scale, timestep = self.diffusion.inputs(sigma)
        out = self.predict(expand(scale, y) * y, timestep.float(), cond)[:, : y.shape[1]]
        return out if noise else self.diffusion.data(y, out, sigma)

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: dict[str, Tensor] | None = None,
        r: Tensor | float | None = None,
    ) -> Tensor:
        """Evaluate the velocity. x: [B, ...]; t: [B] or a float, in span -> v: [B, ...]."""
        if r is not None:
            raise UserError("r is given, but this network takes a single time")
        return self._field(cond)(x, t)

    def carry(
        self, x0: Tensor, solve: Callable[..., Tensor], cond: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Carry noise to data: (1 - t_min) x0, solve(v, x, span), then the data prediction."""
        field = self._field(cond)
        return field.finish(solve(field, field.start(x0), self.span))

    def invert(
        self, x1: Tensor, solve: Callable[..., Tensor], cond: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Carry data to noise: t_max x1, solve(v, x, span) back to t_min, over 1 - t_min.

        The start leaves out the noise that x has at t_max: (1 - t_max) of its standard deviation.
        """
        field, (low, high) = self._field(cond), self.span
        return solve(field, high * x1, self.span) / (1 - low)


def has_no_null(net: Any) -> bool:
    """Tell whether all class rows of a foreign network are classes: UNet2DModel keeps no null row."""
    return net.config.get("num_class_embeds") is not None


def own_classes(net: Any) -> int | None:
    """Read the number of classes of a foreign network from its own config."""
    return net.config.num_class_embeds if has_no_null(net) else classes_of(net)


def can_be_velocity(net: Any) -> bool:
    """Tell whether a foreign network has the shape of a flow model, and so can be trained as one."""
    return net.config.out_channels == net.config.in_channels and not has_no_null(net)


def read_index(path: str | os.PathLike[str], key: str) -> dict[str, Any]:
    """Read the model_index.json of a diffusers pipeline (folder or hub name).

    Raises UserError naming `key`; NotReady where none is found.
    """
    import diffusers

    try:
        return diffusers.DiffusionPipeline.load_config(path)
    except (OSError, json.JSONDecodeError) as error:
        kind = UserError if Path(path).is_dir() else NotReady
        reason = " ".join(str(error).split())
        raise kind(f"{key}={path}: no diffusers pipeline could be read there: {reason}") from None


def read_pipeline(
    path: str | os.PathLike[str], key: str, index: dict[str, Any]
) -> tuple[Any, Diffusion | None]:
    """Read network and training schedule of a diffusers pipeline; index: its model_index.json.

    Returns None for the schedule of a flow model. Raises UserError, naming `key`, for a pipeline that
    needs text, or whose scheduler does not tell what its network predicts.
    """
    import diffusers

    parts = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    found = [name for name in NETWORKS if name in parts]
    if len(found) != 1 or "scheduler" not in parts or parts - OTHERS - set(found):
        raise UserError(
            f"{key}={path} is a pipeline of {', '.join(sorted(parts))}; expected one network (unet or "
            "transformer), a scheduler, and perhaps a vae"
        )
    name = str(index["scheduler"][1])
    scheduler = getattr(diffusers, name, None)
    if scheduler is None:
        raise UserError(f"{key}={path}: its scheduler {name} is no class of diffusers")
    net = _part(found[0], lambda **where: networks.load(path, key, **where))
    try:
        loaded = _part("scheduler", lambda **where: scheduler.from_pretrained(path, **where))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}={path}: its scheduler cannot be read: {reason}") from None
    return net, diffusion_of(loaded, f"{key}={path}")


def _part(name: str, load: Callable[..., Any]) -> Any:
    """Load a part of a pipeline from its subfolder; where it has none, from the root.

    So old pipelines lie on the hub, such as google/ddpm-cifar10-32; of a local folder diffusers' own
    loading does the same.
    """
    try:
        return load(subfolder=name)
    except (OSError, NotReady):
        return load()


def diffusion_of(scheduler: Any, given: str) -> Diffusion | None:
    """Read off a diffusers scheduler what its network was trained on; None for a flow model.

    Raises UserError, beginning with `given`, where it does not tell.
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if "Flow" in name or prediction == "flow_prediction":
        return None
    if prediction not in PREDICTIONS:
        raise UserError(
            f"{given}: its network predicts {prediction!r}; expected {', '.join(PREDICTIONS)}"
        )
    if name.startswith("EDM"):
        levels = (float(config.sigma_min), float(config.sigma_max))
        return Diffusion(prediction, levels, float(config.sigma_data))
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None:
        raise UserError(
            f"{given}: {name} does not tell the noise levels that the network was trained on; expected "
            "a flow-matching, an EDM, or a DDPM-like scheduler (with alphas_cumprod)"
        )
    kept = torch.as_tensor(kept, dtype=torch.float64)
    kept = kept[kept > 0]  # a schedule rescaled to zero signal at its end knows no sigma there
    sigmas = ((1 - kept) / kept).sqrt()
    if not bool((sigmas.diff() > 0).all()) or not math.isfinite(sigmas[-1]) or sigmas[0] <= 0:
        raise UserError(f"{given}: the noise levels of {name} do not rise with the timestep")
    return Diffusion(prediction, tuple(sigmas.tolist()))
