"""Tables of images that HF datasets reads: image folders, parquet, webdataset tars, the hub.

Files and splits are chosen here, with rules that an error can state, because some of the choices that
datasets makes by itself are surprising.
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
HASHED = 1 << 30  # bytes that a digest reads at most; larger sets are sampled in pieces
PIECE = 1 << 20  # bytes


def open_rows(
    path: str, split: str, subset: str | None, revision: str | None, key: str
) -> tuple[Any, str]:
    """Open a split as a datasets.Dataset.

    Args:
        path: a folder of images, parquet files or tars, a file, a glob, or a dataset's name on the hub.
        split: name of the split.
        subset: configuration of a dataset on the hub.
        revision: commit, branch or tag of a dataset on the hub.
        key: the key of the data, for errors.

    Returns:
        The dataset, and the digest of the files that the path names, "" for a name on the hub.

    Raises:
        UserError: for what cannot be found or read.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    where = f"{key}.path={path}"
    local = local_files(path, key)
    if local is not None and (subset or revision):
        raise UserError(
            f"{where} is a local path; remove {key}.subset and {key}.revision, which are for names on "
            "the hub"
        )
    try:
        if local is None:
            rows = datasets.load_dataset(path, subset, split=split, revision=revision)
            return rows, ""
        folder, files = local
        builder, digest = _builder(where, files), digest_files(folder, files)
        listed, source = _split_files(path, folder, files, split, builder, key)
        # The name ties the cache to the content. By itself datasets uses names and mtimes, and returns
        # the old rows for a file that was replaced with its time kept (rsync -t, tar).
        rows = datasets.load_dataset(
            builder, name=digest[:32], split="train", data_files={"train": source}
        )
        chosen = any(file.stem == "metadata" for file in files)  # a table that may omit files
        if builder == "imagefolder" and not chosen and len(rows) != len(listed):
            raise UserError(
                f"{where}: datasets reads {len(rows)} of {len(listed)} image files; rename the files "
                "and folders whose names start with __"
            )
        return rows, digest
    except ConnectionError as error:
        raise UserError(
            f"{where}: there is no such folder, file or glob, and the hub cannot be reached: {error}"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TarError, DatasetsError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        about_split = reason.startswith(("Unknown split", "Bad split"))
        prefix = f"{key}.split={split}: " if about_split else ""
        raise UserError(f"{prefix}{where} cannot be read: {reason}") from None


def _builder(where: str, files: list[Path]) -> str:
    """Return the name of the datasets builder for the files' suffixes."""
    kinds = {
        kind
        for kind, suffixes in SUFFIXES.items()
        for file in files
        if file.suffix.lower() in suffixes and file.stem != "metadata"
    }
    if len(kinds) != 1:
        held = " and ".join(sorted(kinds)) or "no files of these kinds"
        raise UserError(
            f"{where} has {held}; expected either image files, .parquet files or .tar files; choose one "
            "kind with a glob such as 'FOLDER/*.parquet'"
        )
    return kinds.pop()


def _split_files(
    path: str, folder: Path, files: list[Path], split: str, builder: str, key: str
) -> tuple[list[Path], str | list[str]]:
    """Choose the files of a split: those below the subfolder SPLIT, else those named SPLIT-*.

    A folder without either is one split, train. The same holds if train/ or train-* stands beside
    names that are not splits: then it is a class, or pictures, of trains. The names of images need a
    number after the split. Returns the files, and their names for datasets.
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
            f"{key}.split={split}: {key}.path={path} has no such split; expected a subfolder {split}/, "
            f"or files whose names start with {split}- or {split}."
        )
    chosen = inside or named or data
    whole = Path(path).expanduser().is_dir() and (inside or not named)
    if builder == "imagefolder" and whole:  # one pattern: a million names are slow
        return chosen, f"{glob.escape(str(below if inside else folder))}/**"
    return chosen, [str(file) for file in chosen]


def local_files(path: str, key: str) -> tuple[Path, list[Path]] | None:
    """List the files that a path names.

    A folder stands for all files below it, except names that start with a dot; a path with * ? or [ is
    a glob.

    Args:
        path: of a file or folder, or a glob.
        key: the key of the data, for errors.

    Returns:
        Their folder, and the files sorted by name; None if there is no such path and it may be a name
        on the hub, NAME or OWNER/NAME.

    Raises:
        UserError: if there is no such path, and it cannot be a name on the hub.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place.parent, [place]
    if place.is_dir():
        return place, _walk(place, key)
    fixed = list(itertools.takewhile(lambda part: not set(part) & set("*?["), place.parts))
    if len(fixed) < len(place.parts):
        root = Path(*fixed)
        files = sorted(f for f in root.glob(str(place.relative_to(root))) if f.is_file())
        if not files:
            raise UserError(f"{key}.path={path} matches no file; correct the pattern")
        return root, files
    suffixes = {".npy", ".npz", ".gz", ".zip"}.union(*SUFFIXES.values())
    hub = path.count("/") < 2 and path[0] not in "./~" and place.suffix.lower() not in suffixes
    if not hub:
        raise UserError(
            f"{key}.path={path} does not exist; expected a folder, a file, a glob, or a name on the hub"
        )
    return None


def _walk(place: Path, key: str) -> list[Path]:
    files = []
    for folder, below, names in os.walk(place):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in below:
            if (Path(folder) / name).is_symlink():
                raise UserError(
                    f"{key}.path={place}: {Path(folder, name).relative_to(place)} is a link to a "
                    "folder, which datasets would ignore; replace it with the folder itself"
                )
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    if not files:
        raise UserError(f"{key}.path={place} is an empty folder; expected files in it")
    return sorted(files)


def image_column(features: Any, asked: str | None, key: str) -> str:
    """Return the column of images: the one asked for, the only Image, or the only one of bytes."""
    import datasets

    def holds_bytes(feature: Any) -> bool:
        if isinstance(feature, dict):
            return set(feature) == {"bytes", "path"}
        return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")

    kinds = [lambda feature: isinstance(feature, datasets.Image), holds_bytes]
    return _column(features, asked, kinds, "image", key)


def label_column(features: Any, asked: str | None, key: str) -> str:
    """Return the column of labels: the one asked for, the only ClassLabel, or the only integers."""
    import datasets

    def integers(feature: Any) -> bool:
        return isinstance(feature, datasets.Value) and "int" in feature.dtype

    kinds = [lambda feature: isinstance(feature, datasets.ClassLabel), integers]
    return _column(features, asked, kinds, "label", key)


def _column(
    features: Any, asked: str | None, kinds: Sequence[Callable[[Any], bool]], name: str, key: str
) -> str:
    listed = ", ".join(f"{column} ({_type(feature)})" for column, feature in features.items())
    fitting: list[str] = []
    for kind in kinds:
        fitting = fitting or [column for column, feature in features.items() if kind(feature)]
    if asked is not None:
        if asked in features and any(kind(features[asked]) for kind in kinds):
            return asked
        reason = f"is not a column of {name}s" if asked in features else "does not exist"
        raise UserError(f"{key}.{name}_column={asked} {reason}; the columns are {listed}")
    if len(fitting) != 1:
        reason = "several columns can be the" if fitting else "no column can be the"
        prefix = f"{key}.labels=true: " if name == "label" else f"{key}: "
        raise UserError(
            f"{prefix}{reason} {name}s; set {key}.{name}_column; the columns are {listed}"
        )
    return fitting[0]


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """Hash files: their relative names, sizes and contents.

    Of files with more than 1 GiB in total only 1 GiB is read, in pieces of 1 MiB evenly spaced over
    each file. Contents of more than 1,024 such files are not read.

    Args:
        folder: to which the names are relative.
        files: in their order.

    Returns:
        Hexadecimal sha256.
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
    """Hash the stored images and labels of rows from the hub.

    Above 1 GiB the names and sizes of the cached Arrow files are hashed instead; the names contain the
    hub's commit.

    Returns:
        Hexadecimal sha256.
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
