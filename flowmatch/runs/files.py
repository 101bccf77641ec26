"""Files in a local folder that appear whole or not at all, also after a power cut."""

import hashlib
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flowmatch.config import UserError

BOOT = Path("/proc/sys/kernel/random/boot_id")
TEMPORARY = re.compile(
    r"\.tmp\.[^/]+\.\d+$"
)  # ending of the names that `write_atomic` builds under
HOST_SPACE = 0xEFFFFFFC  # inode of Linux's initial PID namespace


def worker() -> str:
    """Return HOST.PID, which identifies this process among all that may share a folder.

    HOST ends with the id of the machine's boot: machines may share a host name. In a container the
    number of its PID namespace follows: a PID of one container means nothing in another.
    """
    host = socket.gethostname()
    with suppress(OSError):  # not Linux
        host = f"{host}-{BOOT.read_text()[:8]}"
        if (namespace := os.stat("/proc/self/ns/pid").st_ino) != HOST_SPACE:
            host = f"{host}-{namespace}"
    return f"{host}.{os.getpid()}"


def sync(path: str | os.PathLike[str]) -> None:
    """Make the content of a file, or the renames inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path: Path) -> BinaryIO:
    """Open a new file for writing, in the place of one of that name; never follow a link.

    In a folder that others may write to, another user's link would lead us to overwrite a file.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def own_folder(folder: Path, way: str) -> None:
    """Make a folder that nobody else may write to; raise UserError if another user has made it.

    Args:
        folder: The folder; one of ours that others may enter is closed to them.
        way: How to go on where it is another user's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise UserError(f"{folder} is another user's, or no folder; {way}")
    if facts.st_mode & 0o077:
        folder.chmod(0o700)


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file so that a reader sees all of it or nothing, also after a power cut."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp.{worker()}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with create(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def commit(path: Path, content: bytes) -> None:
    """Write a file of a set that is not sealed yet, then its hash beside it, in `.meta`."""
    write_atomic(path, content)
    beside = _hash_of(path)
    beside.parent.mkdir(exist_ok=True)
    write_atomic(beside, hashlib.sha256(content).hexdigest() + "\n")


def committed(path: Path) -> bool:
    """Return whether a file of a set is there, and is what `commit` has written."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return found == _hash_of(path).read_text().strip()
    except (FileNotFoundError, ValueError):
        return False


def _hash_of(path: Path) -> Path:
    return path.parent / ".meta" / f"{path.name}.sha256"


def allow_readers(*files: str | os.PathLike[str]) -> None:
    """Give files the mode of any new file: safetensors writes 0600, which nobody else can read."""
    try:
        status = Path("/proc/self/status").read_text()
        umask = int(status.partition("Umask:")[2].split()[0], 8)
    except OSError:  # not Linux: it can be read by changing it alone
        umask = os.umask(0o022)
        os.umask(umask)
    for file in files:
        os.chmod(file, 0o666 & ~umask)


class Scratch:
    """The folder `.scratch` of a run folder, for the holder of its lock.

    What is built there appears whole by a rename; what is removed is renamed into it first.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / ".scratch"

    def sweep(self) -> None:
        """Remove what killed processes have left, here and as temporary files in the run folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        for path in self.folder.glob("*.tmp.*"):
            if TEMPORARY.search(path.name):
                path.unlink()

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def build(self, name: str) -> Path:
        """Make an empty folder in which something is built; `place` brings it out."""
        built = self.path / name
        shutil.rmtree(built, ignore_errors=True)
        built.mkdir(parents=True)
        return built

    def place(self, built: Path, target: Path) -> None:
        """Rename a file or folder that was built to its place, durable, with the umask's modes."""
        whole = [built, *built.rglob("*")]
        allow_readers(*(path for path in whole if path.is_file()))
        for path in whole:
            sync(path)
        self.discard(target)
        os.rename(built, target)
        sync(target.parent)

    def discard(self, path: Path) -> None:
        """Remove a file or folder if it exists; a kill leaves nothing half removed under its name."""
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        doomed = self.build(f"{path.name}.old")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


@dataclass(frozen=True)
class Folder:
    """A local folder, with the methods of `storage.Bucket`."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        """Return the path of a file."""
        return self.path / name

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    def beside(self, name: str) -> "Folder":
        """Return the folder of that name beside this one."""
        return Folder(self.path.parent / name)

    @property
    def scratch(self) -> Path:
        """The folder in which files are built: this one."""
        return self.path

    def make(self, *parts: str) -> None:
        """Make the folder, or folders in it. Raises UserError where that fails."""
        for part in parts or ("",):
            try:
                (self.path / part).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"the folder {self.path / part} cannot be made: {error.strerror}; use another"
                ) from None

    def exists(self) -> bool:
        """Return whether the folder exists."""
        return self.path.is_dir()

    def names(self, part: str = "") -> list[str]:
        """List the names in the folder, or in a folder of it; sorted."""
        folder = self.path / part
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Return the sizes of some files in bytes; None for one that is missing."""

        def size(name: str) -> int | None:
            try:
                return os.stat(self.path / name).st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

        return [size(name) for name in names]

    def read(self, name: str) -> bytes:
        """Read a file; raises FileNotFoundError."""
        return (self.path / name).read_bytes()

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        """Read some small files; None for one that is missing."""

        def read(name: str) -> bytes | None:
            try:
                return (self.path / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

        return [read(name) for name in names]

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for reading; raises FileNotFoundError."""
        with open(self.path / name, "rb") as file:
            yield file

    def write(self, name: str, content: bytes | str) -> None:
        """Write a whole file."""
        write_atomic(self.path / name, content)

    def put(self, built: Path, name: str) -> None:
        """Rename a file of `scratch`, which is synced already, to its final name."""
        os.replace(built, self.path / name)
        sync(self.path)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        (self.path / name).unlink(missing_ok=True)

    def move(self, name: str, target: str) -> None:
        """Rename a file."""
        (self.path / name).rename(self.path / target)
