"""Digests of modules and networks: sha256 of weights and config."""

import hashlib
import json
from typing import Any

import torch
from torch import nn


def module_digest(module: nn.Module) -> str:
    """Hash the state of a module: name, dtype, shape and bytes of each tensor, in order of the names.

    Returns:
        Hexadecimal sha256.
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def network_digest(net: Any) -> str:
    """Hash the state of a network (`module_digest`) and its config, without keys that begin with `_`.

    Returns:
        Hexadecimal sha256.
    """
    config = {key: value for key, value in dict(net.config).items() if not key.startswith("_")}
    text = module_digest(net) + json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
