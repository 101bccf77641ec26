"""Diffusion models as teachers: a diffusers pipeline whose network predicts noise, data or v.

The scheduler's config describes what the network was trained on; `conversions.Foreign` turns the
prediction into the velocity of our path, within the noise levels of that training.
"""

import inspect
import math
import os
import re
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
from flowmatch.models.network import Network
from flowmatch.models.velocity import Condition, Solve, Velocity, classes_of

NETWORKS = ("unet", "transformer")  # names that diffusers gives to the network of a pipeline
OTHERS = {"scheduler", "vae", "vqvae"}  # other components that are accepted; text encoders are not
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Diffusion:
    """What a network was trained to predict, and at which noise levels sigma of x1 + sigma x0.

    Attributes:
        prediction: "epsilon" (noise), "sample" (data) or "v_prediction".
        sigmas: Rising noise levels: of timesteps 0, 1, ... of a variance-preserving schedule; or, with
            `data_std`, the smallest and the largest level of an EDM network.
        data_std: Standard deviation of the data for which an EDM network is preconditioned, or None.
    """

    prediction: str
    sigmas: tuple[float, ...] = field(repr=False)
    data_std: float | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest holds: all that the velocity depends on beside the network."""
        return asdict(self) | {"sigmas": [self.sigmas[0], self.sigmas[-1], len(self.sigmas)]}

    @cached_property
    def levels(self) -> np.ndarray:
        """Logarithms of the sigmas."""
        return np.log(np.array(self.sigmas))

    def inputs(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factor of y = x1 + sigma x0, and the timestep, in the network's input.

        Between two timesteps of a training schedule the timestep is linear in log sigma. EDM: arXiv
        2206.00364, table 1.

        Args:
            sigma: Noise levels, [B].

        Returns:
            The factor and the timestep, [B] each.
        """
        if self.data_std is not None:
            return (sigma**2 + self.data_std**2).rsqrt(), sigma.log() / 4
        steps = np.interp(
            sigma.double().log().cpu().numpy(), self.levels, np.arange(len(self.sigmas))
        )
        return (sigma**2 + 1).rsqrt(), torch.from_numpy(steps).to(sigma)

    def data(self, y: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        """Turn the network's output at y = x1 + sigma x0 into a data prediction.

        Args:
            y: Noisy data, [B, ...].
            out: The output, [B, ...].
            sigma: Noise levels, [B].

        Returns:
            E[x1 | y], [B, ...].
        """
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

    It is valid on `span`, the times of the noise levels of its training; outside it raises UserError.
    `carry` needs one more evaluation: the last step is the data prediction. Guidance is linear in the
    prediction, and therefore the same as in the velocity. A network with twice the channels also
    predicts a variance, which is left out.

    Args:
        net: A diffusers model.
        diffusion: What it was trained on.
        guidance: As in `Velocity`.

    Raises:
        UserError: Guidance is asked of a network without a null class.
    """

    extra = 1

    def __init__(self, net: Network, diffusion: Diffusion, guidance: float = 1.0):
        super().__init__(net, guidance)
        self.diffusion, self.classes = diffusion, own_classes(net)
        if has_no_null(net):
            self.null = None
            if guidance != 1:
                raise UserError(
                    f"guidance={guidance}: this teacher has no null class; use guidance=1"
                )
        self.span = (self._field(None).t_min, self._field(None).t_max)

    def _field(self, cond: Condition | None) -> Foreign:
        noise = self.diffusion.prediction == "epsilon" and self.diffusion.data_std is None
        return Foreign(
            partial(self._prediction, cond=cond, noise=noise),
            "noise" if noise else "data",
            sigma_min=self.diffusion.sigmas[0],
            sigma_max=self.diffusion.sigmas[-1],
        )

    def _prediction(
        self, y: Tensor, sigma: Tensor, *, cond: Condition | None, noise: bool
    ) -> Tensor:
        scale, timestep = self.diffusion.inputs(sigma)
        out = self.predict(expand(scale, y) * y, timestep.float(), cond)[:, : y.shape[1]]
        return out if noise else self.diffusion.data(y, out, sigma)

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Condition | None = None,
        r: Tensor | float | None = None,
    ) -> Tensor:
        """Evaluate the velocity at x [B, ...], t ([B] or a float) in `span`; return v [B, ...]."""
        if r is not None:
            raise UserError("r is given, but this network takes a single time")
        return self._field(cond)(x, t)

    def carry(self, x0: Tensor, solve: Solve, cond: Condition | None = None) -> Tensor:
        """Carry noise to data: (1 - t_min) x0, solve(v, x, span), then the data prediction."""
        field = self._field(cond)
        return field.finish(solve(field, field.start(x0), self.span))

    def invert(self, x1: Tensor, solve: Solve, cond: Condition | None = None) -> Tensor:
        """Carry data to noise: t_max x1, solve(v, x, span) back to t_min, divided by 1 - t_min.

        The start leaves out the noise of standard deviation 1 - t_max that x has at t_max.
        """
        field, (low, high) = self._field(cond), self.span
        return solve(field, high * x1, self.span) / (1 - low)


def has_no_null(net: Network) -> bool:
    """Return whether a foreign network has no null class, as a UNet2DModel has none of its own."""
    return net.config.get("num_class_embeds") is not None


def own_classes(net: Network) -> int | None:
    """Return the number of classes of a foreign network from its config, or None."""
    return net.config.num_class_embeds if has_no_null(net) else classes_of(net)


def can_be_velocity(net: Network) -> bool:
    """Return whether a foreign network has the shape of a flow model and can be trained as one."""
    return net.config.out_channels == net.config.in_channels and not has_no_null(net)


def read_index(path: str | os.PathLike[str], key: str) -> dict[str, Any]:
    """Read the model_index.json of a diffusers pipeline.

    Args:
        path: A folder, or a name on the hub.
        key: Name of the config's key, for the messages.

    Returns:
        Its content.

    Raises:
        UserError: The folder holds no pipeline.
        NotReady: There is no such folder, or no such name on the hub.
    """
    import diffusers

    if not Path(path).exists() and not HUB_NAME.fullmatch(str(path)):
        raise NotReady(f"{key}={path} does not exist; run the stage that makes it first", [path])
    try:
        index = diffusers.DiffusionPipeline.load_config(path)
        if not isinstance(index, dict):
            raise ValueError("model_index.json is not a mapping")
    except (OSError, ValueError, RecursionError) as error:
        message = (
            f"{key}={path}: no diffusers pipeline could be read there: {networks.reason(error)}"
        )
        if Path(path).is_dir():
            raise UserError(message) from None
        raise NotReady(message, [path]) from None
    return index


def read_pipeline(
    path: str | os.PathLike[str], key: str, index: dict[str, Any]
) -> tuple[Any, Diffusion | None]:
    """Read the network and the training schedule of a diffusers pipeline.

    Args:
        path: A folder, or a name on the hub.
        key: Name of the config's key, for the messages.
        index: Its model_index.json.

    Returns:
        The network, and its diffusion, which is None for a flow model.

    Raises:
        UserError: The pipeline has other components, such as a text encoder, or its scheduler does not
            describe the prediction of the network.
    """
    import diffusers

    listed = {name: value for name, value in index.items() if not name.startswith("_")}
    parts = {name for name, value in listed.items() if isinstance(value, list)}
    parts -= {  # numbers of its config
        name
        for name in parts - {*NETWORKS, *OTHERS}
        if listed[name] and set(map(type, listed[name])) <= {int, float}
    }
    if odd := sorted(name for name in parts if len(listed[name]) != 2):
        raise UserError(
            f"{key}={path}: model_index.json has {odd[0]}={listed[odd[0]]!r}; expected [library, class]"
        )
    parts = {name for name in parts if listed[name][0]}
    nets = [name for name in NETWORKS if name in parts]
    if len(nets) != 1 or "scheduler" not in parts or parts - OTHERS - set(nets):
        reads = any(name.startswith(("text_encoder", "tokenizer")) for name in parts)
        raise UserError(
            f"{key}={path} is a pipeline of {', '.join(sorted(parts))}; expected one network (unet or "
            f"transformer), a scheduler, and optionally a vae{'; if it reads text, set prompts' * reads}"
        )
    name = str(index["scheduler"][1])
    scheduler = getattr(diffusers, name, None)
    if not (inspect.isclass(scheduler) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise UserError(f"{key}={path}: its scheduler {name} is not a class of diffusers")
    net = _part(nets[0], lambda **where: networks.load(path, key, **where))
    try:
        loaded = _part("scheduler", lambda **where: scheduler.from_pretrained(path, **where))
        return net, diffusion_of(loaded, f"{key}={path}")
    except UserError:
        raise
    except Exception as error:  # a class of diffusers, given a damaged config, raises anything
        why = networks.reason(error)
        raise UserError(f"{key}={path}: its scheduler cannot be read: {why}") from None


def _part(name: str, load: Callable[..., Any]) -> Any:
    """Load a part of a pipeline from its subfolder, or else from the root of the pipeline.

    Old pipelines on the hub, such as google/ddpm-cifar10-32, have no subfolders; diffusers itself falls
    back to the root of a local folder.
    """
    try:
        return load(subfolder=name)
    except (OSError, NotReady):
        return load()


def diffusion_of(scheduler: Any, origin: str) -> Diffusion | None:
    """Read from a diffusers scheduler what its network was trained on.

    Args:
        scheduler: The scheduler.
        origin: What the messages begin with, such as `teacher=PATH`.

    Returns:
        The diffusion, or None for a flow model.

    Raises:
        UserError: The scheduler does not describe it.
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if "Flow" in name or prediction == "flow_prediction":
        return None
    if prediction not in PREDICTIONS:
        raise UserError(
            f"{origin}: its network predicts {prediction!r}; expected {', '.join(PREDICTIONS)}"
        )
    if name.startswith("EDM"):
        levels = (float(config.sigma_min), float(config.sigma_max))
        return Diffusion(prediction, levels, float(config.sigma_data))
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is None:
        raise UserError(
            f"{origin}: {name} does not describe the noise levels that the network was trained on; "
            "expected a flow-matching, an EDM, or a DDPM-like scheduler (with alphas_cumprod)"
        )
    alphas = torch.as_tensor(products, dtype=torch.float64)
    alphas = alphas[alphas > 0]  # a schedule with zero signal at its end has no sigma there
    sigmas = ((1 - alphas) / alphas).sqrt()
    if not bool((sigmas.diff() > 0).all()) or not math.isfinite(sigmas[-1]) or sigmas[0] <= 0:
        raise UserError(f"{origin}: the noise levels of {name} do not rise with the timestep")
    return Diffusion(prediction, tuple(sigmas.tolist()))
