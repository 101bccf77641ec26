"""Training of an adapter: what it cannot be combined with, and its network."""

from typing import Any

from flowmatch.config import UserError, require
from flowmatch.models import adapters
from flowmatch.models.adapters import Writer
from flowmatch.models.config import LoraConfig
from flowmatch.runs.process import world_size
from flowmatch.training.config import FitConfig


def check(config: LoraConfig | None, fit: FitConfig, objective: str) -> None:
    """Check that an adapter can be trained.

    Args:
        config: The adapter; None for none.
        fit: The training loop.
        objective: Name of the objective.

    Raises:
        UserError: A library is missing, or something cannot be combined.
    """
    if config is None:
        return
    require("peft", "text", "lora")
    if objective == "meanflow":
        raise UserError(
            "lora: objective.name=meanflow adds a second time to the network, which an adapter leaves "
            "untrained; leave one of them out"
        )
    if config.quantize is None:
        return
    require("torchao", "8bit", "lora.quantize")
    if not fit.checkpointing:
        raise UserError(
            "lora.quantize needs fit.checkpointing=true: else all layers are kept in floats from the "
            "forward to the backward pass, which takes more memory than no quantisation"
        )
    others = {
        "several processes": world_size() > 1,
        "fit.compile": fit.compile,
        "fit.channels_last": fit.channels_last,
    }
    for other in (name for name, given in others.items() if given):
        raise UserError(f"lora.quantize cannot be combined with {other}; leave one of them out")


def add(net: Any, config: LoraConfig, writer: Writer, seed: int) -> None:
    """Add a new adapter to a network, in place, and quantise what is frozen where it is asked for.

    Raises:
        UserError: A target fits no layer, or the whole network would be written from rounded weights.
    """
    adapters.add(net, config, seed)
    if config.quantize is None:
        return
    if writer.whole:
        raise UserError(
            "lora.quantize: net/ would be the whole network (lora.merge, or a start that reads no "
            "adapters), and this run has its rounded weights alone; leave lora.quantize out"
        )
    adapters.quantise(net)
