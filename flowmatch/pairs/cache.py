"""Tars of a store, kept in a local folder while they are in use: whole, checked, a limited number.

Threads fetch; what went wrong in one is raised where the tar is asked for. Processes of one machine
share the folder: a lock on the half file lets one of them fetch, and the others wait for it. A tar that
another evicts while it is mapped here stays readable: its bytes go when the mapping does.
"""

import fcntl
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
from flowmatch.runs.manifest import sha256_file
from flowmatch.runs.storage import Bucket, Place

THREADS = 4  # objects fetched at once


def repair(store: Place) -> str:
    """Say how a set is mended."""
    command = f"python -m pipelines.verify_pairs {shlex.quote(str(store))} --full"
    return f"{command} says what is wrong, and how to mend it"


def default_folder() -> Path:
    """Name the user's folder for tars of stores."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flowmatch" / "pairs"


def room(folder: Path) -> int:
    """Count the bytes that the folder may hold by default: nine tenths of what is free or its own."""
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    own = sum(facts.st_size for facts, _ in _tars(folder))
    return (shutil.disk_usage(there).free + own) * 9 // 10


class Cache:
    """Keep at most `capacity` of a store's tars, the least recently used out first.

    size: bytes of each. hashes: name -> sha256, for those that are to be hashed once fetched. Pickled,
    it leaves its threads behind.
    """

    def __init__(
        self, store: Bucket, folder: Path, capacity: int, size: int, hashes: Mapping[str, str]
    ):
        self.store, self.folder, self.capacity = store, folder, capacity
        self.size, self.hashes = size, hashes
        self.keep: set[str] = set()  # what is not evicted
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
        """Begin to fetch those tars that are not here, or could not be fetched the last time."""
        if self._process != os.getpid():  # forked: no threads here, and no client
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
                self._threads += 1  # daemons: the end of the process waits for none of them
                threading.Thread(target=self._work, name="shards", daemon=True).start()

    def open(self, name: str) -> int:
        """Wait for a tar, and open it: a file descriptor.

        Raises UserError with the tar's name where it could not be fetched, or is not what was sealed.
        """
        for _ in range(3):
            self.fetch([name])
            if name in self._pending:
                self._pending[name].result()
            try:
                descriptor = os.open(self.folder / name, os.O_RDONLY)
            except FileNotFoundError:  # another process has evicted it this moment
                continue
            os.utime(descriptor)
            return descriptor
        raise UserError(
            f"{self.folder / name}: others that share this cache evict it; give this run another "
            "folder as cache, or a larger cache_gb"
        )

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
            self.folder.mkdir(parents=True, exist_ok=True)
            while not (self.folder / name).exists():
                with open(part, "ab") as file:
                    fcntl.flock(
                        file, fcntl.LOCK_EX
                    )  # the system gives it back when its holder dies
                    if (self.folder / name).exists() or not _is(part, file):
                        continue  # who held the lock before has fetched it, or failed
                    self._evict()
                    self._copy(name, part)
                    os.replace(part, self.folder / name)
        except OSError as error:
            raise UserError(
                f"{self.store / name} cannot be kept in {self.folder}: {error}; free space there, or "
                "set cache to another folder, or cache_gb to less"
            ) from error

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
                    f"(sha256); {repair(self.store)}"
                )
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError):
                raise UserError(f"{self.store / name} is missing; {repair(self.store)}") from None
            raise

    def _evict(self) -> None:
        """Make room for what is being fetched."""
        with self._evicting:
            # The halves first: one that gets its name between two listings is in both, not in none.
            coming = {part.stem for part in self.folder.glob("*.part")}
            here = sorted((facts.st_mtime_ns, path) for facts, path in _tars(self.folder))
            surplus = len(coming.union(path.name for _, path in here)) - self.capacity
            for _, path in here:
                if surplus > 0 and path.name not in self.keep:
                    path.unlink(missing_ok=True)
                    surplus -= 1

    def _sweep(self) -> None:
        """Remove half files that no process works on any more."""
        for part in self.folder.glob("*.part"):
            with suppress(OSError), open(part, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(part, file):
                    part.unlink()


def _tars(folder: Path) -> Iterator[tuple[os.stat_result, Path]]:
    """Look at the tars of a folder; one that another process evicts this moment is none of them."""
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            yield path.stat(), path


def _is(path: Path, file: BinaryIO) -> bool:
    """Tell whether the path still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
