"""A second time r in a stock network: u(x, t, r), the average velocity from t to r (MeanFlow).

UNet2DModel(class_embed_type="timestep") takes it in place of labels, VelocityMLP(second_time=True) as an
argument of its own, both on the scale of the first: 1000 (1 - r). At r = 1 it folds into a bias, so that
one step, u(x, 0, 1), needs only the plain network.
"""

from typing import Any

import torch

from flowmatch.config import UserError
from flowmatch.models import precision
from flowmatch.models.network import Network

KEYS = ("second_time", "class_embed_type")


def argument(net: Network) -> str | None:
    """Return the name of the argument of a network that takes the second time, or None."""
    if net.config.get("second_time"):
        return "target_timestep"
    return "class_labels" if net.config.get("class_embed_type") == "timestep" else None


def has_attention(net: Network) -> bool:
    """Return whether a network has attention, whose fused kernels have no forward-mode derivative."""
    from diffusers.models.attention_processor import Attention

    return any(isinstance(module, Attention) for module in net.modules())


def refusal(net: Network) -> str | None:
    """Return why a network cannot take a second time, or None where it can."""
    name = type(net).__name__
    if name == "UNet2DModel":
        if net.config.num_class_embeds is not None:
            return "a UNet2DModel with labels has no place for it; use one without labels"
        if net.config.class_embed_type is not None:
            return f"class_embed_type={net.config.class_embed_type!r} takes its place"
        return None
    return None if name == "VelocityMLP" else f"{name} has no place for it; use a UNet2DModel"


@torch.no_grad()
def add(net: Network, seed: int) -> Any:
    """Add a second time to a network; its output does not depend on it at first.

    Args:
        net: A UNet2DModel or a VelocityMLP.
        seed: The weights of the new embedding are a function of it, but for its last layer, which is 0.

    Returns:
        A new network with the weights of the old one.

    Raises:
        UserError: The network cannot take a second time (`refusal`).
    """
    reason = refusal(net)
    if reason is not None:
        raise UserError(f"objective.name=meanflow needs a second time in the network: {reason}")
    mlp = "second_time" in net.config
    extra = {"second_time": True} if mlp else {"class_embed_type": "timestep"}
    with precision.seeded(seed):
        made = _like(net, **extra)
    made.load_state_dict(net.state_dict(), strict=False)
    last = made.target if mlp else made.class_embedding.linear_2
    for parameter in last.parameters():
        parameter.zero_()
    return made.to(net.dtype).train(net.training)


@torch.no_grad()
def fold(net: Any) -> Any:
    """Build the network of a single time u(x, t, 1): what r = 1 adds goes into a bias.

    Args:
        net: A network with a second time.

    Returns:
        A new network without it.
    """
    state = net.state_dict()
    if "second_time" in net.config:
        nowhere = torch.zeros(1, net.config.in_channels, dtype=net.dtype)
        state["first.bias"] = state["first.bias"] + net.target(net.embed(0.0, nowhere))[0]
        made, dropped = _like(net, second_time=False), "target."
    else:
        embedded = net.class_embedding(net.time_proj(torch.zeros(1)).to(net.dtype))
        state["time_embedding.linear_2.bias"] = state["time_embedding.linear_2.bias"] + embedded[0]
        made, dropped = _like(net, class_embed_type=None), "class_embedding."
    made.load_state_dict({k: v for k, v in state.items() if not k.startswith(dropped)})
    return made.to(net.dtype).train(net.training)


def _like(net: Network, **changes: Any) -> Any:
    """Build a network of the same config with some changes."""
    config = {key: value for key, value in net.config.items() if not key.startswith("_")}
    return type(net)(**(config | changes))
