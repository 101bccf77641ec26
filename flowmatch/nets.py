"""Networks: any diffusers model by name, and the one bridge between its terms and the math's.

A network speaks diffusers natively (timestep = 1000 (1 - t), output = noise - data), so that export is
`save_pretrained` and a pretrained flow model is a teacher as it is. `Velocity` is where that turns
into v(x, t); nothing else converts.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from flowmatch import metrics, second_time
from flowmatch.config import Config, NotReady, UserError, required

LABEL_KEYS = {"num_class_embeds", "num_embeds_ada_norm"}  # how diffusers' models count classes


def network_class(name: str) -> Any:
    """Look a network up by name: VelocityMLP, or any model class of diffusers."""
    import diffusers

    from flowmatch.mlp import VelocityMLP

    model = VelocityMLP if name == "VelocityMLP" else getattr(diffusers, name, None)
    if not (inspect.isclass(model) and issubclass(model, diffusers.ModelMixin)):
        raise UserError(
            f"net.name={name!r}: expected VelocityMLP or a diffusers model class, such as UNet2DModel "
            "or DiTTransformer2DModel"
        )
    return model


class NetConfig(Config):
    """The network: a diffusers class, and its own keyword arguments beside the name."""

    model_config = pydantic.ConfigDict(extra="allow")

    name: str = required("class of the network; its keyword arguments stand beside it as net.KEY")


def build(config: NetConfig, shape: tuple[int, ...], classes: int | None, seed: int) -> Any:
    """Make an untrained network that fits the data; its weights are a function of the seed.

    shape: of one sample, [C, H, W] or [D]. classes: number of labels, or None. The sizes that the data
    decides are filled in where the config leaves them out, and must agree where it does not.
    Raises UserError for an unknown class or key, or a network whose output has another shape.
    """
    model = network_class(config.name)
    given = dict(config.model_extra or {})
    # the second time is given by reflow, and `class_embed_type` is where it goes
    known = set(inspect.signature(model.__init__).parameters) - {"self", *second_time.KEYS}
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


def classes_of(net: Any) -> int | None:
    """Read the number of classes K from a network's own config (its null class is K)."""
    if "num_embeds_ada_norm" in net.config:
        return net.config.num_embeds_ada_norm
    embeds = net.config.get("num_class_embeds")
    return None if embeds is None else embeds - 1


def sample_shape(net: Any) -> tuple[int, ...]:
    """Read the shape of one sample, [C, H, W] or [D], from a network's own config."""
    channels = net.config.in_channels
    if "sample_size" not in net.config:
        return (channels,)
    size = net.config.sample_size
    if size is None:
        raise UserError(f"{type(net).__name__} has no sample_size in its config.json; add it there")
    return (channels, *((size, size) if isinstance(size, int) else size))


class Velocity:
    """The bridge: v(x, t) of the math from a network in diffusers' terms.

    v = -net(x, 1000 (1 - t)). With guidance w != 1: v = v_null + w (v_cond - v_null) (Ho & Salimans
    2022, arXiv 2207.12598, in velocities); both halves run as one batch and count as two evaluations.
    """

    span = (0.0, 1.0)  # the times at which it is valid
    extra = 0  # evaluations of `carry` beyond those of its solver

    def __init__(self, net: Any, guidance: float = 1.0):
        self.net = net
        self.guidance = guidance
        self.evaluations = 0  # of the network, a sample; guidance counts two
        inner = getattr(net, "module", net)  # DDP hides the config
        inner = getattr(inner, "_orig_mod", inner)
        self.classes = classes_of(inner)
        self.second = second_time.argument(inner)  # which takes the second time, if there is one
        self.null = self.classes  # the null class is the one after the last
        if guidance != 1 and self.classes is None:
            raise UserError(f"guidance={guidance}: this network takes no labels; use guidance=1")

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: dict[str, Tensor] | None = None,
        r: Tensor | float | None = None,
    ) -> Tensor:
        """Evaluate the velocity. x: [B, ...]; t: [B] or a float, in [0, 1] -> v: [B, ...].

        cond["label"]: int64 [B]; K is the null class, and what a conditional network gets without
        labels. r, like t: the time up to which a two-time network averages; None is t, the velocity.
        """
        if r is not None and self.second is None:
            raise UserError("r is given, but this network takes a single time")
        own = torch.float32 if x.dtype != torch.float64 else next(self.net.parameters()).dtype
        wide = torch.promote_types(own, torch.float32)

        def timestep(time: Tensor | float) -> Tensor:
            if not isinstance(time, Tensor):  # a copy to the device would wait for all its work
                time = torch.full((), time, dtype=wide, device=x.device)
            return 1000 * (1 - time.to(x.device, wide).expand(x.shape[0]))

        second = None if self.second is None else timestep(t if r is None else r)
        return -self.predict(x, timestep(t), cond, second)

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        cond: dict[str, Tensor] | None,
        second: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network itself, guided. timestep: [B], as it sees it -> [B, ...], as it says it.

        The timestep is a float tensor: UNet2DModel casts a Python number to long. second: like it.
        """
        more: dict[str, Any] = {} if self.second is None else {self.second: second}
        # a float64 state is the solver's; the network keeps its own dtype
        given = x.to(next(self.net.parameters()).dtype) if x.dtype == torch.float64 else x
        if self.classes is None:
            if cond:
                raise UserError(f"conditions {sorted(cond)} are given; this network takes none")
            self.evaluations += 1
            return self.net(given, timestep, **more).sample.to(x.dtype)
        if self.null is None and cond is None:
            raise UserError("this network has no null class; give it labels")
        null = torch.full((x.shape[0],), self.null or 0, dtype=torch.long, device=x.device)
        label = null if cond is None else cond["label"]
        if self.guidance == 1:
            self.evaluations += 1
            return self.net(given, timestep, class_labels=label, **more).sample.to(x.dtype)
        self.evaluations += 2
        both = self.net(
            torch.cat([given, given]),
            torch.cat([timestep, timestep]),
            class_labels=torch.cat([null, label]),
            **{name: torch.cat([value, value]) for name, value in more.items()},
        )
        out_null, out_cond = both.sample.to(x.dtype).chunk(2)
        return out_null + self.guidance * (out_cond - out_null)

    def carry(
        self, x0: Tensor, solve: Callable[..., Tensor], cond: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Carry noise to data: solve(v, x, span) integrates v(x, t) from span[0] to span[1].

        Of a two-time network, v(x, t, r) is the average velocity up to r.
        """
        return solve(lambda x, t, r=None: self(x, t, cond, r), x0, self.span)

    def invert(
        self, x1: Tensor, solve: Callable[..., Tensor], cond: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Carry data to noise: solve(v, x, span) integrates v(x, t) from span[1] back to span[0]."""
        return solve(lambda x, t: self(x, t, cond), x1, self.span)


def digest(net: Any) -> str:
    """Hash a network: name, dtype, shape and bytes of its state in name order, and its config.

    Keys of the config that start with `_` (paths, versions) are left out.
    """
    config = {key: value for key, value in dict(net.config).items() if not key.startswith("_")}
    text = metrics.module_digest(net) + json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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
    from flowmatch.mlp import VelocityMLP

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
