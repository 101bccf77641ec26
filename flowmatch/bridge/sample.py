"""One pair on its way between two formats, and what a format has to offer."""

import io
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError

DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Sample:
    """One pair.

    Args:
        x0: noise, [*shape], float16 or float32.
        x1: data, likewise; None where a format holds a picture in its place.
        states: of the path between them, [K, *shape], or None.
        label: number of its class or prompt, or None.
        text: its prompt, or the name of its class, or None.
        embedding: the network's text arguments, [L, D] or [D] each, or None.
        picture: what x1 is decoded to, uint8 [H, W] or [H, W, 3], or None.
    """

    x0: np.ndarray
    x1: np.ndarray | None
    states: np.ndarray | None = None
    label: int | None = None
    text: str | None = None
    embedding: list[Tensor] | None = None
    picture: np.ndarray | None = None

    @property
    def path(self) -> np.ndarray:
        """The noise and the states, [1 + K, *shape]."""
        return (
            self.x0[None] if self.states is None else np.concatenate([self.x0[None], self.states])
        )


@dataclass(frozen=True)
class Facts:
    """What holds for all pairs of a set that is converted.

    Args:
        count: number of pairs.
        shape: of x0 and x1.
        dtype: as stored.
        times: of the states, in (0, 1), rising.
        prompts: whether texts are prompts.
        labels: whether there are labels or prompts.
        embedding: whether text embeddings are at hand.
        teacher: the teacher's digest.
    """

    count: int
    shape: tuple[int, ...]
    dtype: str
    times: list[float] = field(default_factory=list)
    prompts: bool = False
    labels: bool = False
    embedding: bool = False
    teacher: str = ""


class Reader(Protocol):
    """A set in a foreign format."""

    count: int  # number of its samples
    notes: list[str]  # what is left out, for the user
    names: list[str]  # files that are its content, relative to the folder

    @property
    def times(self) -> list[float] | None:
        """Times of the states, or None where they are not known; then samples have none."""

    def sample(self, i: int) -> Sample:
        """Read one sample; raise UserError for one that is damaged."""

    def texts(self) -> list[str] | None:
        """Return the texts of all samples, or None where they have none."""

    def labels(self) -> list[int] | None:
        """Return the labels of all samples, or None where they have none."""


class Format(Protocol):
    """A format that is written and read."""

    @property
    def name(self) -> str:
        """Name of the format."""

    @property
    def half(self) -> bool:
        """Whether it holds float16 only."""

    @property
    def pictures(self) -> bool:
        """Whether it holds x1 as a picture, and no states."""

    def check(self, facts: Facts) -> list[str]:
        """Return what is left out or lost, in lines for the user; raise UserError for what cannot be."""

    def write(
        self, folder: Path, k: int, first: int, samples: Iterable[Sample], facts: Facts
    ) -> None:
        """Write part k below an empty folder, under the names that it has in the set.

        Names that begin with a dot are of files that `join` reads, and that are removed after it.

        Args:
            folder: the empty folder.
            k: number of the part.
            first: number of its first sample in the set.
            samples: of the part.
            facts: of the set.
        """

    def join(self, folder: Path, built: Path, parts: list[int], facts: Facts) -> None:
        """Write what holds for all parts below `built`, an empty folder.

        Args:
            folder: of the set.
            built: where it is written.
            parts: number of samples of each part.
            facts: of the set.
        """

    def read(self, folder: Path, told: dict[str, Any]) -> Reader:
        """Open a set. told: facts that flowmatch has written beside it, or that the user gives."""


def read_pickle(content: Any, where: str) -> Any:
    """Read what torch.save has written, tensors and plain containers only.

    Args:
        content: bytes, or a path.
        where: its name, for the message.

    Raises:
        UserError: It is damaged, or holds anything else.
    """
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        told = " ".join(str(error).split())[:150]
        raise UserError(f"{where} cannot be read as tensors: {told}") from None


def array_of(tensor: Any, where: str) -> np.ndarray:
    """Return a tensor of floats as an array of float16 or float32; bfloat16 becomes float32.

    Raises:
        UserError: It is something else.
    """
    if isinstance(tensor, Tensor) and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    found = tensor.numpy() if isinstance(tensor, Tensor) else tensor
    if not isinstance(found, np.ndarray) or found.dtype.name not in DTYPES:
        told = getattr(tensor, "dtype", type(tensor).__name__)
        raise UserError(f"{where} is {told}; expected a tensor of float16, bfloat16 or float32")
    return found.astype(found.dtype.newbyteorder("<"), copy=False)


def saved(value: Any) -> bytes:
    """Return what torch.save writes of a tensor, or of containers of tensors."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def tensor_of(array: np.ndarray) -> Tensor:
    """Return an array as a tensor that has its own memory alone; a picture of it may be read-only."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def check_frames(name: str, shape: tuple[int, ...]) -> None:
    """Raise UserError for samples that are no pictures or videos: [C, H, W] or [C, F, H, W]."""
    if len(shape) not in (3, 4):
        raise UserError(
            f"--to {name} holds pictures [C, H, W] and videos [C, F, H, W]; these pairs are "
            f"{list(shape)}; use --to npy or fastgen"
        )


def to_frames(array: np.ndarray, rank: int) -> np.ndarray:
    """Turn [..., C, H, W] or [..., C, F, H, W] (`rank` 3 or 4) into frames, [..., F, C, H, W]."""
    return np.expand_dims(array, -4) if rank == 3 else np.swapaxes(array, -4, -3)


def from_frames(array: np.ndarray) -> np.ndarray:
    """Turn frames [..., F, C, H, W] into a picture [..., C, H, W] where there is one, or a video."""
    return array.squeeze(-4) if array.shape[-4] == 1 else np.swapaxes(array, -4, -3)


def chosen_times(count: int, told: dict[str, Any], notes: list[str]) -> list[float] | None:
    """Find the times of so many states: those that are told, or none, with a note."""
    times = told.get("times")
    if not count:
        return []
    if isinstance(times, list) and len(times) == count:
        return [float(t) for t in times]
    if times:
        raise UserError(f"--times gives {len(times)} times; the paths have {count} states between")
    notes.append(
        f"the times of {count} states of each path are unknown; they are left out: --times keeps them"
    )
    return None
