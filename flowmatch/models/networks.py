"""Build, save and load networks: any diffusers model by name, and those of trusted modules.

A network that is trained here has the terms of diffusers' flow models (timestep = 1000 (1 - t), output =
noise - data), so that its export is `save_pretrained`. `Velocity` turns them into v(x, t).
"""

import inspect
import os
from pathlib import Path
from typing import Any

import torch

from flowmatch.config import NotReady, UserError
from flowmatch.models import precision, two_time
from flowmatch.models.config import NetConfig
from flowmatch.models.network import Network
from flowmatch.models.velocity import Velocity
from flowmatch.runs import trusted
from flowmatch.runs.files import allow_readers

LABEL_KEYS = {"num_class_embeds", "num_embeds_ada_norm"}  # how diffusers' models count classes


def network_class(name: str, where: str = "net.name") -> Any:
    """Return the class of a network by name.

    Args:
        name: VelocityMLP, a model class of diffusers, `package.module:Class` of a trusted module, or
            the class alone, as config.json names it.
        where: What names the class, for the messages.

    Raises:
        UserError: There is no such class, or its module is not trusted.
    """
    import diffusers

    from flowmatch.models.mlp import VelocityMLP

    module, _, inside = str(name).rpartition(":")
    own = getattr(diffusers, inside, None)
    if module:
        model = getattr(trusted.find(module, f"{where}={name}"), inside, None)
        if own is not None:
            raise UserError(f"{where}={name}: diffusers has a class {inside}; rename yours")
    else:
        model = VelocityMLP if inside == "VelocityMLP" else own
        model = trusted.holding(inside, where) if model is None else model
    if not (inspect.isclass(model) and issubclass(model, diffusers.ModelMixin)):
        outside = f"trust=MODULE and {where}=" if where == "net.name" else "trust=MODULE for "
        raise UserError(
            f"{where}={name!r}: expected VelocityMLP or a diffusers model class, such as UNet2DModel "
            f"or DiTTransformer2DModel; or {outside}MODULE:CLASS, a class of your own that is a "
            "diffusers.ModelMixin and ConfigMixin"
        )
    return model


def code_of(net: Any) -> str | None:
    """Return the source file of a network's class where that is from outside; None for ours."""
    package = type(net).__module__.partition(".")[0]
    return None if package in ("diffusers", "flowmatch") else inspect.getsourcefile(type(net))


