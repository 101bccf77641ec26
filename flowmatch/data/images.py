"""Images from files: decoded with Pillow through HF datasets, and converted to uint8 arrays.

torchvision is not needed. Images that do not fit are counted by kind of fault, and the keys of the
config say what is done with them; without these keys they are errors.
"""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from flowmatch.config import UserError
from flowmatch.data import flaws
from flowmatch.data.flaws import Flaw
from flowmatch.runs.process import bar_options

if TYPE_CHECKING:
    import PIL.Image

    from flowmatch.data.config import DataConfig

BROKEN = (  # what Pillow raises for damaged files
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError),
    *(struct.error, zlib.error, NotImplementedError),
)
LOOKED = 64  # images that a plan decodes at least, however little `memory` there is
CHUNK = 64  # images that are read from their table together
CHANNELS = {"1": 1, "L": 1, "LA": 1, "RGB": 3, "RGBA": 3, "P": 3, "PA": 3, "CMYK": 3, "YCbCr": 3}
GROUNDS = {"white": 255, "grey": 128, "black": 0}
_OPENED: "dict[tuple[str, ...], Rows]" = {}  # of this process, for the stages of a chain: at most two


def pixels(
    image: Any,
    config: "DataConfig",
    name: str,
    key: str = "data",
    changed: list[str] | None = None,
) -> np.ndarray:
    """Convert a PIL image to an array.

    Args:
        image: the PIL image.
        config: of the data: `channels` (default: the image's own), `background`, and how the image is
            brought to `size` (bicubic, antialiased).
        name: of the image, for errors.
        key: the key of the data, for errors.
        changed: gets `transparent` for an image laid on the background, `small` for an enlarged one.

    Returns:
        uint8 [C, H, W]. With `crop=random` it covers `size`, and `cropped` cuts it.

    Raises:
        Flaw: the image is no 8-bit image, is partly transparent, or too small.
    """
    if image.mode not in CHANNELS:
        raise Flaw("mode", name, f"has mode {image.mode}", key)
    channels = config.channels or CHANNELS[image.mode]
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        laid = _on_ground(image, config, name, key)
        if changed is not None and laid is not image:
            changed.append("transparent")
        image = laid
    image = image.convert("L" if channels == 1 else "RGB")
    if (sides := config.sides) is not None and image.size != sides[::-1]:
        own = image.size
        image = _fitted(image, sides, config, name, key)
        if changed is not None and _enlarged(own, sides, config.fit):
            changed.append("small")
    array = np.asarray(image)
    array = np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
    return array if sides is None or config.crop == "random" else cropped(array, sides)


