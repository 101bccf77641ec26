"""Tables of images that HF datasets reads: image folders, parquet, webdataset tars, the hub.

Its own guesses are kept out where they surprise: files and splits are found here, by rules that an
error can state.
"""

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tarfile import TarError
from typing import Any

from flowmatch.config import UserError

SUFFIXES = {
    "imagefolder": [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"],
    "parquet": [".parquet"],
    "webdataset": [".tar"],
}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
HASHED = 1 << 30  # bytes: up to here a digest reads all contents, above it so much of them
PIECE = 1 << 20


def open_rows(path: str, split: str, subset: str | None, revision: str | None) -> tuple[Any, str]:
    """Open a split as a datasets.Dataset, and digest what the path names ("" for names on the hub).

    path: a folder of images, parquet files or tars, a file, a glob, or a dataset's name on the hub.
    Raises UserError for what cannot be found or read.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    where = f"data.path={path}"
    found = local_files(path)
    if found is not None and (subset or revision):
        raise UserError(f"{where} is on this disk; subset and revision are for names on the hub")
    try:
        if found is None:
            rows = datasets.load_dataset(path, subset, split=split, revision=revision)
            return rows, ""
        folder, files = found
        builder, digest = _builder(where, files), digest_files(folder, files)
        listed, source = _split_files(path, folder, files, split, builder)
        # The name makes the cache follow the content: by itself it goes by names and mtimes, and
        # gives the old rows for a file that was replaced with its time kept (rsync -t, tar).
        rows = datasets.load_dataset(
            builder, name=digest[:32], split="train", data_files={"train": source}
        )
        chosen = any(file.stem == "metadata" for file in files)  # a table that may leave files out
        if builder == "imagefolder" and not chosen and len(rows) != len(listed):
            raise UserError(
                f"{where}: datasets reads {len(rows)} of {len(listed)} image files; rename files "
                "and folders whose names start with __"
            )
        return rows, digest
    except ConnectionError as error:
        raise UserError(
            f"{where}: no such folder, file or glob here, and the hub cannot be reached: {error}"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TarError, DatasetsError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        key = f"data.split={split}: " if reason.startswith(("Unknown split", "Bad split")) else ""
        raise UserError(f"{key}{where} cannot be read: {reason}") from None


def _builder(where: str, files: list[Path]) -> str:
    """Choose the datasets builder by the files' suffixes."""
    kinds = {
        kind
        for kind, suffixes in SUFFIXES.items()
        for file in files
        if file.suffix.lower() in suffixes and file.stem != "metadata"
    }
    if len(kinds) != 1:
        held = " and ".join(sorted(kinds)) or "none of these"
        raise UserError(
            f"{where} holds {held}; expected either image files, .parquet files or .tar files. "
            "A glob such as 'FOLDER/*.parquet' picks one kind"
        )
    return kinds.pop()


def _split_files(
    path: str, folder: Path, files: list[Path], split: str, builder: str
) -> tuple[list[Path], str | list[str]]:
    """Pick the files of a split: those below the subfolder SPLIT, else those named SPLIT-*.

    What has neither is all one split, train; so is what has train/ or train-* beside names that are no
    split's: a class, or pictures, of trains. Images of a split have a number after it. Returns the
    files, and how to name them to datasets.
    """
    below = folder / split
    data = [file for file in files if file.suffix.lower() in SUFFIXES[builder]]
    inside = [file for file in data if below in file.parents]
    number = r"\d" if builder == "imagefolder" else ""
    named = [file for file in data if re.match(rf"{re.escape(split)}[-_.]{number}", file.name)]
    if split == "train":
        tops = {file.relative_to(folder).parts[0] for file in data if file.parent != folder}
        inside = inside if tops <= SPLITS else []
        others = re.compile(rf"({'|'.join(SPLITS)})[-_.]{number}")
        named = named if all(others.match(file.name) for file in data) else []
    if not inside and not named and split != "train":
        raise UserError(
            f"data.split={split}: data.path={path} has no such split: no subfolder {split}/, and "
            f"no file whose name starts with {split}- or {split}."
        )
    picked = inside or named or data
    whole = Path(path).expanduser().is_dir() and (inside or not named)
    if builder == "imagefolder" and whole:  # one pattern: a million names are slow
        return picked, f"{glob.escape(str(below if inside else folder))}/**"
    return picked, [str(file) for file in picked]


def local_files(path: str) -> tuple[Path, list[Path]] | None:
    """List the files that a path names, in the order of their names, and the folder they lie in.

    A folder stands for all files below it, but for names that start with a dot; * ? [ make a glob.
    None if nothing of that name is here and it may be a name on the hub: NAME or OWNER/NAME. Raises
    UserError otherwise.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place.parent, [place]
    if place.is_dir():
        return place, _walk(place)
    fixed = list(itertools.takewhile(lambda part: not set(part) & set("*?["), place.parts))
    if len(fixed) < len(place.parts):
        root = Path(*fixed)
        files = sorted(f for f in root.glob(str(place.relative_to(root))) if f.is_file())
        if not files:
            raise UserError(f"data.path={path} matches no file")
        return root, files
    suffixes = {".npy", ".npz", ".gz", ".zip"}.union(*SUFFIXES.values())
    hub = path.count("/") < 2 and path[0] not in "./~" and place.suffix.lower() not in suffixes
    if not hub:
        raise UserError(f"data.path={path} does not exist")
    return None


def _walk(place: Path) -> list[Path]:
    files = []
    for folder, below, names in os.walk(place):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in below:
            if (Path(folder) / name).is_symlink():
                raise UserError(
                    f"data.path={place}: {Path(folder, name).relative_to(place)} is a link to a "
                    "folder, which datasets would leave out; put the folder itself there"
                )
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    if not files:
        raise UserError(f"data.path={place} is an empty folder")
    return sorted(files)


def image_column(features: Any, asked: str | None) -> str:
    """Find the column of images: the one asked for, the only image, or the only one of bytes."""
    import datasets

    def holds_bytes(feature: Any) -> bool:
        if isinstance(feature, dict):
            return set(feature) == {"bytes", "path"}
        return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")

    kinds = [lambda feature: isinstance(feature, datasets.Image), holds_bytes]
    return _column(features, asked, kinds, "image")


def label_column(features: Any, asked: str | None) -> str:
    """Find the column of labels: the one asked for, the only ClassLabel, or the only integers."""
    import datasets

    def integers(feature: Any) -> bool:
        return isinstance(feature, datasets.Value) and "int" in feature.dtype

    kinds = [lambda feature: isinstance(feature, datasets.ClassLabel), integers]
    return _column(features, asked, kinds, "label")


def _column(
    features: Any, asked: str | None, kinds: Sequence[Callable[[Any], bool]], name: str
) -> str:
    listed = ", ".join(f"{column} ({_type(feature)})" for column, feature in features.items())
    fitting: list[str] = []
    for kind in kinds:
        fitting = fitting or [column for column, feature in features.items() if kind(feature)]
    if asked is not None:
        if asked in features and any(kind(features[asked]) for kind in kinds):
            return asked
        reason = f"is no column of {name}s" if asked in features else "is not there"
        raise UserError(f"data.{name}_column={asked} {reason}; the columns are {listed}")
    if len(fitting) != 1:
        reason = "several columns fit" if fitting else "no column fits"
        asks = "data.labels=true: " if name == "label" else ""
        raise UserError(
            f"{asks}{reason} as {name}s; set data.{name}_column; the columns are {listed}"
        )
    return fitting[0]


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """Hash files: relative name, size and, up to 1 GiB in total, content; hexadecimal sha256.

    Of more than that, pieces of 1 MiB, evenly spaced from each file's first byte to its last, 1 GiB in
    all; of more than 1,024 files none.
    """
    files = list(files)
    sizes = [file.stat().st_size for file in files]
    whole, pieces = sum(sizes) <= HASHED, HASHED // PIECE // max(1, len(files))
    sha = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        name = file.relative_to(folder).as_posix() if len(files) > 1 else "one file, whatever name"
        sha.update(f"{name}\0{size}\n".encode())
        if not whole and not pieces:
            continue
        with open(file, "rb") as stream:
            if whole or size <= pieces * PIECE:
                sha.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for number in range(pieces):
                stream.seek((size - PIECE) * number // max(1, pieces - 1))
                sha.update(stream.read(PIECE))
    return sha.hexdigest()


def digest_rows(rows: Any, image: str, label: str | None) -> str:
    """Hash the images and labels of rows from the hub, as stored; hexadecimal sha256.

    Above 1 GiB the names (the hub's commit among them) and sizes of the cached Arrow files instead.
    """
    sha = hashlib.sha256()
    if (rows.dataset_size or 0) > HASHED:
        for file in (Path(entry["filename"]) for entry in rows.cache_files):
            sha.update(f"{'/'.join(file.parts[-2:])}\0{file.stat().st_size}\n".encode())
        return sha.hexdigest()
    import datasets

    rows = rows.cast_column(image, datasets.Image(decode=False))
    rows = rows.select_columns([image, label] if label else [image])
    for row in rows:
        stored = row[image]["bytes"]
        stored = Path(row[image]["path"]).read_bytes() if stored is None else stored
        sha.update(f"{len(stored)} {row[label] if label else ''}\n".encode())
        sha.update(stored)
    return sha.hexdigest()