def check_inputs(model: Any, where: str) -> None:
    """Check that a network takes a sample, a timestep and perhaps labels, and needs nothing else.

    Args:
        model: The class of the network.
        where: What names it, for the messages.

    Raises:
        UserError: It reads text, needs another condition, or takes no timestep.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    needed = [
        p.name for p in parameters[2:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    needed += [name for name in names if name == "encoder_hidden_states" and name not in needed]
    if needed:
        raise UserError(
            f"{where}: {model.__name__} needs {', '.join(needed)}; a network by itself takes a sample, "
            "a timestep and perhaps labels. If it reads text, name its whole pipeline, and set prompts"
        )
    if len(names) < 2 or "timestep" not in names[1]:
        raise UserError(
            f"{where}: {model.__name__} takes {', '.join(names[:3])}; expected a network that takes a "
            "sample and a timestep"
        )


def build(config: NetConfig, shape: tuple[int, ...], classes: int | None, seed: int) -> Any:
    """Build an untrained network that fits the data.

    Sizes that follow from the data are filled in where the config leaves them out, and must agree with
    the data where it does not. The caller's random state does not change.

    Args:
        config: Class and keyword arguments of the network.
        shape: Shape of one sample, [C, ...] or [D].
        classes: Number of labels, or None.
        seed: The weights are a function of it.

    Returns:
        The network, on the CPU, in train mode.

    Raises:
        UserError: The class or a key is unknown, or the network's output has another shape.
    """
    model = network_class(config.name)
    check_inputs(model, f"net.name={config.name}")
    arguments = dict(config.model_extra or {})
    # reflow adds the second time, at `class_embed_type` in a UNet2DModel
    known = set(inspect.signature(model.__init__).parameters) - {"self", *two_time.KEYS}
    faults = [
        f"net.{key}: unknown key; {config.name} takes {', '.join(sorted(known))}"
        for key in sorted(arguments.keys() - known)
    ]
    facts = {key: value for key, value in _facts(shape, classes).items() if key in known}
    for key, value in facts.items():
        if key in arguments and arguments[key] != value:
            faults.append(
                f"net.{key}={arguments[key]!r}: the data needs {value!r}; leave the key out"
            )
    if ("sample_size" in known) != (len(shape) > 1):
        faults.append(f"net.name={config.name} does not take samples of shape {list(shape)}")
    if classes is not None and known.isdisjoint(LABEL_KEYS):
        faults.append(f"net.name={config.name} takes no labels; set data.labels=false")
    if classes is None and "num_embeds_ada_norm" in known:
        faults.append(f"net.name={config.name} needs labels; set data.labels=true")
    if faults:
        raise UserError(faults)
    try:
        with precision.seeded(seed):
            net = model(**(arguments | facts))
    except Exception as error:  # classes of diffusers raise anything
        raise UserError(f"net: {config.name} refuses these arguments: {reason(error)}") from None
    silence_label_drop(net)
    check_output(net, shape, classes)
    return net


def _facts(shape: tuple[int, ...], classes: int | None) -> dict[str, Any]:
    """Return the arguments that follow from the data, under all names that diffusers has for them."""
    facts: dict[str, Any] = {"in_channels": shape[0], "out_channels": shape[0]}
    if len(shape) > 1:
        square = len(shape) == 3 and shape[1] == shape[2]
        facts["sample_size"] = shape[1] if square else list(shape[1:])
    if classes is None:
        return facts | {"num_class_embeds": None}
    # the null class is K: DiT adds a row for it, other networks count it as a class
    return facts | {"num_class_embeds": classes + 1, "num_embeds_ada_norm": classes}


def check_output(net: Network, shape: tuple[int, ...], classes: int | None) -> None:
    """Run a network once on zeros and check the shape of its output.

    Args:
        net: The network; its mode does not change.
        shape: Shape of one sample, [C, H, W] or [D].
        classes: Number of labels, or None.

    Raises:
        UserError: The network fails, or its output has another shape.
    """
    was_training = net.training
    net.eval()
    x = torch.zeros(2, *shape, device=net.device, dtype=net.dtype)
    cond = {"label": torch.zeros(2, dtype=torch.long, device=net.device)} if classes else None
    try:
        with torch.no_grad():
            out = Velocity(net)(x, 0.5, cond)
    except Exception as error:  # classes of diffusers raise anything
        raise UserError(
            f"net: {type(net).__name__} fails on a sample of shape {list(shape)}: {reason(error)}"
        ) from None
    finally:
        net.train(was_training)
    if out.shape != x.shape:
        raise UserError(
            f"net: {type(net).__name__} turns {list(x.shape)} into {list(out.shape)}; "
            "is the size divisible by its patch size?"
        )


def silence_label_drop(net: Network) -> None:
    """Turn off the label drop inside DiT's blocks.

    In train mode each block of diffusers' DiT drops labels independently, so that the label reaches
    nearly every sample; the loop drops it once for each sample, before the network.
    """
    from diffusers.models.embeddings import LabelEmbedding

    for module in net.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def save(net: Any, folder: str | os.PathLike[str]) -> list[str]:
    """Write a network as diffusers does: config.json and safetensors.

    Args:
        net: A diffusers model; the path that it was loaded from is removed from its config.
        folder: Where to write.

    Returns:
        The names of the files in the folder, sorted.
    """
    net.register_to_config(_name_or_path="")
    net.save_pretrained(folder, safe_serialization=True)
    files = [file for file in Path(folder).iterdir() if file.is_file()]
    allow_readers(*files)
    return sorted(file.name for file in files)


def load(folder: str | os.PathLike[str], key: str, subfolder: str = "") -> Any:
    """Load a network from a diffusers model folder or a hub name.

    Args:
        folder: A folder, or a name on the hub; its config.json names the class.
        key: Name of the config's key, for the messages.
        subfolder: A folder inside.

    Returns:
        The network, in float32 and eval mode.

    Raises:
        UserError: The folder is not a diffusers model.
        NotReady: There is no such folder, or no such name on the hub.
    """
    from flowmatch.models.mlp import VelocityMLP

    where = f"{key}={folder}"
    inside: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    try:
        config = VelocityMLP.load_config(folder, **inside)
        model = network_class(config.get("_class_name", "?"), f"{where}: its class")
        inside |= {"use_safetensors": True, "output_loading_info": True}
        try:
            net, told = model.from_pretrained(folder, low_cpu_mem_usage=False, **inside)
        except ValueError as error:  # classes that keep some modules in float32 want it otherwise
            if "low_cpu_mem_usage" not in str(error):
                raise
            net, told = model.from_pretrained(folder, low_cpu_mem_usage=True, **inside)
    except UserError:
        raise
    except Exception as error:  # damaged files, and classes of diffusers, raise anything
        kind = UserError if Path(folder).is_dir() else NotReady
        raise kind(f"{where}: no diffusers model could be read there: {reason(error)}") from None
    if missing := [*told["missing_keys"], *told["mismatched_keys"]]:  # diffusers draws them
        raise UserError(
            f"{where}: {len(missing)} weights are missing, first {missing[0]}: config.json and weights "
            "do not belong together; save the model again"
        )
    bad = [name for name, value in net.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UserError(f"{where}: its weights {bad[0]} hold NaN or infinity ({len(bad)} such)")
    silence_label_drop(net)
    return net.float().eval()


def reason(error: Exception) -> str:
    """Write what an error says in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
