"""Images from files: decoded with Pillow through HF datasets, and converted to uint8 arrays.

torchvision is not needed. An image that would have to be enlarged, or that has transparent pixels, is
an error that names it.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from flowmatch.config import UserError

CHANNELS = {"1": 1, "L": 1, "LA": 1, "RGB": 3, "RGBA": 3, "P": 3, "PA": 3, "CMYK": 3, "YCbCr": 3}


def pixels(
    image: Any, size: int | None, channels: int | None, name: str, key: str = "data"
) -> np.ndarray:
    """Convert a PIL image to an array.

    Args:
        image: the PIL image.
        size: resize the short side to so many pixels (bicubic, antialiased) and crop the centre to a
            square; None to keep the size.
        channels: 1 or 3; None for the image's own.
        name: of the image, for errors.
        key: the key of the data, for errors.

    Returns:
        uint8 [C, H, W].

    Raises:
        UserError: naming the image, if it is no 8-bit image, is partly transparent, or too small.
    """
    from PIL import Image

    if image.mode not in CHANNELS:
        raise UserError(
            f"{name} has mode {image.mode}; expected 8-bit grey or colour, one of "
            f"{', '.join(CHANNELS)}; convert the files first"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        lowest = image.convert("RGBA").getextrema()[3][0]
        if lowest < 255:
            raise UserError(f"{name} is partly transparent; put it on a background first")
    image = image.convert("L" if (channels or CHANNELS[image.mode]) == 1 else "RGB")
    short = min(image.size)
    if size is not None and short < size:
        raise UserError(
            f"{name} is {image.width}x{image.height}, smaller than {key}.size={size}; images are never "
            f"enlarged: use {key}.size={short} or less, or remove such images"
        )
    if size is not None and image.size != (size, size):
        wide, high = (max(size, round(side * size / short)) for side in image.size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - size) // 2, (high - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.asarray(image)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


class Rows:
    """Images of a datasets.Dataset by row number, decoded when they are read.

    If `memory` suffices for all images, they are decoded once, at the first call, and kept.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        size: int | None,
        channels: int | None,
        memory: int,
        threads: int,
        key: str = "data",
    ):
        """Decode the first image, which determines the shape.

        Args:
            rows: a datasets.Dataset.
            column: name of its column of images.
            size: see `pixels`.
            channels: see `pixels`.
            memory: bytes up to which decoded images are kept.
            threads: number of threads that decode images.
            key: the key of the data, for errors.

        Raises:
            UserError: here and in calls, naming an image that is damaged, missing, or unlike the first.
        """
        import datasets

        self.decoder = datasets.Image()
        self.rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column, self.size, self.channels, self.threads = column, size, channels, threads
        self.key = key
        first = self._one(0, self.rows[0][column])
        self.shape: tuple[int, ...] = first.shape
        self.keep = first.nbytes * len(rows) <= memory
        self.decoded: np.ndarray | None = None

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Return uint8 [B, C, H, W] for row numbers int64 [B]."""
        if not self.keep:
            return self._decode(ids)
        if self.decoded is None:
            decoded = np.empty((len(self.rows), *self.shape), dtype=np.uint8)
            for start in range(0, len(decoded), 1024):
                part = np.arange(start, min(start + 1024, len(decoded)))
                decoded[part] = self._decode(part)
            self.decoded = decoded
        return self.decoded[ids]

    def _decode(self, ids: np.ndarray) -> np.ndarray:
        stored = self.rows[ids.tolist()][self.column]
        if self.threads == 1:
            return np.stack([self._one(i, row) for i, row in zip(ids, stored, strict=True)])
        with ThreadPoolExecutor(self.threads) as pool:
            return np.stack(list(pool.map(self._one, ids, stored)))

    def _one(self, i: int, row: dict[str, Any] | None) -> np.ndarray:
        name = f"{self.key}: image {i}" + (f" ({row['path']})" if row and row.get("path") else "")
        if row is None:
            raise UserError(f"{name} is missing: its row has no image")
        try:
            image = self.decoder.decode_example(row)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow: SyntaxError for broken PNGs
            raise UserError(f"{name} cannot be read: {error}") from None
        array = pixels(image, self.size, self.channels, name, self.key)
        expected = getattr(self, "shape", array.shape)
        if array.shape[0] != expected[0]:
            raise UserError(
                f"{name} has {array.shape[0]} channels, the first image {expected[0]}; "
                f"use {self.key}.channels=1 or 3 to convert all"
            )
        if array.shape != expected:
            raise UserError(
                f"{name} is {list(array.shape)}, the first image {list(expected)}; set {self.key}.size"
            )
        return array
