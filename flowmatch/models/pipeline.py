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
            models = text_models(path, {n: v for n, v in listed.items() if n not in empty}, dtype)
            given = {name: model for name, (model, _) in models.items()} | empty
            pipe = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype, **given)
    except Exception as error:  # damaged files, and classes of diffusers, raise anything
        told = " ".join(str(error).split())
        raise UserError(f"{key}={path}: this pipeline cannot be loaded: {told[:300]}") from None
    lost = [f"{name}: {weight}" for name, (_, told) in models.items() for weight in told]
    parts = [item for item in pipe.components.items() if isinstance(item[1], torch.nn.Module)]
    lost += [
        f"{name}: {w}" for name, part in parts for w, p in part.named_parameters() if p.is_meta
    ]
    if lost:
        more = f", and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UserError(f"{key}={path}: its files lack weights: {', '.join(lost[:3])}{more}")
    return pipe


def text_models(
    path: str | os.PathLike[str], listed: dict[str, Any], dtype: torch.dtype
) -> dict[str, tuple[Any, list[str]]]:
    """Load the models of transformers, which draws at random what their files lack.

    Args:
        path: Of the pipeline.
        listed: Its components, as in model_index.json.
        dtype: Of the weights.

    Returns:
        For each its name, the model, and the names of the weights that its files lack.
    """
    import transformers

    found = {}
    for name, (library, kind, *_) in listed.items():
        known = getattr(transformers, str(kind), None) if library == "transformers" else None
        if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
            found[name] = with_lost(known, path, subfolder=name, dtype=dtype)
    return found


def with_lost(
    kind: Any, path: str | os.PathLike[str], **where: Any
) -> tuple[torch.nn.Module, list[str]]:
    """Load a model of transformers; return it, and the names of the weights that its files lack."""
    model, told = kind.from_pretrained(path, output_loading_info=True, **where)
    return model, sorted({*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])})
