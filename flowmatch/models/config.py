"""The configs of a network, of its adapter and of a pipeline's call; the precisions of products."""

from typing import Literal

import pydantic

from flowmatch.config import Config, option, required

Precision = Literal["fp32", "tf32", "bf16"]


class CallConfig(Config):
    """Arguments of a pipeline's call, beside its prompt, its noise and its generator."""

    model_config = pydantic.ConfigDict(extra="allow")


class NetConfig(Config):
    """The network: a class of diffusers, and its keyword arguments beside the name."""

    model_config = pydantic.ConfigDict(extra="allow")

    name: str = required(
        "class of the network: VelocityMLP, a model of diffusers, or package.module:Class with "
        "trust=package.module on the command line; its keyword arguments are net.KEY"
    )


class LoraConfig(Config):
    """An adapter: low-rank updates of some layers of a frozen network (LoRA)."""

    rank: int = option(16, "rank of the update of each layer", ge=1)
    alpha: float | None = option(
        None, "the update is scaled by alpha / rank; null: alpha = rank", gt=0
    )
    targets: list[str] = option(
        ["to_q", "to_k", "to_v", "to_out.0"],
        "layers that are adapted, by the ends of their names; all: every linear layer",
        min_length=1,
    )
    dropout: float = option(0.0, "share of a layer's input that its update drops", ge=0, lt=1)
    merge: bool = option(
        False,
        "write net/ as the whole network with the adapter in its weights; else the adapter alone, as "
        "load_lora_weights and ComfyUI read it (always whole where the pipeline reads no adapters, and "
        "for a network that reads no prompts)",
    )
    quantize: Literal["int8"] | None = option(
        None,
        "int8: hold the frozen linear layers rounded, a byte a weight and a scale a row (torchao); "
        "needs fit.checkpointing=true and one process. The adapter is written for the layers as they "
        "are in the files of start",
    )

    @property
    def scale(self) -> float:
        """What an update is multiplied by."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank
