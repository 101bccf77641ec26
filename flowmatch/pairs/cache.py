"""Tars of an object store in a local folder: fetched whole, checked, and limited in number.

Threads fetch the tars; the error of a thread is raised where its tar is opened. The processes of a
machine share the folder: a lock on the partial file lets one process fetch, and the others wait for
it. A tar that another process evicts while it is mapped here stays readable, because its bytes are
freed only with the last mapping.
"""

import fcntl
import hashlib
import os
import queue
import shlex
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from flowmatch.config import UserError
from flowmatch.runs import storage
from flowmatch.runs.files import own_folder
from flowmatch.runs.manifest import sha256_file
from flowmatch.runs.process import say
from flowmatch.runs.storage import Bucket, Place

THREADS = 4  # objects fetched at once


def repair(store: Place) -> str:
    """Return the hint that ends an error about a damaged set: the command that explains the damage."""
    command = f"flowmatch verify {shlex.quote(str(store))} --full"
    return f"{command} lists what is wrong and prints the commands that repair it"


def default_folder() -> Path:
    """Return the user's folder for tars of stores."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flowmatch" / "pairs"


def room(folder: Path) -> int:
    """Return the bytes that a cache folder may hold by default.

    They are nine tenths of the free space and the folder's own tars together.
    """
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    own = sum(facts.st_size for facts, _ in _tars(folder))
    return (shutil.disk_usage(existing).free + own) * 9 // 10


class Cache:
    """At most `capacity` tars of a store; the least recently used tar is evicted first.

    Args:
        store: that holds the tars.
        folder: where they are kept.
        capacity: number of tars.
        size: bytes of each tar.
        hashes: name -> sha256, of the tars that are hashed: after they are fetched, and when a process
            first opens one that was there already.

    A pickled cache has no threads; it starts its own where it is unpickled.
    """

    def __init__(
        self, store: Bucket, folder: Path, capacity: int, size: int, hashes: Mapping[str, str]
    ):
        self.store, self.folder, self.capacity = store, folder, capacity
        self.size, self.hashes = size, hashes
        self.keep: set[str] = set()  # tars that are not evicted
        self.sound: set[str] = set()  # tars that this process has hashed
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._pending: dict[str, Future[None]] = {}
        self._queue: queue.SimpleQueue[tuple[str, Future[None]]] = queue.SimpleQueue()
        self._threads = 0
        self._evicting = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, (self.store, self.folder, self.capacity, self.size, self.hashes)

    def fetch(self, names: Iterable[str]) -> None:
        """Begin to fetch the tars that are not in the folder; return at once.

        A tar whose last fetch failed is tried again.
        """
        if self._process != os.getpid():  # a fork has no threads and no client
            self.store = cast(Bucket, storage.at(str(self.store)))
            self._begin()
        self._pending = {n: future for n, future in self._pending.items() if not future.done()}
        for name in names:
            if name in self._pending or (self.folder / name).exists():
                continue
            self._pending[name] = Future()
            self._queue.put((name, self._pending[name]))
            if self._threads < THREADS:
                if not self._threads:
                    self._sweep()
                self._threads += 1  # daemons: the process does not wait for them at its end
                threading.Thread(target=self._work, name="shards", daemon=True).start()

    def open(self, name: str) -> int:
        """Wait for a tar and open it.

        Returns:
            A file descriptor.

        Raises:
            UserError: if the tar could not be fetched, or is not the one that was sealed.
        """
        for _ in range(3):
            self.fetch([name])
            if name in self._pending:
                self._pending[name].result()
            try:
                descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW)
            except FileNotFoundError:  # another process has just evicted it
                continue
            if self._is_sound(name, descriptor):
                with suppress(PermissionError):  # another user's
                    os.utime(descriptor)
                return descriptor
            os.close(descriptor)
            say(f"{self.folder / name} is damaged (sha256 differs): fetched again")
            (self.folder / name).unlink(missing_ok=True)
        raise UserError(
            f"{self.folder / name}: other processes that share this cache keep evicting it; set cache "
            "to another folder for this run, or cache_gb to a larger value"
        )

    def _is_sound(self, name: str, descriptor: int) -> bool:
        """Return whether a tar has its hash; one that this process has hashed is not hashed again."""
        if name in self.hashes and name not in self.sound:
            with open(descriptor, "rb", closefd=False) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.hashes[name]:
                    return False
        self.sound.add(name)
        return True

    def _work(self) -> None:
        while True:
            name, future = self._queue.get()
            try:
                self._fetch(name)
            except BaseException as error:  # raised where the tar is waited for
                future.set_exception(error)
            else:
                future.set_result(None)

    def _fetch(self, name: str) -> None:
        part = self.folder / f"{name}.part"
        try:
            own_folder(self.folder, "set cache to a folder of your own")
            while not (self.folder / name).exists():
                with self._open_part(part) as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel if its holder dies
                    if (self.folder / name).exists() or not _names(part, file):
                        continue  # the process that held the lock has fetched the tar, or failed
                    self._evict()
                    self._copy(name, part)
                    os.replace(part, self.folder / name)
                    self.sound.add(name)
        except OSError as error:
            raise UserError(
                f"{self.store / name} cannot be stored in {self.folder}: {error}; free space there, "
                "set cache to another folder, or cache_gb to a smaller value"
            ) from error

    @staticmethod
    def _open_part(part: Path) -> BinaryIO:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        return os.fdopen(os.open(part, flags, 0o600), "ab")

    def _copy(self, name: str, part: Path) -> None:
        try:
            self.store.fetch(name, part)
            size = part.stat().st_size
            if size != self.size:
                raise UserError(
                    f"{self.store / name} has {size} bytes, expected {self.size}; {repair(self.store)}"
                )
            if name in self.hashes and sha256_file(part) != self.hashes[name]:
                raise UserError(
                    f"{self.store / name} is damaged: its bytes are not those that were sealed "
                    f"(sha256 differs); {repair(self.store)}"
                )
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError):
                raise UserError(f"{self.store / name} is missing; {repair(self.store)}") from None
            raise

    def _evict(self) -> None:
        """Evict tars until those that are being fetched fit."""
        with self._evicting:
            # Partial files are listed first: a tar that is renamed between the two listings is then
            # counted by both, not by neither.
            coming = {part.stem for part in self.folder.glob("*.part")}
            by_age = sorted((facts.st_mtime_ns, path) for facts, path in _tars(self.folder))
            surplus = len(coming.union(path.name for _, path in by_age)) - self.capacity
            for _, path in by_age:
                if surplus > 0 and path.name not in self.keep:
                    path.unlink(missing_ok=True)
                    surplus -= 1

    def _sweep(self) -> None:
        """Remove partial files that no process works on any longer."""
        for part in self.folder.glob("*.part"):
            with suppress(OSError), self._open_part(part) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _names(part, file):
                    part.unlink()


def _tars(folder: Path) -> Iterator[tuple[os.stat_result, Path]]:
    """Yield the tars of a folder, without one that another process evicts at this moment."""
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            yield path.stat(), path


def _names(path: Path, file: BinaryIO) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
