"""A second time r in a stock network: u(x, t, r), the average velocity from t to r (MeanFlow).

UNet2DModel(class_embed_type="timestep") takes it where labels would stand, VelocityMLP(second_time=True)
as an argument of its own, both on the scale of the first: 1000 (1 - r). Where r is 1 it folds into a
bias, so that one step, u(x, 0, 1), needs no more than the plain network.
"""

from typing import Any

import torch

from flowmatch.config import UserError

KEYS = ("second_time", "class_embed_type")


def argument(net: Any) -> str | None:
    """Name the argument of a network's forward that takes the second time; None where there is none."""
    if net.config.get("second_time"):
        return "target_timestep"
    return "class_labels" if net.config.get("class_embed_type") == "timestep" else None


def has_attention(net: Any) -> bool:
    """Tell whether forward-mode differentiation stops at attention's fused kernels (torch 2.13)."""
    return any(type(module).__name__ == "Attention" for module in net.modules())


def refusal(net: Any) -> str | None:
    """Say why a network cannot be given a second time; None where it can."""
    name = type(net).__name__
    if name == "UNet2DModel":
        if net.config.num_class_embeds is not None:
            return "a UNet2DModel with labels has no place left for it; it takes one without labels"
        if net.config.class_embed_type is not None:
            return f"class_embed_type={net.config.class_embed_type!r} stands where it would go"
        return None
    return None if name == "VelocityMLP" else f"{name} has no place for it; use a UNet2DModel"


@torch.no_grad()
def add(net: Any, seed: int) -> Any:
    """Give a network a second time, of which its output is independent at first.

    The last layer of the new embedding is zero, the rest a function of the seed; all other weights are
    the network's. Raises UserError where `refusal` has a reason.
    """
    reason = refusal(net)
    if reason is not None:
        raise UserError(f"objective.name=meanflow needs a second time in the network: {reason}")
    mlp = type(net).__name__ == "VelocityMLP"
    extra = {"second_time": True} if mlp else {"class_embed_type": "timestep"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _like(net, **extra)
    made.load_state_dict(net.state_dict(), strict=False)
    last = made.target if mlp else made.class_embedding.linear_2
    for parameter in last.parameters():
        parameter.zero_()
    return made.to(net.dtype).train(net.training)


@torch.no_grad()
def fold(net: Any) -> Any:
    """Make the plain network u(x, t, 1): a bias takes what r = 1, timestep 0, adds."""
    state = net.state_dict()
    if type(net).__name__ == "VelocityMLP":
        nowhere = torch.zeros(1, net.config.in_channels, dtype=net.dtype)
        state["first.bias"] = state["first.bias"] + net.target(net.embed(0.0, nowhere))[0]
        made, dropped = _like(net, second_time=False), "target."
    else:
        embedded = net.class_embedding(net.time_proj(torch.zeros(1)).to(net.dtype))
        state["time_embedding.linear_2.bias"] = state["time_embedding.linear_2.bias"] + embedded[0]
        made, dropped = _like(net, class_embed_type=None), "class_embedding."
    made.load_state_dict({k: v for k, v in state.items() if not k.startswith(dropped)})
    return made.to(net.dtype).train(net.training)


def _like(net: Any, **changes: Any) -> Any:
    """Make a network of the same config but for some changes."""
    config = {key: value for key, value in net.config.items() if not key.startswith("_")}
    return type(net)(**(config | changes))
