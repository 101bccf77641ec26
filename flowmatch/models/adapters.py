"""Adapters of a frozen network by peft: low-rank updates of some of its layers.

A layer W becomes W + (alpha / rank) B A, with A [rank, in] and B [out, rank] (LoRA: Hu et al. 2021,
arXiv 2106.09685). B begins at 0, so that a new adapter changes nothing.
"""

import copy
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowmatch.config import UserError, closest, content
from flowmatch.models import networks, precision
from flowmatch.models.config import LoraConfig
from flowmatch.models.digest import files_digest, network_digest, tensors_digest
from flowmatch.runs.files import allow_readers
from flowmatch.runs.manifest import fingerprint

NAME = "default"  # what peft calls the adapter
ALL = "all"  # lora.targets of every linear layer
DIFFUSERS = "pytorch_lora_weights.safetensors"  # what load_lora_weights looks for
COMFYUI = "comfyui.safetensors"
LAYERS = (nn.Linear, nn.Conv2d)


def layers(net: Any, targets: list[str]) -> list[str]:
    """List the layers of a network that an adapter updates.

    Args:
        net: A diffusers model without an adapter.
        targets: Ends of the layers' names, or ["all"].

    Returns:
        Their names, sorted.

    Raises:
        UserError: A target fits no linear or convolutional layer.
    """
    names = {name for name, module in net.named_modules() if isinstance(module, LAYERS)}
    if targets == [ALL]:
        return sorted(n for n, m in net.named_modules() if isinstance(m, nn.Linear))
    found: set[str] = set()
    faults = []
    for target in targets:
        fitting = {name for name in names if name == target or name.endswith(f".{target}")}
        if not fitting:
            ends = sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()})
            faults.append(
                f"lora.targets: {type(net).__name__} has no layer {target}; "
                f"{closest(target, ends)}its linear layers and convolutions end in {', '.join(ends)}"
            )
        found |= fitting
    if faults:
        raise UserError(faults)
    return sorted(found)


def add(net: Any, config: LoraConfig, seed: int) -> None:
    """Freeze a network, and add a new adapter in float32, in place.

    Args:
        net: A diffusers model.
        config: The adapter.
        seed: A is a function of it.

    Raises:
        UserError: A target fits no layer.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    asked = PeftConfig(
        r=config.rank,
        lora_alpha=config.scale * config.rank,  # type: ignore[arg-type]
        target_modules=layers(net, config.targets),
        lora_dropout=config.dropout,
    )
    net.requires_grad_(False)
    with precision.seeded(seed):
        inject_adapter_in_model(asked, net, NAME)
    for parameter in trained(net).values():
        parameter.data = parameter.data.float()  # peft gives them the dtype of their layer


def quantise(net: Any) -> None:
    """Round the frozen linear layers of a network with an adapter to int8, in place.

    Each row of a weight W becomes round(W / s), with s = max |W| / 127.5. torchao computes with W in the
    dtype of the input, and keeps that copy of it for the backward pass.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    asked = Int8WeightOnlyConfig(set_inductor_config=False)
    quantize_(net, asked, filter_fn=lambda module, name: _rounded(module))


