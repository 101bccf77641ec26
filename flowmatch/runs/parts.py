"""Tensors that several processes write: each the rows that it holds, to files of its own.

`STEM.part-00001.safetensors` holds rows of tensors; its metadata say which, of how many. Whatever number
of processes has written them, any other can read any rows, without a whole tensor in its memory.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
PART = re.compile(r"(.*)\.part-(\d{5})")


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor.

    Attributes:
        rows: The rows, [n, ...], on the CPU; or a whole tensor.
        first: The number of the first.
        total: Of all rows; None for a whole tensor.
    """

    rows: "Tensor"
    first: int = 0
    total: int | None = None


class Rows:
    """A tensor in parts, which are read as they are needed.

    Args:
        name: Its name in the files.
    """

    def __init__(self, name: str):
        self.name = name
        self.places: list[tuple[int, int, Any]] = []  # (first, end, open file), in order

    def read(self, first: int, end: int) -> "Tensor":
        """Read rows, [end - first, ...]."""
        import torch

        found = []
        for a, b, file in self.places:
            low, high = max(a, first), min(b, end)
            if low < high:
                found.append(file.get_slice(self.name)[low - a : high - a])
        if not found:  # none of them: no rows of the right width
            found = [self.places[0][2].get_slice(self.name)[:1][:0]]
        return torch.cat(found)

    @property
    def count(self) -> int:
        """Number of rows."""
        return max(end for _, end, _ in self.places)


def write(folder: Path, stem: str, number: int, pieces: Mapping[str, Piece]) -> str:
    """Write the part of one process.

    Returns:
        The name of the file.
    """
    from safetensors.torch import save_file

    name = f"{stem}.part-{number:05d}{SUFFIX}"
    (folder / name).parent.mkdir(exist_ok=True)
    rows = {n: [piece.first, piece.total] for n, piece in pieces.items() if piece.total is not None}
    tensors = {n: piece.rows for n, piece in pieces.items()}
    save_file(tensors, folder / name, metadata={"rows": json.dumps(rows, sort_keys=True)})
    return name


def number_of(name: str) -> int | None:
    """Return the number of the process that has written a file, or None for a whole one."""
    part = PART.fullmatch(name.removesuffix(SUFFIX))
    return None if part is None else int(part[2])


def read(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read safetensors files, whole ones and parts.

    Args:
        folder: Where they are.
        names: Theirs.

    Returns:
        File without its suffix and part -> name -> tensor, or `Rows`.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    found: dict[str, dict[str, Any]] = {}
    for name in sorted(names):
        stem = name.removesuffix(SUFFIX)
        part = PART.fullmatch(stem)
        if part is None:
            found[stem] = load_file(folder / name)
            continue
        group, file = found.setdefault(part[1], {}), safe_open(folder / name, "pt")
        rows = json.loads(file.metadata()["rows"])
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            if key not in rows:
                group[key] = file.get_tensor(key)
                continue
            first, end = rows[key][0], rows[key][0] + file.get_slice(key).get_shape()[0]
            group.setdefault(key, Rows(key)).places.append((first, end, file))
    return found


def whole(tensor: Any) -> "Tensor":
    """Return a whole tensor, of one or of its `Rows`."""
    found: Tensor = tensor.read(0, tensor.count) if isinstance(tensor, Rows) else tensor
    return found


def some(tensor: Any, first: int, end: int) -> "Tensor":
    """Return rows of a tensor, or of its `Rows`."""
    found: Tensor = tensor.read(first, end) if isinstance(tensor, Rows) else tensor[first:end]
    return found
