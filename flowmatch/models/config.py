"""The config of a network, and of its arithmetic."""

from typing import Literal

import pydantic

from flowmatch.config import Config, required

Precision = Literal["fp32", "tf32", "bf16"]


class NetConfig(Config):
    """The network: a diffusers class, and its own keyword arguments beside the name."""

    model_config = pydantic.ConfigDict(extra="allow")

    name: str = required("class of the network; its keyword arguments stand beside it as net.KEY")