def _rounded(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not module.weight.requires_grad


def saving(net: nn.Module) -> int:
    """Return the bytes that `quantise` would save of a network."""
    weights = [module.weight for module in net.modules() if _rounded(module)]
    return sum(bytes_of(w) - w.numel() - 4 * len(w) for w in weights if not hasattr(w, "qdata"))


def bytes_of(tensor: Any) -> int:
    """Return the bytes that a tensor takes; of one that is quantised, those of its parts."""
    if hasattr(tensor, "qdata"):
        return bytes_of(tensor.qdata) + bytes_of(tensor.scale)
    return int(tensor.numel() * tensor.element_size())


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def is_adapters(name: str) -> bool:
    """Return whether a name of a network's state is that of an adapter's tensor."""
    return f".{NAME}." in name and ".lora_" in name


def adapter_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter in a network's state, by the names in files: LAYER.lora_A.weight."""
    return {n.replace(f".{NAME}.", "."): t for n, t in state.items() if is_adapters(n)}


@torch.no_grad()
def merge(net: Any) -> None:
    """Put an adapter into the weights of a network, in place; no trace of it is left."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(net.named_modules()):
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            update = layer.get_delta_weight(NAME)  # type: ignore[attr-defined]
            base.weight.copy_(base.weight.float() + update.float())  # rounded once
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, base)
    del net.peft_config
    net.requires_grad_(True)
    net.register_to_config(_name_or_path="")  # the files there have other weights


def put(net: Any, folder: Path, config: dict[str, Any]) -> None:
    """Freeze a network, and add an adapter that was trained, in place.

    Args:
        net: The network that it was trained on.
        folder: Holds the adapter.
        config: The content of its `LoraConfig`.
    """
    from safetensors.torch import load_file

    add(net, LoraConfig(**config), 0)
    own = {name: name.replace(f".{NAME}.", ".") for name in net.state_dict() if is_adapters(name)}
    saved = {name.partition(".")[2]: t for name, t in load_file(folder / DIFFUSERS).items()}
    net.load_state_dict({name: saved[file] for name, file in own.items()}, strict=False)


def apply(base: Any, folder: Path, config: dict[str, Any]) -> Any:
    """Return a copy of a network with an adapter in its weights; the arguments are those of `put`."""
    net = copy.deepcopy(base)
    put(net, folder, config)
    merge(net)
    return net.eval()


def another(net: nn.Module, seed: int) -> dict[str, nn.Parameter]:
    """Return new tensors for the adapter of a network, by name, as `add` draws them."""
    made = {}
    with precision.seeded(seed):
        for name, own in trained(net).items():
            fresh = torch.zeros(own.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
            made[name] = nn.Parameter(fresh.to(own.device))
    return made


@contextmanager
def exchanged(net: nn.Module, tensors: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Exchange tensors of the adapter of a network, which is in eval mode, inside the block."""
    training, places = net.training, []
    for name, tensor in tensors.items():
        parent, _, last = name.rpartition(".")
        module = net.get_submodule(parent)
        places.append((module, last, getattr(module, last)))
        setattr(module, last, tensor)
    net.eval()
    try:
        yield
    finally:
        net.train(training)
        for module, last, own in places:
            setattr(module, last, own)


def dtype_of(config: LoraConfig | None, products: str) -> torch.dtype:
    """Return the dtype of a start's weights: under an adapter the half precision of the products."""
    halves = {} if config is None else {"bf16": torch.bfloat16, "fp16": torch.float16}
    return halves.get(products, torch.float32)


@dataclass(frozen=True)
class Writer:
    """Writes the network of a run with an adapter.

    Attributes:
        config: The adapter.
        pipeline: The class of the teacher's pipeline, where it reads adapters; else None.
        component: The name of the network in it.
        base: The digest of the network without the adapter.
    """

    config: LoraConfig
    pipeline: Any = None
    component: str = ""
    base: str = ""

    @property
    def whole(self) -> bool:
        """Whether the network is written whole, with the adapter in its weights."""
        return self.config.merge or self.pipeline is None

    def keeps(self, name: str) -> bool:
        """Return whether a tensor of the network's state is written."""
        return self.whole or is_adapters(name)

    def lines(self, net: Any) -> list[str]:
        """Say how much is trained, and what is written."""
        count = sum(p.numel() for p in trained(net).values())
        written = (
            "the whole network" if self.whole else f"the adapter, for {self.pipeline.__name__}"
        )
        return [
            f"an adapter of rank {self.config.rank}: {count:,} parameters are trained, "
            f"{4 * count / 1e6:,.1f} MB; net/ holds {written}"
        ]

    def facts(self, folder: Path) -> dict[str, Any]:
        """Return what the manifest says of a network that was written to a folder."""
        from safetensors.torch import load_file

        facts: dict[str, Any] = {"lora": content(self.config)}
        if self.whole:
            return facts | {"net": network_digest(networks.load(folder, "net"))}
        digest = tensors_digest(load_file(folder / DIFFUSERS))
        whole = fingerprint({"base": self.base, **facts, "adapter": digest})
        return facts | {"base": self.base, "net": whole}

    def write(self, kind: Any, net: Any, state: dict[str, Tensor], folder: Path) -> list[str]:
        """Write a network, or its adapter alone.

        Args:
            kind: Its class; that of `net` may be changed by sharding.
            net: The network that was trained, whose config is taken.
            state: What `keeps` let pass, by name.
            folder: Where to write.

        Returns:
            The names of the files, sorted.
        """
        if self.whole:
            fresh = kind.from_config(net.config)
            add(fresh, self.config, 0)
            fresh.load_state_dict(state)
            merge(fresh)
            frozen = [t.dtype for n, t in state.items() if not is_adapters(n)]
            return networks.save(fresh.to(frozen[0]), folder)
        tensors = {name: t.detach().contiguous() for name, t in adapter_of(state).items()}
        ranks: dict[str, Any] = {
            "r": self.config.rank,
            "lora_alpha": self.config.scale * self.config.rank,
        }
        ranks["target_modules"] = sorted({n.partition(".lora_")[0] for n in tensors})
        words: dict[str, Any] = {f"{self.component}_lora_layers": tensors}
        words |= {f"{self.component}_lora_adapter_metadata": ranks}
        self.pipeline.save_lora_weights(folder, **words)
        order_metadata(folder / DIFFUSERS)
        write_comfyui(tensors, self.component, self.config, folder)
        files = [DIFFUSERS, COMFYUI]
        allow_readers(*(folder / name for name in files))
        return sorted(files)


def order_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by name: safetensors writes them in any order."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:end])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def writer(config: LoraConfig, start: Any, base: str = "") -> Writer:
    """Return the writer of an adapter.

    Args:
        config: The adapter.
        start: The `Teacher` or `TextTeacher` that is trained.
        base: The digest of its network without an adapter, where it has one already.
    """
    if base:
        return Writer(config, type(start.pipe), start.script.network, base)
    script = getattr(start, "script", None)
    if script is None or start.round:  # its files are no pipeline's
        return Writer(config)
    pipeline = type(start.pipe)
    readable = pipeline if reads_adapters(pipeline, script.network) else None
    return Writer(config, readable, script.network, files_digest(start.net))


def reads_adapters(pipeline: Any, component: str) -> bool:
    """Return whether a class of pipelines has `load_lora_weights` for one of its networks."""
    save = getattr(pipeline, "save_lora_weights", None)
    known = inspect.signature(save).parameters if save is not None else {}
    return {f"{component}_lora_layers", f"{component}_lora_adapter_metadata"} <= set(known)


def write_comfyui(
    tensors: dict[str, Tensor], component: str, config: LoraConfig, folder: Path
) -> None:
    """Write an adapter with the names that ComfyUI knows, and alpha as a tensor of each layer.

    Those of a `unet` are kohya's, those of a `transformer` diffusers' own.
    """
    from safetensors.torch import save_file

    alpha = torch.tensor(config.scale * config.rank)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".lora_")
        if component == "unet":
            layer = "lora_unet_" + layer.replace(".", "_")
            part = part.replace("A.", "lora_down.").replace("B.", "lora_up.")
        else:
            layer, part = f"{component}.{layer}", f"lora_{part}"
        named |= {f"{layer}.{part}": tensor, f"{layer}.alpha": alpha.clone()}
    save_file(named, folder / COMFYUI, metadata={"format": "pt"})
