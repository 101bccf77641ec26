"""Files in a local folder that appear whole or not at all, also after a power cut."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flowmatch.config import UserError

UMASK = os.umask(0o077)
os.umask(UMASK)
HOST_SPACE = 0xEFFFFFFC  # inode of Linux's initial PID namespace


def worker() -> str:
    """Return HOST.PID, which identifies this process among all that may share a folder.

    In a container HOST ends with the number of its PID namespace: containers may share a host name,
    and a PID of one means nothing in another.
    """
    host = socket.gethostname()
    with suppress(OSError):  # not Linux
        if (namespace := os.stat("/proc/self/ns/pid").st_ino) != HOST_SPACE:
            host = f"{host}-{namespace}"
    return f"{host}.{os.getpid()}"


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file so that a reader sees all of it or nothing, also after a power cut."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp.{worker()}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def allow_readers(*files: str | os.PathLike[str]) -> None:
    """Give files the mode of any new file: safetensors writes 0600, which nobody else can read."""
    for file in files:
        os.chmod(file, 0o666 & ~UMASK)


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
        sync_folder(self.path)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        (self.path / name).unlink(missing_ok=True)

    def move(self, name: str, target: str) -> None:
        """Rename a file."""
        (self.path / name).rename(self.path / target)
