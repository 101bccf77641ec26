"""Data of stage 1 and of evaluation: one map-style dataset for all sources.

Items are numbered, and the training loop reads them by number as float32 tensors. Images are in
[-1, 1]. Mirrored copies are items of their own, so that an epoch is exact and flips need no random
numbers.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data import sources
from flowmatch.data.config import DataConfig
from flowmatch.flow import noise
from flowmatch.flow.noise import Order
from flowmatch.runs.files import write_atomic


@dataclass(frozen=True)
class Data(sources.SourceData):
    """A map-style dataset.

    Items 0 to count - 1 are the samples of the source; with `flip`, item count + i is the mirror image
    of item i.
    """

    flip: bool = False

    def __len__(self) -> int:
        return self.count * (2 if self.flip else 1)

    @property
    def images(self) -> bool:
        """Whether samples are images, with values in [-1, 1]."""
        return len(self.shape) == 3 and not self.latents

    def batch(
        self, ids: np.ndarray, counters: np.ndarray | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Read items by their numbers.

        Args:
            ids: int64 [B] in [0, len).
            counters: places of the items in a training, int64 [B], by which random crops differ each
                time that an item is read; default: `ids`, so that an item always has the same crop.
            seed: of random crops.

        Returns:
            x1: float32 [B, *shape], and label: int64 [B], if the config asks for labels.
        """
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(
                f"got ids from {ids.min()} to {ids.max()}; the data has {len(self)} items"
            )
        rows = ids % self.count
        if self.part is None:
            x1 = torch.from_numpy(self.read(rows))
        else:
            drawn = ids if counters is None else counters
            x1 = torch.from_numpy(self.part(rows, noise.places(seed, drawn)))
        x1 = x1.float().div_(127.5).sub_(1) if x1.dtype == torch.uint8 else x1
        mirrored = torch.from_numpy(ids >= self.count)
        if mirrored.any():
            x1[mirrored] = x1[mirrored].flip(-1)
        batch = {"x1": x1}
        if self.label is not None:
            batch["label"] = torch.from_numpy(self.label[rows])
        return batch


def load(config: DataConfig, key: str = "data") -> Data:
    """Open the data that a config names.

    Images are decoded only when they are first read, so that this is cheap enough for a dry run.

    Args:
        config: of the data.
        key: the key of that config, for errors.

    Raises:
        UserError: for data that is missing, or not as the config says.
    """
    source = sources.SOURCES[config.source](config, key)
    if config.flip and len(source.shape) != 3:
        raise UserError(
            f"{key}.flip=true: samples of shape {list(source.shape)} are not images; use "
            f"{key}.flip=false"
        )
    return Data(**vars(source), flip=config.flip)


def reference(data: Data, n: int, seed: int) -> dict[str, Tensor]:
    """Draw n different items, as a batch, for a comparison with samples."""
    if n > len(data):
        raise UserError(
            f"a reference of {n} samples was asked for, but the data has {len(data)}; use at most that"
        )
    return data.batch(Order(len(data), seed)(np.arange(n)))


def write_skipped(data: Data, folder: str | os.PathLike[str]) -> None:
    """Write skipped.txt into a run folder, the list of the pictures that are left out, if any are."""
    if data.skipped:
        write_atomic(Path(folder) / "skipped.txt", "".join(f"{line}\n" for line in data.skipped))
