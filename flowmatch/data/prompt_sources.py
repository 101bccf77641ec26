"""The places that prompts are read from: text, JSON lines, CSV, tars, and what datasets reads."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmatch.config import NotReady, UserError, require
from flowmatch.data import hub, whole
from flowmatch.data.config import PromptsConfig
from flowmatch.data.files import local_files

GUESSED = ("prompt", "caption", "text", "txt")  # columns that hold the prompts where none is named
SAVED = ("dataset_info.json", "dataset_dict.json")  # a folder that datasets saved has one of them


@dataclass(frozen=True)
class Source:
    """Where prompts come from: a name and a word for a row, for errors, and rows (text, weight)."""

    name: str
    unit: str
    rows: Iterable[tuple[Any, Any]]


def open_sources(path: str, config: PromptsConfig, where: str, key: str) -> Iterator[Source]:
    """Find the files or the dataset that a path names. where: the key and path, for errors."""
    place = Path(path)
    known, suffix = {*READERS, ".parquet"}, place.suffix.lower()
    if suffix in known and not place.exists() and not set(path) & set("*?["):
        raise NotReady(f"{where} does not exist; expected a list of prompts", [place])
    local = local_files(path, key)
    saved = place.is_dir() and any((place / name).is_file() for name in SAVED)
    files = [] if local is None else [f for f in local.files if f.suffix.lower() in known]
    suffixes = {file.suffix.lower().replace(".jsonl", ".json") for file in files}
    if local is None or saved or suffixes == {".parquet"}:
        yield Source(where, "row", _pick(_rows(place, config, saved, where, key), config, where))
        return
    if len(suffixes) != 1:
        raise UserError(
            f"{where} has {' and '.join(sorted(suffixes)) or 'no lists of prompts'}; expected files of "
            f"one kind of {', '.join(sorted(known))}; choose them with a glob such as 'FOLDER/*.txt'"
        )
    if config.subset or config.revision or config.split != "train":
        raise UserError(
            f"{where} is no dataset; remove {key}.split, {key}.subset and {key}.revision"
        )
    if suffixes == {".txt"} and (config.column or config.weight_column):
        raise UserError(
            f"{where} has one prompt a line; remove {key}.column and {key}.weight_column"
        )
    for file in files:
        name = where if len(files) == 1 else f"{where}: {file.relative_to(local.folder)}"
        unit = "line" if suffixes <= {".txt", ".json"} else "row"
        yield Source(name, unit, _pick(READERS[file.suffix.lower()](file), config, name))


def _pick(rows: Iterable[Any], config: PromptsConfig, where: str) -> Iterator[tuple[Any, Any]]:
    """Take prompt and weight out of rows that are mappings; another row is the prompt itself."""
    column, weight = "", config.weight_column
    for row in rows:
        if not isinstance(row, dict):
            yield row, None if weight else 1.0
            continue
        column = column or _column(row, config, where)
        yield row.get(column), row.get(weight) if weight else 1.0


def _column(names: Iterable[str], config: PromptsConfig, where: str) -> str:
    """Choose the column of prompts, and check that there is the one of weights."""
    names = list(names)
    listed = f"the columns are {', '.join(map(str, names))}"
    for field in ("column", "weight_column"):
        if (asked := getattr(config, field)) is not None and asked not in names:
            raise UserError(f"{where} has no {field} {asked}; {listed}")
    fitting = [name for name in GUESSED if name in names]
    if config.column is None and len(fitting) != 1:
        reason = "several columns can" if fitting else "no column can"
        raise UserError(f"{where}: {reason} be the prompts; set column; {listed}")
    return config.column or fitting[0]


def _rows(
    place: Path, config: PromptsConfig, saved: bool, where: str, key: str
) -> Iterator[dict[str, Any]]:
    """Read parquet files, a folder that datasets saved, or a name on the hub."""
    require("datasets", "data", where)
    import datasets

    if saved and not (config.subset or config.revision):
        rows = datasets.load_from_disk(str(place))
        splits = rows if isinstance(rows, datasets.DatasetDict) else {"train": rows}
        if config.split not in splits:
            raise UserError(
                f"{key}.split={config.split}: {where} has the splits {', '.join(splits)}"
            )
        rows = splits[config.split]
    else:
        rows, _, _ = hub.open_rows(str(place), config, key)
    names = [_column(rows.column_names, config, where), config.weight_column]
    for part in rows.select_columns([name for name in names if name]).iter(1000):
        yield from (dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True))


def _open(file: Path) -> io.TextIOWrapper:
    """Open a text file; bytes that are not UTF-8 become surrogates, which are refused row by row."""
    return open(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _lines(file: Path) -> Iterator[str]:
    with _open(file) as stream:
        for line in stream:
            yield line.removesuffix("\n").removesuffix("\r")


def _parse(text: str) -> Any:
    """Parse JSON; return a ValueError where it is none, and an empty line as it is."""
    try:
        return json.loads(text) if text.strip() else text
    except (ValueError, RecursionError) as error:
        return ValueError(f"is not JSON, an object or a string a line: {error}")


def _json(file: Path) -> Iterator[Any]:
    """Read JSON lines, each an object or a string."""
    return map(_parse, _lines(file))


def _csv(file: Path) -> Iterator[Any]:
    with _open(file) as stream:
        reader = csv.reader(stream, strict=True)
        names = next(reader, [])
        for row in reader:
            if len(row) == len(names):
                yield dict(zip(names, row, strict=True))
            else:
                yield ValueError(
                    f"has {len(row)} fields, but the header {len(names)}; quote prompts with commas"
                )


def _tar(file: Path) -> Iterator[Any]:
    """Read the .txt and .json members of a webdataset tar; the others are passed over."""
    import webdataset

    for _ in whole.members(file, "prompts"):
        pass

    def wanted(name: str) -> bool:
        return name.lower().endswith((".txt", ".json"))

    shards = webdataset.SimpleShardList([str(file.absolute())])
    read = webdataset.tarfile_to_samples(select_files=wanted)
    for sample in webdataset.DataPipeline(shards, read):  # whole, on any rank
        row, bad = dict[str, Any](), None
        for name, content in sample.items():
            if name.startswith("__"):
                continue
            text = content.decode("utf-8-sig", "surrogateescape")
            if name.endswith("json"):
                value = _parse(text)
                bad = value if isinstance(value, ValueError) else bad
                row |= value if isinstance(value, dict) else {"prompt": value}
            else:
                row[name] = text.removesuffix("\n").removesuffix("\r")
        yield bad or row


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".txt": _lines,
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".tar": _tar,
}