def cropped(
    array: np.ndarray, sides: Sequence[int], place: Sequence[float] | None = None
) -> np.ndarray:
    """Cut a part out of an image.

    Args:
        array: [C, h, w].
        sides: height and width of the part, at most h and w.
        place: of the part along the height and the width, in [0, 1): 0 is at the top or left; default:
            the centre.

    Returns:
        [C, *sides], a view.
    """
    rooms = [there - side for there, side in zip(array.shape[1:], sides, strict=True)]
    if place is None:
        top, left = (room // 2 for room in rooms)
    else:
        top, left = (int(at * (room + 1)) for at, room in zip(place, rooms, strict=True))
    return array[:, top : top + sides[0], left : left + sides[1]]


def _on_ground(image: Any, config: "DataConfig", name: str, key: str) -> Any:
    """Lay a transparent image on the background."""
    from PIL import Image

    clear = image.convert("RGBA")
    if clear.getextrema()[3][0] == 255:
        return image
    if config.background is None:
        raise Flaw("transparent", name, "is partly transparent", key)
    level = GROUNDS[config.background]
    ground = Image.new("RGBA", image.size, (level, level, level, 255))
    ground.alpha_composite(clear)
    return ground.convert("RGB")


def _enlarged(own: tuple[int, int], sides: tuple[int, int], fit: str) -> bool:
    """Tell whether an image of [width, height] has to grow until it covers `sides`, or fills them."""
    scales = [side / there for side, there in zip(sides[::-1], own, strict=True)]
    return (max if fit == "crop" else min)(scales) > 1


def _fitted(image: Any, sides: tuple[int, int], config: "DataConfig", name: str, key: str) -> Any:
    """Resize an image until it covers `sides`, or lies inside them and is padded."""
    from PIL import Image

    high, wide = sides
    taller = wide * image.height >= high * image.width  # than the target: its width decides
    by_width = taller if config.fit == "crop" else not taller
    target, own = (wide, image.width) if by_width else (high, image.height)
    if own < target and config.small != "enlarge":
        raise Flaw("small", name, f"is {image.width}x{image.height}", key, config.size)
    resized = (
        max(1, round(image.width * target / own)),
        max(1, round(image.height * target / own)),
    )
    if config.fit == "crop":
        resized = (max(wide, resized[0]), max(high, resized[1]))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    if config.fit == "crop":
        return image
    level = GROUNDS[config.background or "white"]
    ground = Image.new(image.mode, (wide, high), level if image.mode == "L" else (level,) * 3)
    ground.paste(image, ((wide - image.width) // 2, (high - image.height) // 2))
    return ground


def open_images(rows: Any, column: str, config: "DataConfig", key: str, digest: str) -> "Rows":
    """Open images like `Rows`, once in a process: the stages of a chain read the same ones."""
    name = (key, column, digest, config.model_dump_json())
    if name not in _OPENED:
        opened = Rows(rows, column, config, key)
        while len(_OPENED) > 1:
            del _OPENED[next(iter(_OPENED))]
        _OPENED[name] = opened
    return _OPENED[name]


class Rows:
    """Images of a datasets.Dataset by number, decoded when the set is opened or when they are read.

    If `memory` suffices for all images, they are kept.

    Attributes:
        shape: of an image, (C, H, W).
        kept: the numbers of the rows that are images of the set; the others are skipped.
        skipped: a line for each row that is skipped.
        notes: what the plan says of the images.
    """

    def __init__(self, rows: Any, column: str, config: "DataConfig", key: str = "data"):
        """Decode all images, or as many as fit into `memory`, and count what is wrong with them.

        Args:
            rows: a datasets.Dataset.
            column: name of its column of images.
            config: of the data.
            key: the key of the data, for errors.

        Raises:
            UserError: with a line for each kind of fault. In calls: naming an image that was not
                checked, and is damaged, missing, or unlike the first.
        """
        import datasets
        from PIL import Image

        self.rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column, self.config, self.key = column, config, key
        usual = Image.MAX_IMAGE_PIXELS  # Pillow refuses twice as many
        if usual is not None and 2 * usual < config.megapixels * 1_000_000:
            Image.MAX_IMAGE_PIXELS = config.megapixels * 500_000
        self.random = config.crop == "random"
        self.shape: tuple[int, ...] = ()
        self.decoded: list[np.ndarray] | None = []
        self._check()

    def _check(self) -> None:
        """Decode images until all are seen, or the memory is full and none may be skipped."""
        from tqdm import tqdm

        count, config = len(self.rows), self.config
        found: list[Flaw] = []
        changes: dict[str, tuple[int, str]] = {}  # how many, and the first
        bad: set[int] = set()
        ids = np.arange(count)
        with tqdm(
            total=count, unit="image", desc=f"{self.key}: checking", delay=2, **bar_options()
        ) as bar:
            done = 0
            while done < len(ids):
                part = ids[done : done + CHUNK]
                for i, made in zip(part.tolist(), self._map(self._tried, part), strict=True):
                    array, flaw, changed, name = made
                    for change in changed:
                        number, first = changes.get(change, (0, name))
                        changes[change] = (number + 1, first)
                    if flaw is not None:
                        found.append(flaw)
                        bad.add(i)
                    elif array is not None:
                        if not self.shape:
                            ids = self._first(array, ids, done + len(part))
                        if (flaw := self._unlike(array, i)) is not None:
                            found.append(flaw)
                        elif self.decoded is not None:
                            self.decoded.append(array)
                done += len(part)
                bar.total = len(ids)
                bar.update(len(part))
        skipping = {"bad": config.bad == "skip", "small": config.small == "skip"}
        refused = [flaw for flaw in found if not skipping.get(flaw.way, False)]
        seen = min(done, len(ids))
        self.notes = flaws.told(changes, config, seen, count)
        if refused:
            raise UserError(flaws.lines(refused, self.key, seen, count))
        if not self.shape:
            raise UserError(f"{self.key}: all {count} images are skipped; first: {found[0]}")
        self.kept = np.array([i for i in range(count) if i not in bad], dtype=np.int64)
        self.skipped = tuple(str(flaw) for flaw in found)
        self.notes += flaws.left_out(found, self.key, count)
        if seen < count:
            self.decoded = None
            self.notes.append(
                f"{seen:,} of {count:,} images are checked, as many as fit {self.key}.memory="
                f"{config.memory}; the other {count - seen:,} are checked when they are read"
            )
        elif self.decoded is not None and sum(a.nbytes for a in self.decoded) > self._room:
            self.decoded = None

    @property
    def _room(self) -> int:
        return self.config.memory << 20

    def _first(self, array: np.ndarray, ids: np.ndarray, done: int) -> np.ndarray:
        """Take the shape from the first image; return the numbers of the images to check.

        done: how many of them are checked already.
        """
        sides = self.config.sides
        self.shape = array.shape if sides is None else (array.shape[0], *sides)
        fit = max(LOOKED, self._room // array.nbytes)
        if fit >= len(ids):
            return ids
        self.decoded = None
        if "skip" in (self.config.bad, self.config.small):  # the number of images must be known
            return ids
        some = np.linspace(0, len(ids) - 1, fit).astype(int)
        return np.unique(np.concatenate([ids[:done], some]))

    def __call__(self, ids: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
        """Return uint8 [B, C, H, W] for numbers int64 [B].

        places: where random crops lie, float64 [B, 2] in [0, 1); default: the centre.
        """
        arrays = self._decode(ids) if self.decoded is None else [self.decoded[i] for i in ids]
        if self.random:
            where = [None] * len(ids) if places is None else places.tolist()
            arrays = [
                cropped(array, self.shape[1:], place)
                for array, place in zip(arrays, where, strict=True)
            ]
        return np.stack(arrays)

    def _name(self, i: int, row: dict[str, Any] | None = None) -> str:
        row = row or self.rows[i][self.column]
        return f"{self.key}: image {i}" + (f" ({row['path']})" if row and row.get("path") else "")

    @contextmanager
    def _opened(self, i: int, row: dict[str, Any] | None) -> "Iterator[PIL.Image.Image]":
        """Open an image; errors in the body are also those of this image."""
        from PIL import Image

        name, limit = self._name(i, row), self.config.megapixels
        if row is None or row["bytes"] is row["path"]:  # None
            raise Flaw("missing", name, "is missing: its row has no image", self.key)
        try:
            with Image.open(
                row["path"] if row["bytes"] is None else BytesIO(row["bytes"])
            ) as image:
                if image.width * image.height > limit * 1_000_000:
                    raise Image.DecompressionBombError
                yield image
        except Image.DecompressionBombError:
            raise Flaw("huge", name, f"has more than {limit} million pixels", self.key) from None
        except UserError:
            raise
        except BROKEN as error:
            raise Flaw("unreadable", name, f"cannot be read: {error}", self.key) from None

    def _map(self, function: Callable[[int, Any], Any], ids: np.ndarray) -> list[Any]:
        stored = self.rows[ids.tolist()][self.column]
        if self.config.threads == 1:
            return [function(i, row) for i, row in zip(ids.tolist(), stored, strict=True)]
        with ThreadPoolExecutor(self.config.threads) as pool:
            return list(pool.map(function, ids.tolist(), stored))

    def _decode(self, ids: np.ndarray) -> list[np.ndarray]:
        """Decode images; raises the first Flaw."""
        rows = self.kept[ids]
        made = self._map(lambda i, row: self._one(i, row)[0], rows)
        for i, array in zip(rows.tolist(), made, strict=True):
            if (flaw := self._unlike(array, i)) is not None:
                raise flaw
        return made

    def _tried(self, i: int, row: Any) -> tuple[np.ndarray | None, Flaw | None, list[str], str]:
        """Decode an image: what it is, or what is wrong with it, what was changed, and its name."""
        name = self._name(i, row).removeprefix(f"{self.key}: ")
        try:
            array, changed = self._one(i, row, look=True)
        except Flaw as flaw:
            return None, flaw, [], name
        return array, None, changed, name

    def _one(self, i: int, row: Any, look: bool = False) -> tuple[np.ndarray, list[str]]:
        """Decode an image; with `look` tell what is lost or changed, a key of `flaws.CHANGES` each."""
        from PIL import ExifTags, ImageOps

        with self._opened(i, row) as image:
            # an MPO is a photo with its preview
            several = look and image.format != "MPO" and getattr(image, "n_frames", 1) > 1
            image.load()
            turned = ExifTags.Base.Orientation in image.getexif()
            upright = ImageOps.exif_transpose(image) if turned else image
            changed = ["frames"] if several else []
            array = pixels(upright, self.config, self._name(i, row), self.key, changed)
            return array, changed

    def _unlike(self, array: np.ndarray, i: int) -> Flaw | None:
        """Compare an image with the first one."""
        channels, *sides = array.shape
        if channels != self.shape[0]:
            told = f"has {channels} channels, the first image {self.shape[0]}"
            return Flaw("channels", self._name(i), told, self.key)
        if not self.random and tuple(sides) != self.shape[1:]:
            told = f"is {list(array.shape)}, the first image {list(self.shape)}"
            return Flaw("shape", self._name(i), told, self.key)
        return None
