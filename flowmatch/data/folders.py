"""Folders of pictures as tables: a row for each picture, or for each row of their metadata files.

A picture is stored as its path, so that nothing is copied, and no name means anything but itself.
"""

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmatch.config import UserError
from flowmatch.data.files import Split

if TYPE_CHECKING:
    import pyarrow


def picture_rows(split: Split, labels: bool, where: str, key: str) -> tuple[Any, list[str]]:
    """Make a table of pictures.

    Args:
        split: the pictures, and their metadata files if there are any.
        labels: whether labels are asked for.
        where: the key of the path and its value, for errors.
        key: the key of the data, for errors.

    Returns:
        A datasets.Dataset, with the columns image and label or those of the metadata, and what the
        plan says of it.

    Raises:
        UserError: for labels that the folders do not tell, and for metadata that do not fit.
    """
    import datasets

    if split.metadata:
        return _by_metadata(split, where)
    columns: dict[str, Any] = {"image": [os.path.abspath(file) for file in split.files]}
    features: dict[str, Any] = {"image": datasets.Value("string")}
    if labels:
        names = _folders_as_classes(split, f"{key}.labels=true: {where}")
        columns["label"] = names
        features["label"] = datasets.ClassLabel(names=sorted(set(names)))
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return rows.cast_column("image", datasets.Image()), []


def _folders_as_classes(split: Split, where: str) -> list[str]:
    """Name the class of each picture: the folder below the top, where deeper ones agree with it."""
    top = Path(os.path.commonpath([file.parent for file in split.files]))
    parents = [file.parent.relative_to(top).parts for file in split.files]
    if not any(parents):
        raise UserError(
            f"{where}: all pictures lie in one folder; expected a folder for each class"
        )
    if not all(parents):
        beside = [file for file, parts in zip(split.files, parents, strict=True) if not parts]
        raise UserError(
            f"{where}: {len(beside)} pictures lie beside the folders of the classes, first "
            f"{beside[0]}; move them into a class, or out of the folder"
        )
    first, last = [parts[0] for parts in parents], [parts[-1] for parts in parents]
    if _numbered(first) != _numbered(last):
        told = [", ".join(sorted(set(names))[:4]) for names in (first, last)]
        raise UserError(
            f"{where}: the folders are deeper than one, and the classes may be the first folders "
            f"({told[0]}) or the last ones ({told[1]}); keep one level of folders, that of the classes"
        )
    if len(set(last)) == len(last):
        raise UserError(
            f"{where}: each of {len(last)} pictures lies in a folder of its own, so that these are not "
            "classes; put the pictures of a class into one folder"
        )
    return last


def _numbered(names: list[str]) -> list[int]:
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    return [number[name] for name in names]


def _by_metadata(split: Split, where: str) -> tuple[Any, list[str]]:
    """Make a table of the rows of metadata files, whose column file_name names the pictures."""
    import datasets
    import pyarrow

    tables, paths = [], list[str]()
    for file in sorted(split.metadata, key=str):
        table = _read_table(file, where)
        column = _name_column(table, file, where)
        names = table[column].to_pylist()
        paths += [_picture(file, row, name, split.top, where) for row, name in enumerate(names)]
        image = column.removesuffix("file_name").removesuffix("_") or "image"
        if image in table.column_names:  # the files that are named take its place
            table = table.drop_columns([image])
        tables.append(
            table.rename_columns([image if c == column else c for c in table.column_names])
        )
    try:
        table = pyarrow.concat_tables(tables)
    except pyarrow.ArrowInvalid:
        raise UserError(
            f"{where}: the metadata files differ in their columns; give all the same columns"
        ) from None
    if not paths:
        raise UserError(f"{where}: the metadata files hold no rows")
    at = table.column_names.index(image)
    rows = datasets.Dataset(table.set_column(at, image, [pyarrow.array(paths)]))
    counts = Counter(paths)
    unnamed = sum(os.path.abspath(file) not in counts for file in split.files)
    notes = []
    if unnamed:
        told = f"{unnamed} of {len(split.files)} pictures left out"
        notes.append(f"{told}: {split.metadata[0].name} does not name them")
    if len(counts) < len(paths):
        again = len(paths) - len(counts)
        notes.append(f"{again} rows of the metadata name a picture that another row names")
    return rows.cast_column(image, datasets.Image()), notes


def _read_table(file: Path, where: str) -> "pyarrow.Table":
    import pandas
    import pyarrow
    import pyarrow.json
    import pyarrow.parquet

    try:
        if file.suffix == ".csv":
            return pyarrow.Table.from_pandas(pandas.read_csv(file), preserve_index=False)
        if file.suffix == ".jsonl":
            return pyarrow.json.read_json(file)
        return pyarrow.parquet.read_table(file)
    except (OSError, ValueError) as error:  # ValueError: of pandas and of pyarrow
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: {file} cannot be read: {reason}") from None


def _name_column(table: "pyarrow.Table", file: Path, where: str) -> str:
    fitting = [c for c in table.column_names if c == "file_name" or c.endswith("_file_name")]
    if len(fitting) != 1:
        raise UserError(
            f"{where}: {file} has the columns {', '.join(table.column_names)}; expected one called "
            "file_name"
        )
    return fitting[0]


def _picture(file: Path, row: int, name: Any, top: Path, where: str) -> str:
    """Return the path of the picture that a row of a metadata file names."""
    path = os.path.abspath(file.parent / name) if isinstance(name, str) else ""
    inside = path.startswith(os.path.join(os.path.abspath(top), ""))
    if not inside or not os.path.isfile(path):
        raise UserError(
            f"{where}: row {row} of {file} names {name!r}; expected a picture in that folder"
        )
    return path
