"""The sources of data: each opens and checks what a DataConfig names.

Arrays are checked whole when they are opened, so that NaN, an unexpected range of values, or unused
labels are reported before any training. Errors name keys below `key`, the config's own key.
"""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowmatch.config import UserError, require
from flowmatch.data import digits_text, encoded, handwritten, hub, images
from flowmatch.data.config import IDX_NAMES
from flowmatch.data.files import local_files
from flowmatch.data.labels import check_labels
from flowmatch.flow import noise
from flowmatch.flow.toy import RING_MODES, RING_STD, ring_mixture

if TYPE_CHECKING:
    from flowmatch.data.config import DataConfig


Table = dict[str, Callable[[], Iterable[Any]]]


@dataclass(frozen=True)
class SourceData:
    """The samples of a source.

    Args:
        read: int64 [B] -> [B, *shape], uint8 pixels or float32.
        count: number of samples.
        shape: of one sample, (C, H, W) or (D,) for points.
        digest: sha256 of the stored data, before any conversion.
        label: int64 [count], if the config asks for labels.
        classes: K, where labels are 0 to K - 1.
        latents: whether samples are latents or other values as they are, not images.
        notes: what the plan says beside the count, such as files that are left out.
        names: of the classes, if they have names.
        skipped: a line for each picture that is left out as the config asks.
        encoding: how latents of a VAE are scaled, and the digest of the VAE; None for other samples.
        vae: folder of that VAE.
        part: reads random crops, (int64 [B], float64 [B, 2] places in [0, 1)) -> like `read`; None where
            there are none.
        table: what reads each column of the source by its name, for captions; None without columns.
    """

    read: Callable[[np.ndarray], np.ndarray]
    count: int
    shape: tuple[int, ...]
    digest: str
    label: np.ndarray | None = None
    classes: int | None = None
    latents: bool = False
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()
    encoding: dict[str, Any] | None = None
    vae: str = ""
    part: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    table: Table | None = None


