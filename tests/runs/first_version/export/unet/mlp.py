"""VelocityMLP: a small network for points in D dimensions, in diffusers' terms.

It takes what UNet2DModel takes (sample, timestep in 0..1000, class_labels) and predicts
noise - data, so that every stage and sampler treats points as it treats images.

This file needs torch and diffusers alone, so that it can be copied beside exported weights.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class VelocityMLPOutput(BaseOutput):
    """sample: noise - data, [B, D]."""

    sample: Tensor


class VelocityMLP(ModelMixin, ConfigMixin):
    """Predict noise - data at points [B, D] and a time.

    in_channels: D. hidden: width of each of `layers` SiLU layers. time_frequencies: number of pairs
    cos(pi k sigma), sin(pi k sigma), k = 1, 2, ..., seen beside sigma = timestep / 1000 itself: few
    and low, because the velocity is smooth in time.
    num_class_embeds: number of labels, the null class included; None takes no labels. second_time:
    whether it takes a second timestep, as networks of an average velocity do.
    """

    if __name__.startswith("flowmatch."):  # not as remote code, where there is no such package
        __module__ = "flowmatch"  # what model_index.json records and later looks up

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        hidden: int = 128,
        layers: int = 3,
        time_frequencies: int = 2,
        num_class_embeds: int | None = None,
        second_time: bool = False,
    ):
        super().__init__()
        for name, least in {
            "in_channels": 1,
            "hidden": 1,
            "layers": 1,
            "time_frequencies": 0,
        }.items():
            if self.config[name] < least:
                raise ValueError(f"{name}={self.config[name]}: expected at least {least}")
        if num_class_embeds is not None and num_class_embeds < 1:
            raise ValueError(f"num_class_embeds={num_class_embeds}: expected None or at least 1")
        self.first = nn.Linear(in_channels + 1 + 2 * time_frequencies, hidden)
        # added to the first layer's sum, which is what one-hot labels beside the point would do
        self.label = nn.Embedding(num_class_embeds, hidden) if num_class_embeds else None
        times = 1 + 2 * time_frequencies
        self.target = nn.Linear(times, hidden, bias=False) if second_time else None
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(hidden, in_channels)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        target_timestep: Tensor | None = None,
    ) -> VelocityMLPOutput | tuple[Tensor]:
        """Evaluate the network. sample: [B, D]; timestep: 0-dim or [B], 0 to 1000 -> [B, D].

        class_labels: int64 [B], if and only if the network takes labels; target_timestep: like
        timestep, if and only if it takes a second one. Raises ValueError for another shape, and for
        labels or a timestep that is missing or unexpected.
        """
        channels = self.config["in_channels"]
        if sample.ndim != 2 or sample.shape[1] != channels:
            raise ValueError(f"sample is {list(sample.shape)}: expected [B, {channels}]")
        if (class_labels is None) != (self.label is None):
            state = "missing" if class_labels is None else "given"
            raise ValueError(
                f"class_labels are {state}, but num_class_embeds={self.config['num_class_embeds']}"
            )
        if (target_timestep is None) != (self.target is None):
            state = "missing" if target_timestep is None else "given"
            raise ValueError(
                f"target_timestep is {state}, but second_time={self.config['second_time']}"
            )
        time = self.embed(timestep, sample)
        x = self.first(torch.cat([sample, time], dim=1))
        if self.target is not None:
            x = x + self.target(self.embed(target_timestep, sample))
        if self.label is not None:
            x = x + self.label(class_labels)
        x = nn.functional.silu(x)
        for layer in self.inner:
            x = nn.functional.silu(layer(x))
        x = self.last(x)
        return VelocityMLPOutput(sample=x) if return_dict else (x,)

    def embed(self, timestep: Tensor | float | None, sample: Tensor) -> Tensor:
        """Give what the network sees of a timestep, [B, 1 + 2 time_frequencies]."""
        # the angles in float32 at least, whatever the dtype of the network
        wide = torch.promote_types(sample.dtype, torch.float32)
        sigma = torch.as_tensor(timestep, dtype=wide, device=sample.device) / 1000
        sigma = sigma.expand(sample.shape[0])[:, None]
        angle = (
            sigma
            * math.pi
            * torch.arange(1, self.config["time_frequencies"] + 1, device=sample.device)
        )
        return torch.cat([sigma, angle.cos(), angle.sin()], dim=1).to(sample.dtype)
