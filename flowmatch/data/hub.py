"""Tables of images that HF datasets reads: parquet, webdataset tars, the hub; and their columns."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tarfile import TarError
from typing import TYPE_CHECKING, Any

import numpy as np

from flowmatch.config import UserError
from flowmatch.data import whole
from flowmatch.data.files import HASHED, choose_split, kind_of, local_files
from flowmatch.data.folders import picture_rows
from flowmatch.runs.process import say

if TYPE_CHECKING:
    from flowmatch.data.config import DataConfig, PromptsConfig

LABELS = ("label", "labels", "class", "target", "fine_label", "cls")  # names that are guessed
WORDS = ("string", "large_string")  # kinds of a column of words
CHECKED = "flowmatch.json"  # beside the cache of datasets: what the check of the files found


def open_rows(
    path: str,
    config: "DataConfig | PromptsConfig",
    key: str,
    image: str | None = None,
    labels: bool = False,
) -> tuple[Any, str, list[str]]:
    """Open a split as a datasets.Dataset.

    Args:
        path: a folder of images, parquet files or tars, a file, a glob, or a dataset's name on the hub.
        config: of the data, with their split, and subset and revision on the hub.
        key: the key of the data, for errors.
        image: the column of images, if it is chosen.
        labels: whether labels are asked for.

    Returns:
        The dataset; the digest of the files that the path names, "" for a name on the hub; and what
        the plan says of files that are left out.

    Raises:
        UserError: for what cannot be found or read.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    where = f"{key}.path={path}"
    found = local_files(path, key)
    if found is not None and (config.subset or config.revision):
        raise UserError(
            f"{where} is a local path; remove {key}.subset and {key}.revision, which are for names on "
            "the hub"
        )
    try:
        if found is not None:
            kind, digest = kind_of(found, where), found.digest()
            split = choose_split(found, config.split, kind, key)
            if kind == "image":
                rows, notes = picture_rows(split, labels, where, key)
            else:
                rows, notes = _tables(kind, digest, split.files, image, where, key)
            return rows, digest, split.notes + notes
        rows = datasets.load_dataset(
            path, config.subset, split=config.split, revision=config.revision
        )
        return rows, "", []
    except ConnectionError as error:
        raise UserError(
            f"{where}: there is no such folder, file or glob, and the hub cannot be reached: {error}"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TarError, DatasetsError) as error:
        raise _told(error, config.split, where, key) from None


def _told(error: Exception, split: str, where: str, key: str) -> UserError:
    """Turn an error of datasets into ours: of its cache, of the split, or of the data."""
    import datasets

    cause = error if isinstance(error, OSError) else error.__cause__
    cache = os.path.abspath(datasets.config.HF_DATASETS_CACHE)
    if isinstance(cause, OSError) and str(cause.filename or "").startswith(cache):
        return UserError(
            f"{cause.filename}: {cause.strerror}: datasets keeps tables there; set the variable "
            "HF_DATASETS_CACHE to a folder that can be written, or HF_HOME"
        )
    reason = " ".join(f"{error} {error.__cause__ or ''}".split())
    if "don't share the same prefix" in reason:
        reason = (
            "the first samples of a tar differ in their suffixes; give all of them the same files"
        )
    about_split = reason.startswith(("Unknown split", "Bad split"))
    prefix = f"{key}.split={split}: " if about_split else ""
    return UserError(f"{prefix}{where} cannot be read: {reason}")


