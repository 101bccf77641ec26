"""Images from files: decoded with Pillow through HF datasets, and converted to uint8 arrays.

torchvision is not needed. An image that would have to be enlarged, or that has transparent pixels, is
an error that names it.
"""

import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from flowmatch.config import UserError

if TYPE_CHECKING:
    import PIL.Image

    from flowmatch.data.config import DataConfig

BROKEN = (  # what Pillow raises for damaged files
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError),
    *(struct.error, zlib.error, NotImplementedError),
)
LOOKED = 4096  # images that a plan opens at most
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

    Attributes:
        shape: of an image, (C, H, W).
        notes: what the plan says of the images.
    """

    def __init__(self, rows: Any, column: str, config: "DataConfig", key: str = "data"):
        """Decode the first image, which determines the shape, and open up to 4,096 of them.

        Args:
            rows: a datasets.Dataset.
            column: name of its column of images.
            config: of the data.
            key: the key of the data, for errors.

        Raises:
            UserError: here and in calls, naming an image that is damaged, missing, or unlike the first.
        """
        import datasets
        from PIL import Image

        self.rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column, self.config, self.key = column, config, key
        usual = Image.MAX_IMAGE_PIXELS  # Pillow refuses twice as many
        if usual is not None and 2 * usual < config.megapixels * 1_000_000:
            Image.MAX_IMAGE_PIXELS = config.megapixels * 500_000
        self.notes = self._look()
        first = self._one(0, self.rows[0][column])
        self.shape: tuple[int, ...] = first.shape
        self.keep = first.nbytes * len(rows) <= config.memory << 20
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

    def _look(self) -> list[str]:
        """Open images without decoding them; say how many have several frames."""
        count = len(self.rows)
        ids = np.unique(np.linspace(0, count - 1, min(count, LOOKED)).astype(int))
        frames = []
        for part in np.split(ids, range(64, len(ids), 64)):
            stored = self.rows[part.tolist()][self.column]
            for i, row in zip(part, stored, strict=True):
                with self._opened(i, row) as image:
                    # an MPO is a photo with its preview
                    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                        frames.append(self._name(i, row).removeprefix(f"{self.key}: "))
        if not frames:
            return []
        some = (
            f"{count} images" if len(ids) == count else f"{len(ids)} images looked at, of {count},"
        )
        told = f"{len(frames)} of the {some} hold several frames, of which the first is read"
        return [f"{told}; first {frames[0]}"]

    def _name(self, i: int, row: dict[str, Any] | None) -> str:
        return f"{self.key}: image {i}" + (f" ({row['path']})" if row and row.get("path") else "")

    @contextmanager
    def _opened(self, i: int, row: dict[str, Any] | None) -> "Iterator[PIL.Image.Image]":
        """Open an image; errors in the body are also those of this image."""
        from PIL import Image

        name, limit = self._name(i, row), self.config.megapixels
        if row is None or row["bytes"] is row["path"]:  # None
            raise UserError(f"{name} is missing: its row has no image")
        try:
            with Image.open(
                row["path"] if row["bytes"] is None else BytesIO(row["bytes"])
            ) as image:
                if image.width * image.height > limit * 1_000_000:
                    raise Image.DecompressionBombError
                yield image
        except Image.DecompressionBombError:
            raise UserError(
                f"{name} has more than {limit} million pixels; a small file can unpack into too much "
                f"memory: to allow it, raise {self.key}.megapixels"
            ) from None
        except UserError:
            raise
        except BROKEN as error:
            raise UserError(f"{name} cannot be read: {error}") from None

    def _decode(self, ids: np.ndarray) -> np.ndarray:
        stored = self.rows[ids.tolist()][self.column]
        if self.config.threads == 1:
            return np.stack([self._one(i, row) for i, row in zip(ids, stored, strict=True)])
        with ThreadPoolExecutor(self.config.threads) as pool:
            return np.stack(list(pool.map(self._one, ids, stored)))

    def _one(self, i: int, row: dict[str, Any] | None) -> np.ndarray:
        from PIL import ExifTags, ImageOps

        name, size, channels = self._name(i, row), self.config.size, self.config.channels
        with self._opened(i, row) as image:
            image.load()
            turned = ExifTags.Base.Orientation in image.getexif()
            upright = ImageOps.exif_transpose(image) if turned else image
            array = pixels(upright, size, channels, name, self.key)
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
