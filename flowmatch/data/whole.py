"""Whether tars and parquet files are whole, and what the samples of tars consist of.

Readers take a damaged header, or a missing end, for the end of a tar: what comes after it is left out
without a word. Here the headers of all members are read, and nothing else.
"""

import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from flowmatch.config import UserError

SAMPLE = re.compile(
    r"((?:.*/|)[^.]+)[.]([^/]*)"
)  # webdataset's: key of a sample, suffixes of a file
END = 1024  # bytes: two blocks of zeros


def check_tars(files: list[Path], image: str | None, where: str) -> tuple[int, list[str]]:
    """Check that tars are whole, and that all their samples hold the same kind of picture.

    Args:
        files: the tars.
        image: suffixes of the pictures, if they are chosen; otherwise all that Pillow knows.
        where: the key of the path and its value, for errors.

    Returns:
        The number of samples, and what the plan says of them.

    Raises:
        UserError: naming a tar that is not whole, or samples that differ.
    """
    from PIL import Image

    Image.init()
    known = Image.registered_extensions().items()
    pictures = {suffix[1:] for suffix, format_name in known if format_name in Image.OPEN}

    def is_picture(suffixes: str) -> bool:
        return suffixes == image if image else suffixes.rpartition(".")[2].lower() in pictures

    counts, first = Counter[tuple[str, ...]](), dict[tuple[str, ...], str]()
    skipped: list[str] = []
    for file in files:
        for key, parts in groupby(_parts(file, where, skipped), lambda part: part[0]):
            kind = tuple(sorted(suffixes for _, suffixes in parts if is_picture(suffixes)))
            counts[kind] += 1
            first.setdefault(kind, f"{key} of {file.name}")
    if not counts:
        raise UserError(f"{where}: the tars hold no files with a suffix")
    if len(counts) > 1:
        kinds = [
            f"{number} with {', '.join(kind) or 'no picture'} (first: {first[kind]})"
            for kind, number in counts.most_common(4)
        ]
        raise UserError(
            f"{where}: the samples of the tars differ: {'; '.join(kinds)}; give all pictures one "
            "suffix, and store the files of a sample one after the other"
        )
    if not skipped:
        return counts.total(), []
    told = f"{len(skipped)} member{'s' * (len(skipped) > 1)} of the tars left out"
    return counts.total(), [f"{told}: hidden, without a suffix, or links; first {skipped[0]!r}"]


def _parts(file: Path, where: str, skipped: list[str]) -> Iterator[tuple[str, str]]:
    """Split the names in a tar into key and suffixes; list the names that readers pass over."""
    for member in members(file, where):
        matched = SAMPLE.fullmatch(member.name)
        hidden = member.name.rpartition("/")[2].startswith((".", "__"))
        if member.isdir():
            continue
        if matched is None or hidden or not member.isreg():
            skipped.append(member.name)
        else:
            yield matched[1], matched[2]


def members(file: Path, where: str) -> Iterator[tarfile.TarInfo]:
    """Read the headers of a tar; raises UserError at its end if it is not whole."""
    try:
        with tarfile.open(file) as tar:
            while (member := tar.next()) is not None:
                yield member
                tar.members.clear()  # type: ignore[attr-defined]  # a million are a gigabyte
            _check_end(tar)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        reason = str(error) or type(error).__name__
        reason = "it begins like no tar" if "could not be opened" in reason else reason
        raise UserError(f"{where}: {file} is not a whole tar: {reason}; write it again") from None


def _check_end(tar: tarfile.TarFile) -> None:
    """Check that zeros, and nothing else, follow the last member."""
    stream = tar.fileobj
    assert stream is not None
    stream.seek(tar.offset)
    zeros = 0
    while block := stream.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                f"from byte {tar.offset:,} on it is damaged, or a second tar was appended"
            )
        zeros += len(block)
    if zeros < END:
        raise tarfile.ReadError("it is cut off: its end, two blocks of zeros, is missing")


def count_rows(files: list[Path], where: str) -> dict[Path, int]:
    """Read the footers of parquet files: the number of rows of each.

    Raises:
        UserError: naming a file that is not whole.
    """
    import pyarrow.parquet

    rows = {}
    for file in files:
        try:
            rows[file] = pyarrow.parquet.read_metadata(file).num_rows
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: {file} is not a whole parquet file: {reason}") from None
    return rows
