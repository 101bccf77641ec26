"""Networks: any diffusers model by name, and the one bridge between its terms and the math's.

A network speaks diffusers natively (timestep = 1000 (1 - t), output = noise - data), so that export is
`save_pretrained` and a pretrained flow model is a teacher as it is. `Velocity` is where that turns
into v(x, t); nothing else converts.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch

from flowmatch.config import NotReady, UserError
from flowmatch.models import two_time
from flowmatch.models.config import NetConfig
from flowmatch.models.velocity import Velocity

LABEL_KEYS = {"num_class_embeds", "num_embeds_ada_norm"}  # how diffusers' models count classes


def network_class(name: str) -> Any:
    """Look a network up by name: VelocityMLP, or any model class of diffusers."""
    import diffusers

    from flowmatch.models.mlp import VelocityMLP

    model = VelocityMLP if name == "VelocityMLP" else getattr(diffusers, name, None)
    if not (inspect.isclass(model) and issubclass(model, diffusers.ModelMixin)):
        raise UserError(
            f"net.name={name!r}: expected VelocityMLP or a diffusers model class, such as UNet2DModel "
            "or DiTTransformer2DModel"
        )
    return model


def build(config: NetConfig, shape: tuple[int, ...], classes: int | None, seed: int) -> Any:
    """Make an untrained network that fits the data; its weights are a function of the seed.

    shape: of one sample, [C, H, W] or [D]. classes: number of labels, or None. The sizes that the data
    decides are filled in where the config leaves them out, and must agree where it does not.
    Raises UserError for an unknown class or key, or a network whose output has another shape.
    """
    model = network_class(config.name)
    given = dict(config.model_extra or {})
    # the second time is given by reflow, and `class_embed_type` is where it goes
    known = set(inspect.signature(model.__init__).parameters) - {"self", *two_time.KEYS}
    faults = [
        f"net.{key}: unknown key; {config.name} takes {', '.join(sorted(known))}"
        for key in sorted(given.keys() - known)
    ]
    facts = {key: value for key, value in _facts(shape, classes).items() if key in known}
    for key, value in facts.items():
        if key in given and given[key] != value:
            faults.append(f"net.{key}={given[key]!r}: the data asks for {value!r}; leave it out")
    if ("sample_size" in known) != (len(shape) == 3):
        faults.append(f"net.name={config.name} does not take samples of shape {list(shape)}")
    if classes is not None and known.isdisjoint(LABEL_KEYS):
        faults.append(f"net.name={config.name} takes no labels; set data.labels=false")
    if classes is None and "num_embeds_ada_norm" in known:
        faults.append(f"net.name={config.name} needs labels; set data.labels=true")
    if faults:
        raise UserError(faults)
    torch.manual_seed(seed)
    try:
        net = model(**(given | facts))
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
        raise UserError(f"net: {config.name} refuses these arguments: {error}") from None
    silence_label_drop(net)
    check_output(net, shape, classes)
    return net


def _facts(shape: tuple[int, ...], classes: int | None) -> dict[str, Any]:
    """What the data decides of a network, under every name that diffusers' models have for it."""
    facts: dict[str, Any] = {"in_channels": shape[0], "out_channels": shape[0]}
    if len(shape) == 3:
        if shape[1] != shape[2]:
            raise UserError(f"the data is {list(shape)}: networks here take square images")
        facts["sample_size"] = shape[1]
    if classes is None:
        return facts | {"num_class_embeds": None}
    # the null class is K: DiT makes its row itself, elsewhere it is one class more
    return facts | {"num_class_embeds": classes + 1, "num_embeds_ada_norm": classes}


def check_output(net: Any, shape: tuple[int, ...], classes: int | None) -> None:
    """Run the network once on zeros; raise UserError where its output has another shape."""
    was_training = net.training
    net.eval()
    x = torch.zeros(2, *shape, device=net.device, dtype=net.dtype)
    cond = {"label": torch.zeros(2, dtype=torch.long, device=net.device)} if classes else None
    try:
        with torch.no_grad():
            out = Velocity(net)(x, 0.5, cond)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"net: {type(net).__name__} fails on a sample of shape {list(shape)}: {error}"
        ) from None
    finally:
        net.train(was_training)
    if out.shape != x.shape:
        raise UserError(
            f"net: {type(net).__name__} turns {list(x.shape)} into {list(out.shape)}; "
            "is the size divisible by its patch size?"
        )


def silence_label_drop(net: Any) -> None:
    """Turn off the label drop inside DiT's blocks.

    Each block of diffusers' DiT drops labels by its own coin in train mode, so the label leaks in
    nearly every sample; the loop drops them once a sample, before the network.
    """
    for module in net.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0


def save(net: Any, folder: str | os.PathLike[str]) -> list[str]:
    """Write a network as diffusers does (config.json and safetensors); return the file names.

    The config is stripped of the path that the network was loaded from.
    """
    net.register_to_config(_name_or_path="")
    net.save_pretrained(folder, safe_serialization=True)
    return sorted(file.name for file in Path(folder).iterdir() if file.is_file())


def load(folder: str | os.PathLike[str], key: str, subfolder: str = "") -> Any:
    """Load a network in float32 and eval mode from a diffusers model folder or a hub name.

    The class stands in the folder's config.json. Raises UserError naming `key`.
    """
    from flowmatch.models.mlp import VelocityMLP

    try:
        where = {"subfolder": subfolder} if subfolder else {}
        config = VelocityMLP.load_config(folder, **where)
        model = network_class(config.get("_class_name", "?"))
        net = model.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False, **where)
    except (OSError, json.JSONDecodeError) as error:
        kind = UserError if Path(folder).is_dir() else NotReady
        reason = " ".join(str(error).split())
        raise kind(f"{key}={folder}: no diffusers model could be read there: {reason}") from None
    silence_label_drop(net)
    return net.float().eval()