def ring_samples(ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw samples of the ring; sample i depends on (seed, i) only.

    Returns:
        Points, float32 [B, 2], and the modes that they come from, int64 [B].
    """
    draws = [noise.generator(seed, int(i), noise.RING) for i in ids]
    modes = np.array([rng.integers(RING_MODES) for rng in draws], dtype=np.int64)
    scatter = np.stack([rng.standard_normal(2) for rng in draws])
    return (ring_mixture()[1][modes] + RING_STD * scatter).astype(np.float32), modes


def ring(config: "DataConfig", key: str) -> SourceData:
    """Draw the 2-D ring of Gaussians; the label of a point is the mode that it comes from."""
    points, modes = ring_samples(np.arange(config.samples), config.seed)
    return from_arrays(config, key, points, modes, _digest(points, modes), RING_MODES)


def digits(config: "DataConfig", key: str) -> SourceData:
    """Load sklearn's handwritten digits of 8x8."""
    require("sklearn", "eval", f"{key}.source=digits")
    x, label = handwritten.digits(config.split)
    return from_arrays(config, key, x, label, _digest(x, label), 10)


def captioned_digits(config: "DataConfig", key: str) -> SourceData:
    """Compose pictures of digits in colour with captions (`flowmatch.data.digits_text`)."""
    require("sklearn", "eval", f"{key}.source=digits_text")
    x, digit, captions = digits_text.pictures(config.split)
    source = from_arrays(config, key, x, digit, _digest(x, digit), 10)
    return replace(source, table={"caption": lambda: captions})


def idx(config: "DataConfig", key: str) -> SourceData:
    """Read a folder of gzipped IDX files, the format of MNIST."""
    listed = local_files(config.path, key)
    if listed is None or not listed.is_folder:
        raise UserError(
            f"{key}.path={config.path}: no such folder; Debian's package dataset-fashion-mnist installs "
            "one in /usr/share/datasets/fashion-mnist"
        )
    x = _read_idx(config, key, listed.files, "images")
    label = _read_idx(config, key, listed.files, "labels") if config.labels else None
    return from_arrays(config, key, x, label, listed.digest())


def _read_idx(config: "DataConfig", key: str, files: list[Path], kind: str) -> np.ndarray:
    """Read unsigned bytes: 0 0 8 ndim, big-endian sizes, values."""
    prefix = f"{IDX_NAMES[config.split]}-{kind}"
    fitting = [f for f in files if f.name.startswith(prefix) and f.suffix == ".gz"]
    if len(fitting) != 1:
        raise UserError(
            f"{key}.path={config.path}: expected one file {prefix}*.gz; the folder has "
            f"{', '.join(f.name for f in files[:8])}"
        )
    compressed = _contents(fitting[0], f"{key}.path={config.path}")
    try:
        content = gzip.decompress(compressed)
        if content[:3] != b"\0\0\x08":
            raise ValueError(f"it starts with {content[:4].hex(' ')}, not 00 00 08")
        shape = struct.unpack_from(f">{content[3]}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise UserError(
            f"{key}.path={config.path}: {fitting[0].name} is not a gzipped IDX file of bytes: {error}"
        ) from None


def _contents(file: Path, where: str, size: int = -1) -> bytes:
    """Read the beginning of a file, or all of it; raises UserError with the cause."""
    try:
        with open(file, "rb") as stream:
            return stream.read(size)
    except OSError as error:
        raise UserError(f"{where}: {file} cannot be read: {error.strerror}") from None


def npz(config: "DataConfig", key: str) -> SourceData:
    """Read images or points from .npz (x or images, y or labels) or .npy (no labels)."""
    return from_arrays(config, key, *_stored(config, key, "images"))


def latents(config: "DataConfig", key: str) -> SourceData:
    """Read scaled latents: a set that `encode` has made, or [N, C, H, W] from .npz or .npy."""
    if Path(config.path).suffix.lower() not in (".npz", ".npy"):
        return SourceData(**encoded.open_set(config, key))
    return _plain(config, key, "latents", 4, "floats [N, C, H, W]")


def arrays(config: "DataConfig", key: str) -> SourceData:
    """Read floats [N, C, ...] as they are: signals [N, C, T], volumes, or video [N, C, T, H, W]."""
    return _plain(config, key, "arrays", 0, "floats [N, C, ...]: signals [N, C, T], volumes, video")


def _plain(config: "DataConfig", key: str, kind: str, axes: int, expected: str) -> SourceData:
    """Read an array of values that are no pictures. axes: their number; 0 for three or more."""
    x, label, digest = _stored(config, key, kind)
    if x.dtype.kind != "f" or 0 in x.shape or x.ndim < 3 or (axes and x.ndim != axes):
        raise UserError(f"{key}: the array is {x.dtype} {list(x.shape)}; expected {expected}")
    _check_floats(x, key, latents=True)
    label, classes = check_labels(label, len(x), key) if config.labels else (None, None)

    def read(ids: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x[ids], dtype=np.float32)

    return SourceData(read, len(x), x.shape[1:], digest, label, classes, latents=True)


def _stored(config: "DataConfig", key: str, kind: str) -> tuple[np.ndarray, Any, str]:
    """Open an .npz or .npy file: (x, labels or None, digest). kind: another name for x."""
    where = f"{key}.path={config.path}"
    listed = local_files(config.path, key)
    file = Path(config.path)
    if listed is None or listed.files != [file]:
        reason = "is a folder" if file.is_dir() else "no such file"
        raise UserError(f"{where}: {reason}; expected an .npz or .npy file")
    head = _contents(file, where, 8)
    if not head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY")):
        raise UserError(
            f"{where} is no .npz or .npy file, which numpy.savez and numpy.save write: it starts with "
            f"{head!r}"
        )
    label = None
    try:
        stored = np.load(file, mmap_mode="r", allow_pickle=False)
        if isinstance(stored, np.ndarray):
            x = stored
            if config.labels:
                raise UserError(f"{key}.labels=true: {where} is one array; save x and y as .npz")
            _check_length(stored, file, where)
        else:
            x = stored[_array_name(stored.files, ("x", kind), where)]
            if config.labels:
                where_labels = f"{key}.labels=true: {where}"
                label = stored[_array_name(stored.files, ("y", "labels"), where_labels)]
    except UserError:
        raise
    except Exception as error:  # numpy and zipfile raise anything on a damaged header
        objects = "allow_pickle" in str(error) or "Python objects" in str(error)
        reason = "it holds Python objects" if objects else str(error)
        raise UserError(f"{where} is not an .npz or .npy file of plain numbers: {reason}") from None
    return x, label, listed.digest()


def _check_length(stored: np.ndarray, file: Path, where: str) -> None:
    """Check that an .npy file holds its array and nothing more."""
    assert isinstance(stored, np.memmap)
    more = file.stat().st_size - stored.offset - stored.nbytes
    if more > 0:
        raise UserError(
            f"{where} holds {more:,} bytes more than an array {list(stored.shape)}; save it again"
        )


def _array_name(held: list[str], names: tuple[str, str], where: str) -> str:
    fitting = [name for name in names if name in held]
    if held == ["arr_0"] and names[0] == "x":  # numpy's name for an array without one
        return held[0]
    if len(fitting) != 1:
        raise UserError(
            f"{where}: expected one array named {' or '.join(names)}; the file has "
            f"{', '.join(held) or 'none'}"
        )
    return fitting[0]


def from_arrays(
    config: "DataConfig",
    key: str,
    x: np.ndarray,
    label: Any,
    digest: str,
    classes: int | None = None,
) -> SourceData:
    """Check arrays and bring images to [N, C, H, W].

    Args:
        config: of the data.
        key: the key of that config.
        x: points [N, D] (floats), or images [N, H, W] or [N, H, W, C] (uint8, or floats in [-1, 1]).
        label: [N] or None.
        digest: of the arrays.
        classes: number of classes K, if it is known.
    """
    integers = x.dtype == np.uint8
    if not integers and x.dtype.kind != "f":
        raise UserError(f"{key}: the array is {x.dtype}; expected uint8, or floats in [-1, 1]")
    if x.ndim not in (2, 3, 4) or 0 in x.shape or (x.ndim == 2 and integers):
        raise UserError(
            f"{key}: the array is {x.dtype} {list(x.shape)}; expected images [N, H, W] or "
            "[N, H, W, C], or points [N, D] (floats)"
        )
    if x.ndim == 4 and x.shape[3] not in (1, 3):
        hint = "; move the channels to the last axis" if x.shape[1] in (1, 3) else ""
        raise UserError(
            f"{key}: the array is {list(x.shape)}; expected [N, H, W, C] with 1 or 3 channels{hint}"
        )
    if x.ndim == 3 and x.shape[2] in (1, 3, 4) and x.shape[1] != x.shape[2]:
        raise UserError(
            f"{key}: the array is {list(x.shape)}, likelier one picture than {len(x)} grey pictures of "
            f"{x.shape[1]}x{x.shape[2]}; store [N, H, W, C], or [N, H, W, 1] if it is what it says"
        )
    if not integers:
        _check_floats(x, key)
    if x.ndim > 2:
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
        channels, *sides = x.shape[1:]
        size, wanted = config.sides, config.channels
        if (size is not None and sides != [*size]) or wanted not in (None, channels):
            if not integers:
                raise UserError(
                    f"{key}.size={config.size}, {key}.channels={wanted}: the images are floats of "
                    f"{list(x.shape[1:])}, which are never converted; store them as uint8, or remove "
                    "these keys"
                )
            x = _convert(x, key, config)
    elif config.size or config.channels:
        raise UserError(
            f"{key}.size, {key}.channels: {list(x.shape)} are points, not images; remove these keys"
        )
    label, classes = check_labels(label, len(x), key, classes) if config.labels else (None, None)

    def read(ids: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x[ids], dtype=np.uint8 if integers else np.float32)

    return SourceData(read, len(x), x.shape[1:], digest, label, classes)


def _convert(x: np.ndarray, key: str, config: "DataConfig") -> np.ndarray:
    """Resize and convert uint8 [N, C, H, W] with Pillow, image by image."""
    from PIL import Image

    def one(i: int) -> np.ndarray:
        image = Image.fromarray(x[i, 0] if x.shape[1] == 1 else x[i].transpose(1, 2, 0))
        return images.pixels(image, config, f"{key}: image {i}", key)

    return np.stack([one(i) for i in range(len(x))])


def _check_floats(x: np.ndarray, key: str, latents: bool = False) -> None:
    low, high = math.inf, -math.inf
    rows = max(1, (1 << 24) // max(1, x[0].size))
    for start in range(0, len(x), rows):
        part = x[start : start + rows].astype(np.float32)
        bad = ~np.isfinite(part).reshape(len(part), -1).all(axis=1)
        if bad.any():
            raise UserError(f"{key}: sample {start + int(bad.argmax())} holds NaN or infinity")
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    if x.ndim == 2 or latents:
        return
    if low < -1 or high > 1 or low >= 0:
        way = "2 x - 1" if low >= 0 and high <= 1 else "values scaled to that range"
        raise UserError(
            f"{key}: got floats from {low:g} to {high:g}; expected images in [-1, 1]: store {way}, or "
            "uint8"
        )


def _digest(*arrays: np.ndarray) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype} {list(array.shape)}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def hugging_face(config: "DataConfig", key: str) -> SourceData:
    """Read image folders, parquet files, webdataset tars and names on the hub with HF datasets."""
    require("datasets", "data", f"{key}.source=images")
    import datasets

    rows, digest, notes = hub.open_rows(
        config.path, config, key, config.image_column, config.labels
    )
    if not len(rows):
        raise UserError(f"{key}.path={config.path} holds no rows")
    image = hub.image_column(rows.features, config.image_column, key)
    label = hub.label_column(rows.features, config.label_column, key) if config.labels else None
    rows = rows.cast_column(image, datasets.Image())
    digest = digest or hub.digest_rows(rows, image, label)
    read = images.open_images(rows, image, config, key, digest)
    notes = [*notes, *read.notes]
    if read.skipped:
        rows = rows.select(read.kept)
    columns = rows.remove_columns(image)
    table: Table = {name: partial(columns.__getitem__, name) for name in columns.column_names}
    more: dict[str, Any] = {"part": read if read.random else None, "skipped": read.skipped}
    if label is not None:
        values, names = hub.label_values(rows, label, key)
        known = None if names is None else len(names)
        more["label"], more["classes"] = check_labels(values, len(rows), key, known)
        more["names"] = names
    return SourceData(read, len(rows), read.shape, digest, notes=tuple(notes), table=table, **more)


SOURCES: dict[str, Callable[["DataConfig", str], SourceData]] = {
    "digits": digits,
    "digits_text": captioned_digits,
    "ring": ring,
    "idx": idx,
    "npz": npz,
    "latents": latents,
    "arrays": arrays,
    "images": hugging_face,
}
