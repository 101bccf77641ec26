"""Data of stage 1 and of evaluation: one map-style set from many sources.

Items are numbered; the loop asks for numbers and gets float32 tensors. Images lie in [-1, 1].
Mirrored copies are items of their own, so an epoch is exact and flips need no random numbers.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from flowmatch import sources
from flowmatch.config import Config, UserError, option, used
from flowmatch.noise import Order

EMBEDDED = ("digits", "ring")


class DataConfig(Config):
    """What to train on, or to compare with."""

    source: Literal["digits", "ring", "idx", "npz", "latents", "images"] = option(
        "images",
        "digits: sklearn's 8x8 digits; ring: 2-D Gaussians on a circle; idx: a folder of gzipped "
        "IDX files (MNIST's format); npz: an .npz or .npy file; latents: the same of scaled latents; "
        "images: what HF datasets reads",
    )
    path: str = option(
        "",
        "where the data lies; for images: a folder, a parquet file, a webdataset tar, a glob of "
        "such, or a dataset's name on the hub",
        run=True,
        validate_default=True,
    )
    split: str = option("train", "which split: of idx train or test, of images any that is there")
    subset: str | None = option(None, "configuration of a dataset on the hub that has several")
    revision: str | None = option(None, "commit, branch or tag of a dataset on the hub")
    image_column: str | None = option(None, "column of the images; default: the only one")
    label_column: str | None = option(None, "column of the labels; default: the only one")
    size: int | None = option(
        None,
        "pixels: the short side is resized to it, never enlarged, and the centre cropped; "
        "default: as stored",
        ge=1,
    )
    channels: Literal[1, 3] | None = option(
        None, "convert to 1 (grey) or 3 (RGB); default: as stored"
    )
    flip: bool = option(False, "add every image's mirror image to the set")
    labels: bool = option(
        False, "give class labels: trains a conditional flow", validate_default=True
    )
    samples: int = option(50_000, "ring: number of samples", ge=1)
    seed: int = option(0, "ring: seed of the samples", ge=0, lt=1 << 63)
    memory: int = option(2048, "MiB up to which decoded images are kept in memory", run=True, ge=0)
    threads: int = option(1, "threads that decode images", run=True, ge=1)

    @pydantic.field_validator("path")
    @classmethod
    def _path(cls, path: str, info: pydantic.ValidationInfo) -> str:
        source = info.data.get("source")  # missing where it is itself a fault
        if source in EMBEDDED and path:
            raise ValueError(f"source {source} is built in; leave path out")
        if source and source not in EMBEDDED and not path:
            raise ValueError(f"source {source} needs the path of the data")
        return path

    @pydantic.field_validator(
        "samples", "seed", "subset", "revision", "image_column", "label_column"
    )
    @classmethod
    def _used(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        source = "ring" if info.field_name in ("samples", "seed") else "images"
        return used(cls, value, info, "source", source)

    @pydantic.field_validator("labels", mode="after")
    @classmethod
    def _labelled(cls, value: bool, info: pydantic.ValidationInfo) -> bool:
        column = info.data.get("label_column")
        if column is not None and not value:
            raise ValueError(f"label_column={column} is read with labels=true alone")
        return value

    @pydantic.field_validator("split", "size", "channels", "flip")
    @classmethod
    def _fits(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        source, name = info.data.get("source"), info.field_name
        if name == "split" and source in ("digits", "ring", "npz", "latents") and value != "train":
            raise ValueError(f"source {source} has one split, train")
        if name == "split" and source == "idx" and value not in sources.IDX_NAMES:
            raise ValueError(f"source idx has the splits {' and '.join(sources.IDX_NAMES)}")
        if source in ("ring", "latents") and name in ("size", "channels", "flip") and value:
            what = "the ring's samples are points" if source == "ring" else "latents are coded"
            raise ValueError(f"{what}, not images")
        return value


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
