"""The files that a path names: which there are, which a split reads, and which are left out.

Files and splits are chosen here, with rules that an error can state. What no rule chooses is counted,
for the plan to say.
"""

import hashlib
import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flowmatch.config import UserError

SUFFIXES = {
    "image": [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"],
    "parquet": [".parquet"],
    "webdataset": [".tar"],
}
ARRAYS = {".npy", ".npz", ".gz", ".zip"}
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
HASHED = 1 << 30  # bytes that a digest reads at most; larger sets are sampled in pieces
PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Files:
    """The files that a path names.

    Args:
        path: as it is given.
        folder: to which the names of the files are relative.
        files: sorted by name, without those whose names start with a dot.
        hidden: number of files and folders whose names start with a dot.
    """

    path: str
    folder: Path
    files: list[Path]
    hidden: int = 0

    @property
    def is_folder(self) -> bool:
        """Whether the path is that of a folder."""
        return self.folder == Path(self.path)

    def digest(self) -> str:
        """Hash the files, as `digest_files` does."""
        return digest_files(self.folder, self.files)


def local_files(path: str, key: str) -> Files | None:
    """List the files that a path names.

    A folder stands for all files below it, except names that start with a dot. A path with * ? or [ is
    a glob, and {a,b} and {000..009} stand for several paths.

    Args:
        path: of a file or folder, or a glob.
        key: the key of the data, for errors.

    Returns:
        The files; None if there is no such path and it may be a name on the hub, NAME or OWNER/NAME.

    Raises:
        UserError: if there is no such path, and it cannot be a name on the hub.
    """
    where = f"{key}.path={path}"
    if "://" in path:
        raise UserError(f"{where}: {_not_by_url(path)}")
    place = Path(path)
    try:
        if place.is_file():
            found = Files(path, place.parent, [place])
        elif place.is_dir():
            found = _walk(path, where)
        elif listed := _glob(place, where):
            found = Files(path, *listed)
        elif _may_be_on_the_hub(path):
            return None
        else:
            raise UserError(
                f"{where} does not exist; expected a folder, a file, a glob, or a name on the hub"
            )
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.filename}: {error.strerror}") from None
    for file in found.files:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: the name {str(file)!r} is not UTF-8; rename the file"
            ) from None
    return found


def _not_by_url(url: str) -> str:
    protocol, _, rest = url.partition("://")
    if protocol in ("file", "local"):
        return f"a URL of local files; use the path {rest}"
    if protocol == "hf":
        name = rest.removeprefix("datasets/").partition("@")[0]
        return f"only pairs go by URL; use the name on the hub, {'/'.join(name.split('/')[:2])}"
    return "only pairs go by URL; copy the data into a local folder, and use its path"


def _may_be_on_the_hub(path: str) -> bool:
    known = ARRAYS.union(*SUFFIXES.values())
    return path.count("/") < 2 and path[0] not in "./~" and Path(path).suffix.lower() not in known


def _glob(place: Path, where: str) -> tuple[Path, list[Path]] | None:
    """Find the files of a pattern: their folder, and the files; None where it is no pattern."""
    from braceexpand import braceexpand

    try:
        patterns = list(braceexpand(str(place), escape=False))
    except ValueError:  # unbalanced
        patterns = [str(place)]
    special = set("*?[") | set("{" if len(patterns) > 1 else "")
    fixed = list(itertools.takewhile(lambda part: not set(part) & special, place.parts))
    if len(fixed) == len(place.parts):
        return None
    root, files = Path(*fixed), set[Path]()
    for pattern in patterns:
        found = [f for f in root.glob(str(Path(pattern).relative_to(root))) if f.is_file()]
        if not found:
            which = f": {pattern}" if len(patterns) > 1 else ""
            raise UserError(f"{where}{which} matches no file; correct the pattern")
        files.update(found)
    return root, sorted(files)


def _walk(path: str, where: str) -> Files:
    def fail(error: OSError) -> None:
        raise error  # os.walk leaves out what it cannot list

    place, files, hidden = Path(path), list[Path](), 0
    for folder, below, names in os.walk(place, onerror=fail):
        hidden += sum(name.startswith(".") for name in [*below, *names])
        below[:] = [name for name in below if not name.startswith(".")]
        for name in below:
            if (Path(folder) / name).is_symlink():
                raise UserError(
                    f"{where}: {Path(folder, name).relative_to(place)} is a link to a folder, and "
                    "links are not followed; replace it with the folder itself"
                )
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    if not files:
        raise UserError(f"{where} is an empty folder; expected files in it")
    return Files(path, place, sorted(files), hidden)