def _tables(
    kind: str, digest: str, files: list[Path], image: str | None, where: str, key: str
) -> tuple[Any, list[str]]:
    """Read parquet files or tars with datasets, which keeps the rows in its cache.

    The files are checked where the cache does not say that they were.
    """
    import datasets

    rows_of: dict[Path, int] = {}
    if kind == "parquet":
        rows_of = whole.count_rows(files, where)
        files = [file for file in files if rows_of[file]]  # datasets stops at an empty one
        if not files:
            raise UserError(f"{where} holds no rows")
    names = [os.path.abspath(file) for file in files]
    for name in names:
        if "::" in name or os.path.expandvars(name) != name:
            raise UserError(
                f"{where}: {name!r}: datasets takes `::` and `$NAME` in a name for something else; "
                "rename the file or folder"
            )
    # The name ties the cache to the content. By itself datasets uses names and mtimes, and returns
    # the old rows for a file that was replaced with its time kept (rsync -t, tar).
    builder = datasets.load_dataset_builder(
        kind, name=digest[:32], data_files={"train": [glob.escape(name) for name in names]}
    )
    checked = Path(builder.cache_dir) / CHECKED
    with suppress(OSError, ValueError):
        told = json.loads(checked.read_text())
        return builder.as_dataset(split="train"), list(told["notes"])
    count, notes = sum(rows_of.values()), list[str]()
    if kind == "webdataset":
        count, notes = whole.check_tars(files, image, where)
    if not os.path.isdir(builder.cache_dir):
        number = f"{len(files)} file{'s' * (len(files) > 1)}"
        say(f"{key}: datasets copies {number} into its cache, {builder.cache_dir}")
    with _no_bars():
        builder.download_and_prepare()
    rows = builder.as_dataset(split="train")
    if len(rows) != count:
        raise UserError(f"{where}: datasets reads {len(rows)} of {count} samples")
    with suppress(OSError):  # a cache that others keep
        checked.write_text(json.dumps({"notes": notes}))
    return rows, notes


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the bars of datasets, which call the reading of local files a download."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def image_column(features: Any, asked: str | None, key: str) -> str:
    """Return the column of images: the one asked for, the only Image, or the only one of bytes."""
    import datasets

    def holds_bytes(feature: Any) -> bool:
        if isinstance(feature, dict):
            return set(feature) == {"bytes", "path"}
        return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    stored = [name for name, feature in features.items() if holds_bytes(feature)]
    if asked is not None:
        if asked in [*images, *stored]:
            return asked
        reason = "is not a column of images" if asked in features else "does not exist"
        raise UserError(f"{key}.image_column={asked} {reason}; {_columns(features)}")
    fitting = images or stored
    if len(fitting) != 1:
        reason = "several columns can be" if fitting else "no column can be"
        way = f"set {key}.image_column; {_columns(features)}"
        raise UserError(f"{key}: {reason} the images; {way}")
    return fitting[0]


def label_column(features: Any, asked: str | None, key: str) -> str:
    """Return the column of labels: the one asked for, the one of a usual name, or the only ClassLabel.

    No other column of integers is taken: it may be a number of the row.
    """
    import datasets

    classes = [n for n, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    chosen = asked
    if asked is None:
        fitting = [name for name in features if name.lower() in LABELS] or classes
        if len(fitting) != 1:
            reason = f"{' and '.join(fitting)} can both be" if fitting else "no column is called as"
            raise UserError(
                f"{key}.labels=true: {reason} the labels ({', '.join(LABELS)}); set "
                f"{key}.label_column; {_columns(features)}"
            )
        chosen = fitting[0]
    where = f"{key}.label_column={chosen}"
    if chosen not in features:
        raise UserError(f"{where} does not exist; {_columns(features)}")
    kind = _type(features[chosen])
    if chosen in classes or (isinstance(features[chosen], datasets.Value) and "int" in kind):
        return str(chosen)
    if kind in WORDS:
        return str(chosen)
    raise UserError(f"{where} is not a column of labels, but of {kind}; {_columns(features)}")


def _columns(features: Any) -> str:
    listed = ", ".join(f"{column} ({_type(feature)})" for column, feature in features.items())
    return f"the columns are {listed}"


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def label_values(rows: Any, column: str, key: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Read a column of labels.

    Args:
        rows: a datasets.Dataset.
        column: name of the column.
        key: the key of the data, for errors.

    Returns:
        int64 [rows], and the names of the classes: those of a ClassLabel, or the sorted distinct words
        of a column of words; None for whole numbers.

    Raises:
        UserError: naming the first row without a label, and for words that are all different.
    """
    import datasets

    where, feature = f"{key}.label_column={column}", rows.features[column]
    stored = rows.select_columns([column]).with_format("arrow")[:][column]
    if stored.null_count:
        raise UserError(
            f"{where}: {stored.null_count} of {len(rows)} rows have no label, first "
            f"row {stored.to_pylist().index(None)}; give every row one, or leave these rows out"
        )
    if isinstance(feature, datasets.ClassLabel):
        return stored.to_numpy(), tuple(feature.names)
    if _type(feature) not in WORDS:
        return stored.to_numpy(), None
    names, values = np.unique(stored.to_pylist(), return_inverse=True)
    if len(names) == len(rows) > 1:
        raise UserError(
            f"{where}: {len(rows)} rows have {len(rows)} different words; these are no classes; name "
            "another column, or leave labels out"
        )
    if "" in names:
        raise UserError(f"{where}: row {stored.to_pylist().index('')} is empty; give it a class")
    return values.astype(np.int64), tuple(map(str, names))


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
