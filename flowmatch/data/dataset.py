"""Data of stage 1 and of evaluation: one map-style set from many sources.

Items are numbered; the loop asks for numbers and gets float32 tensors. Images lie in [-1, 1].
Mirrored copies are items of their own, so an epoch is exact and flips need no random numbers.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data import sources
from flowmatch.data.config import DataConfig
from flowmatch.flow.noise import Order

# the key of the data in what its readers say of it; not what a path has in it
NAMED = re.compile(r"(?<![\w/.-])data(?=: |\.(path|split|labels|size|channels|flip|\w+_column)\b)")


@dataclass(frozen=True)
class Data(sources.Found):
    """A map-style set. Items 0 to count - 1 are as read; with flip, count + i is i mirrored."""

    flip: bool = False

    def __len__(self) -> int:
        return self.count * (2 if self.flip else 1)

    @property
    def images(self) -> bool:
        """Tell whether samples are images, with values in [-1, 1]."""
        return len(self.shape) == 3 and not self.latents

    def batch(self, ids: np.ndarray) -> dict[str, Tensor]:
        """Give the items of some numbers. ids: int64 [B] in [0, len).

        Returns x1: float32 [B, *shape] and, where the config asks for labels, label: int64 [B].
        """
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise IndexError(f"ids from {ids.min()} to {ids.max()}: the data has {len(self)} items")
        rows = ids % self.count
        x1 = torch.from_numpy(self.read(rows))
        x1 = x1.float().div_(127.5).sub_(1) if x1.dtype == torch.uint8 else x1
        mirrored = torch.from_numpy(ids >= self.count)
        if mirrored.any():
            x1[mirrored] = x1[mirrored].flip(-1)
        batch = {"x1": x1}
        if self.label is not None:
            batch["label"] = torch.from_numpy(self.label[rows])
        return batch


def load(config: DataConfig, key: str = "data") -> Data:
    """Open the data that a config names. key: of that config.

    Cheap enough for a dry run: images are decoded when first asked for. Raises UserError saying
    what is missing or unfit.
    """
    try:
        found = sources.SOURCES[config.source](config)
        if config.flip and len(found.shape) != 3:
            raise UserError(f"data.flip=true: samples of shape {list(found.shape)} are no images")
    except UserError as error:
        raise UserError([NAMED.sub(key, line) for line in error.faults]) from None
    return Data(**vars(found), flip=config.flip)


def reference(data: Data, n: int, seed: int) -> dict[str, Tensor]:
    """Draw n different items to compare samples with: a batch, x1: [n, *shape]."""
    if n > len(data):
        raise UserError(f"a reference of {n} samples: the data has {len(data)}; ask for no more")
    return data.batch(Order(len(data), seed)(np.arange(n)))
