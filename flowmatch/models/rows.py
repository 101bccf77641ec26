"""Conditions that were encoded once: a row of the network's arguments for each prompt, memory-mapped.

The null prompt's row is the last. All rows were encoded beside the longest prompt, so that they have one
length and fit each other in any batch. What is the same for all prompts is stored once.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.models.conditions import Arguments
from flowmatch.runs import manifest
from flowmatch.runs.files import commit, write_atomic

SHARED = "shared.safetensors"  # tensors without rows
FORM = "form.json"  # the nesting of the arguments, and values that are no tensors


def file_name(k: int) -> str:
    """Return the name of the file with the rows of shard k."""
    return f"rows-{k:06d}.safetensors"


def form_of(value: Any, along: Any, path: str, shared: dict[str, Tensor]) -> Any:
    """Describe some arguments as JSON.

    Args:
        value: The arguments, or a part of them.
        along: Its axes (`conditions.axes`).
        path: Its name.
        shared: Gets the tensors without rows, by name.

    Returns:
        {"row": axis}, {"items": true} for a list of one tensor a sample, {"repeat": ...} for a list of
        one equal value a sample, {"shared": name}, {"value": ...}, or {"dict"|"list"|"tuple": ...}.

    Raises:
        UserError: A part cannot be stored.
    """
    if along == "rows":
        if all(isinstance(item, Tensor) for item in value):
            return {"items": True}
        first = json.dumps(value[0]) if plain(value[0]) else None
        if first is not None and all(plain(x) and json.dumps(x) == first for x in value):
            return {"repeat": json.loads(first)}
        if all(isinstance(item, int) for item in value):
            return {"numbers": True}
    elif isinstance(value, Tensor):
        if along is not None:
            return {"row": along}
        shared[path] = value.detach().cpu().contiguous().clone()
        return {"shared": path}
    elif isinstance(value, dict):
        parts = value.items()
        inner = {k: form_of(v, (along or {}).get(k), f"{path}/{k}", shared) for k, v in parts}
        return {"dict": inner}
    elif plain(value):
        return {"value": value}
    elif isinstance(value, list | tuple):
        kinds = along or [None] * len(value)
        inner_list = [
            form_of(part, kind, f"{path}/{i}", shared)
            for i, (part, kind) in enumerate(zip(value, kinds, strict=True))
        ]
        return {"tuple" if isinstance(value, tuple) else "list": inner_list}
    raise UserError(
        f"the argument {path} of the network is a {type(value).__name__}, which cannot be stored; train "
        "without `conditions`, which encodes prompts as they are needed"
    )


def plain(value: Any) -> bool:
    """Return whether a value is JSON: None, a bool, a number, a text, or lists of them."""
    if isinstance(value, list | tuple):
        return all(plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def leaves(form: Any, value: Any = None, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, form, part) for the parts of some arguments that have rows.

    Args:
        form: Of the arguments.
        value: The arguments, or None where only the names are asked for.
        path: Their name.
    """
    kind, inner = next(iter(form.items()))
    if kind in ("row", "items", "numbers"):
        yield path, form, value
    elif kind in ("dict", "list", "tuple"):
        parts = inner.items() if kind == "dict" else enumerate(inner)
        for key, part in parts:
            yield from leaves(part, None if value is None else value[key], f"{path}/{key}")


def rows_of(value: Arguments, form: Any, count: int) -> list[dict[str, Tensor]]:
    """Split the arguments of a batch into one dict of tensors for each of its first `count` samples."""
    rows: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, kind, part in leaves(form, value):
        for i in range(count):
            if "row" in kind:
                row = part.narrow(kind["row"], i, 1)
            else:
                row = part[i] if isinstance(part[i], Tensor) else torch.tensor(part[i])
            rows[i][name] = row.detach().cpu().contiguous().clone()
    return rows


class Stored:
    """The conditions of a sealed folder of encode_prompts, read as they are needed.

    Args:
        folder: The folder.
        key: Name of the config's key, for the messages.
        device: Where the network is.

    Raises:
        NotReady: The folder is not sealed.
        UserError: It holds something else.
    """

    def __init__(self, folder: str, key: str, device: str = "cpu"):
        from safetensors.torch import load_file

        self.folder, self.device = Path(folder), device
        self.sealed, self.digest = manifest.read_hashed(folder, key, ["encode_prompts"])
        manifest.verify(folder, key, self.sealed)
        facts = self.sealed["facts"]
        self.count, self.size = int(facts["prompts"]["count"]), int(facts["shard_size"])
        self.form = json.loads((self.folder / FORM).read_text())
        self.shared = load_file(self.folder / SHARED, device=device)
        self._open: dict[int, Any] = {}

    def row(self, i: int) -> dict[str, Tensor]:
        """Return the tensors of one prompt by name."""
        from safetensors import safe_open

        k, place = divmod(i, self.size)
        if k not in self._open:
            self._open[k] = safe_open(self.folder / file_name(k), "pt")
        file, names = self._open[k], [name for name, _, _ in leaves(self.form)]
        return {name: file.get_tensor(f"{place}{name}") for name in names}

    def rows(self, ids: Tensor) -> Arguments:
        """Return the network's arguments for some prompts, as in `Conditions`."""
        rows = [self.row(i) for i in ids.tolist()]
        return self._joined(self.form, "", rows)  # type: ignore[no-any-return]

    def _joined(self, form: Any, path: str, rows: list[dict[str, Tensor]]) -> Any:
        kind, inner = next(iter(form.items()))
        if kind == "row":
            return torch.cat([row[path] for row in rows], dim=inner).to(self.device)
        if kind == "items":
            return [row[path].to(self.device) for row in rows]
        if kind == "numbers":
            return [int(row[path]) for row in rows]
        if kind == "repeat":
            return [inner] * len(rows)
        if kind == "shared":
            return self.shared[inner]
        if kind == "dict":
            return {k: self._joined(part, f"{path}/{k}", rows) for k, part in inner.items()}
        if kind in ("list", "tuple"):
            parts = [self._joined(part, f"{path}/{i}", rows) for i, part in enumerate(inner)]
            return tuple(parts) if kind == "tuple" else parts
        return inner


def write_shared(folder: Path, form: Any, shared: dict[str, Tensor]) -> None:
    """Write what all rows share: the form, and the tensors without rows."""
    from safetensors.torch import save

    write_atomic(folder / FORM, json.dumps(form, indent=1, sort_keys=True) + "\n")
    write_atomic(folder / SHARED, save(shared))


def write_rows(folder: Path, k: int, rows: list[dict[str, Tensor]]) -> None:
    """Write the rows of shard k."""
    from safetensors.torch import save

    flat = {f"{i}{name}": tensor for i, row in enumerate(rows) for name, tensor in row.items()}
    commit(folder / file_name(k), save(flat))
