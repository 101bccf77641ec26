"""The config of a network, and the precisions of its products."""

from typing import Literal

import pydantic

from flowmatch.config import Config, required

Precision = Literal["fp32", "tf32", "bf16"]


class CallConfig(Config):
    """Arguments of a pipeline's call, beside its prompt, its noise and its generator."""

    model_config = pydantic.ConfigDict(extra="allow")


class NetConfig(Config):
    """The network: a class of diffusers, and its keyword arguments beside the name."""

    model_config = pydantic.ConfigDict(extra="allow")

    name: str = required("class of the network; its keyword arguments are net.KEY")
