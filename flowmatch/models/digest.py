"""Digests of modules and networks: sha256 of weights and config, remembered for large ones."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowmatch.models.script import Script
from flowmatch.runs import remembered
from flowmatch.runs.manifest import fingerprint, sha256_file

DECODERS = ("vae", "vqvae", "vocoder", "safety_checker", "feature_extractor", "image_encoder")


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors: name, dtype, shape and bytes of each, in order of the names.

    Returns:
        Hexadecimal sha256.
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        sha.update(data)  # no copy: a tensor may have gigabytes
    return sha.hexdigest()


def module_digest(module: nn.Module) -> str:
    """Hash the state of a module (`tensors_digest`)."""
    return tensors_digest(module.state_dict())


def network_digest(net: Any) -> str:
    """Hash the state of a network (`module_digest`) and its config, without keys that begin with `_`.

    Returns:
        Hexadecimal sha256.
    """
    config = {key: value for key, value in dict(net.config).items() if not key.startswith("_")}
    text = module_digest(net) + json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def loaded_digest(module: Any, compute: Callable[[Any], str]) -> str:
    """Hash a module as it was loaded, once for as long as its files stay the same.

    Args:
        module: A model of diffusers or transformers that has not changed since it was loaded.
        compute: `module_digest` or `network_digest`.
    """
    dtypes = sorted({str(p.dtype) for p in module.parameters()})
    what = f"{compute.__name__} of {type(module).__name__} in {', '.join(dtypes)}"
    return remembered.digest(files_of(module), what, lambda: compute(module))


def files_digest(net: Any) -> str:
    """Hash the files that a network was loaded from; its state where it was loaded from none.

    Returns:
        Hexadecimal sha256 of their names and sha256s; it is the same in any dtype.
    """
    files = files_of(net)
    if not files:
        return network_digest(net)

    def compute() -> str:
        return fingerprint({file.name: sha256_file(file) for file in files})

    return remembered.digest(files, "sha256 of files", compute)


def files_of(module: Any) -> list[Path]:
    """List the safetensors files that a model was loaded from; none where they are not known."""
    config = getattr(module, "config", {})
    place = config.get("_name_or_path") if hasattr(config, "get") else None
    place = place or getattr(config, "_name_or_path", None)
    return sorted(Path(place).glob("*.safetensors")) if place and Path(place).is_dir() else []


def pipeline_digest(pipe: Any, script: Script, absent: Mapping[str, str] | None = None) -> str:
    """Hash what a pipeline's samples depend on: networks but for decoders, tokenizers, scheduler.

    Args:
        pipe: The pipeline.
        script: What was learnt of it.
        absent: `parts_of` the pipeline with its text encoders, where it was loaded without.
    """
    return fingerprint({**(absent or {}), **parts_of(pipe, script)})


def parts_of(pipe: Any, script: Script) -> dict[str, str]:
    """Return the digest of each part of a pipeline that its samples depend on, by name."""
    parts: dict[str, str] = {"script": fingerprint(script.entries())}
    for name, part in sorted(pipe.components.items()):
        if part is None or name in DECODERS:
            continue
        if isinstance(part, nn.Module):
            parts[name] = loaded_digest(
                part, network_digest if name == script.network else module_digest
            )
        elif hasattr(part, "get_vocab"):
            facts = [part.get_vocab(), str(part.special_tokens_map), part.model_max_length]
            parts[name] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        elif hasattr(part, "config"):
            config = {k: v for k, v in dict(part.config).items() if not k.startswith("_")}
            text = json.dumps(config, sort_keys=True, default=str)
            parts[name] = hashlib.sha256(text.encode()).hexdigest()
    return parts