def kind_of(found: Files, where: str) -> str:
    """Return what kind of files there are, a key of `SUFFIXES`.

    Raises:
        UserError: if there are none of these kinds, or several.
    """
    suffixes = Counter(file.suffix.lower() for file in found.files if file.name not in METADATA)
    counts = {kind: sum(suffixes[one] for one in known) for kind, known in SUFFIXES.items()}
    counts = {kind: number for kind, number in counts.items() if number}
    if len(counts) == 1:
        return next(iter(counts))
    names = {"image": "image", "parquet": ".parquet", "webdataset": ".tar"}
    if counts:
        held = " and ".join(
            f"{number} {names[kind]} {_files(number)}" for kind, number in counts.items()
        )
        way = "choose one kind with a glob such as 'FOLDER/*.parquet'"
    else:
        number = len(found.files)
        held = f"{number} {_files(number)}: {_suffixes(found.files)}"
        way = f"images are {' '.join(SUFFIXES['image'])}; convert or unpack the files"
    raise UserError(f"{where} has {held}; expected image, .parquet or .tar files; {way}")


@dataclass(frozen=True)
class Split:
    """The files of a split.

    Args:
        files: in the order in which they are read.
        top: the folder below which folders are classes.
        metadata: tables of a folder of pictures.
        notes: what is left out, for the plan.
    """

    files: list[Path]
    top: Path
    metadata: list[Path]
    notes: list[str]


def choose_split(found: Files, split: str, kind: str, key: str) -> Split:
    """Choose the files of a split: those below the subfolder SPLIT, else those named SPLIT-*.

    A folder without either is one split, train. The same holds if train/ or train-* stands beside
    names that are not splits: then it is a class, or pictures, of trains. The names of images need a
    number after the split.
    """
    folder, below = found.folder, found.folder / split
    data = [file for file in found.files if file.suffix.lower() in SUFFIXES[kind]]
    inside = [file for file in data if below in file.parents]
    number = r"\d" if kind == "image" else ""
    named = [file for file in data if re.match(rf"{re.escape(split)}[-_.]{number}", file.name)]
    if split == "train":
        tops = {file.relative_to(folder).parts[0] for file in data if file.parent != folder}
        inside = inside if tops <= SPLITS else []
        others = re.compile(rf"({'|'.join(SPLITS)})[-_.]{number}")
        named = named if all(others.match(file.name) for file in data) else []
    if not inside and not named and split != "train":
        raise UserError(
            f"{key}.split={split}: {key}.path={found.path} has no such split; expected a subfolder "
            f"{split}/, or files whose names start with {split}- or {split}."
        )
    chosen, top, metadata = inside or named or data, below if inside else folder, list[Path]()
    if kind == "image" and found.is_folder and (inside or not named):
        chosen = sorted(chosen, key=str)  # the order in which datasets listed them
        metadata = [f for f in found.files if f.name in METADATA and top in f.parents]
    read = {*chosen, *metadata}
    if inside:  # folders named like splits are other splits
        read |= {f for f in found.files if f.relative_to(folder).parts[0] in SPLITS - {split}}
    elif named:  # other names are other splits
        read.update(data)
    rest = [file for file in found.files if file not in read]
    return Split(chosen, top, metadata, left_out(rest, found.hidden))


def left_out(files: list[Path], hidden: int = 0) -> list[str]:
    """Say how many files are left out, and which: one line, or none."""
    parts = [_suffixes(files)] if files else []
    parts += [f"{hidden} hidden"] if hidden else []
    number = len(files) + hidden
    return [f"{number} file{'s' * (number > 1)} left out: {', '.join(parts)}"] if parts else []


def _files(number: int) -> str:
    return "file" if number == 1 else "files"


def _suffixes(files: list[Path]) -> str:
    counts = Counter(file.suffix.lower() or "without a suffix" for file in files)
    return ", ".join(f"{n} {name}" if len(counts) > 1 else name for name, n in counts.most_common())


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """Hash files: their relative names, sizes and contents.

    Of files with more than 1 GiB in total only 1 GiB is read, in pieces of 1 MiB evenly spaced over
    each file. Contents of more than 1,024 such files are not read.

    Args:
        folder: to which the names are relative.
        files: in their order.

    Returns:
        Hexadecimal sha256.

    Raises:
        UserError: for a name that is not that of a file, such as a named pipe.
    """
    files, sizes = list(files), []
    for file in files:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{file} is neither a file nor a folder; remove it")
        sizes.append(found.st_size)
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
