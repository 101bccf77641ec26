"""Pipelines of diffusers: recognised by their folder, and loaded."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from flowmatch.config import UserError
from flowmatch.models.watch import quiet


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a diffusers pipeline with a text encoder or a tokenizer."""
    file = Path(path) / "model_index.json"
    if not file.is_file():
        return False
    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(index, dict) and any(
        name.startswith(("text_encoder", "tokenizer")) for name in index
    )


def is_needed(name: str, library: Any, kind: Any) -> bool:
    """Return whether a component is needed where prompts are encoded: no encoder, no decoder."""
    light = ("Tokenizer", "TokenizerFast", "Processor", "Extractor")
    model = library == "transformers" and not str(kind).endswith(light)
    return not (
        model or name.startswith(("text_encoder", "vae", "image_encoder", "safety_checker"))
    )


def open_pipeline(
    path: str | os.PathLike[str],
    key: str,
    dtype: torch.dtype = torch.float32,
    texts: bool = True,
) -> Any:
    """Load a diffusers pipeline from a folder or from the hub.

    Args:
        path: A folder, or a name on the hub.
        key: Name of the config's key, for the messages.
        dtype: Of its weights.
        texts: Whether its text encoders are loaded.

    Returns:
        The pipeline, on the CPU.

    Raises:
        UserError: It cannot be loaded.
        NotReady: There is no such folder, or no such name on the hub.
    """
    import diffusers

    from flowmatch.models.diffusion import read_index

    index = read_index(path, key)
    listed = {name: value for name, value in index.items() if isinstance(value, list)}
    empty = {
        name: None
        for name, value in listed.items()
        if value == [None, None] or not (texts or is_needed(name, *value[:2]))
    }
    try:
        with quiet():
            return diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype, **empty)
    except Exception as error:  # damaged files, and classes of diffusers, raise anything
        told = " ".join(str(error).split())
        raise UserError(f"{key}={path}: this pipeline cannot be loaded: {told[:300]}") from None
