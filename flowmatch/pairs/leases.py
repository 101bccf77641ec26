"""Which worker makes which shard: its own shards first, then those that are left, under a lease.

Workers share a folder and nothing else. A lease is a file that is created exclusively and refreshed by
its holder; a lease that is no longer refreshed is broken. Two workers that make the same shard write
the same bytes, and the first commit stays, so that a lost or racy lease costs time only. In an object
store whose client cannot create an object exclusively there are no leases.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from flowmatch.config import UserError
from flowmatch.pairs.shards import META, missing
from flowmatch.runs import storage
from flowmatch.runs.files import worker
from flowmatch.runs.storage import Bucket, Place, Store

DAY = 86_400.0  # seconds
AGAIN = 3  # times that a shard is yielded again
Seen = dict[str, tuple[Any, float]]  # lease -> its stamp, and when we first saw that stamp


def claim(
    folder: Place,
    own: Sequence[int],
    every: Sequence[int],
    fingerprint: str,
    ttl: float = 60.0,
    settle: Callable[[], None] = lambda: None,
    missing: Callable[[Store, Sequence[int], str], list[int]] = missing,
) -> Generator[int]:
    """Yield the numbers of shards to make until all of `every` are done.

    The worker's own shards come first. The others follow from the end of `every`, where a slow or dead
    worker has not been yet. A shard that a living worker holds is waited for. A lease is broken if it
    has not changed for `ttl` seconds, or if its process on this host is dead.

    A shard that was yielded and is not done after `settle` is yielded again, a few times.

    The generator owns the leases: it keeps each until its shard is done, and closing it returns those
    that it holds. If the shards are written in the background, the writer must stop before the leases
    are returned, or another worker could start on a shard that is still being written. Contexts are
    left in reverse order, so enter the generator first:
    `with contextlib.closing(claim(...)) as todo, Writer(...) as writer`.

    Args:
        folder: path or URL of the set.
        own: the numbers of this worker's share.
        every: the numbers of all shards.
        fingerprint: of the set, see `shards.write_shard`.
        ttl: seconds after which a lease that does not change is broken.
        settle: called before the generator waits; must return only when all shards that were
            yielded are written.
        missing: lists the numbers that are not done, in their order, as `shards.missing`.

    Raises:
        UserError: if a shard of another fingerprint is in the folder.
    """
    store = storage.at(folder)
    store.make(META)
    sweep(store)
    mine = set(own)

    def done(k: int) -> bool:
        return not missing(store, [k], fingerprint)

    left = missing(store, [*own, *(k for k in reversed(every) if k not in mine)], fingerprint)
    seen: Seen = {}
    held: dict[int, Lease] = {}
    yielded: Counter[int] = Counter()
    try:
        while left:
            waiting = True
            for k in list(left):
                for other in [other for other in held if done(other)]:
                    held.pop(other).release()
                if done(k):
                    left.remove(k)
                    continue
                lease = acquire(store, f"{META}/{k:06d}.lease", ttl, seen)
                if lease is None:
                    continue
                held[k], waiting = lease, False
                left.remove(k)
                if not done(k):  # its last holder may just have finished
                    yield k
            settle()
            for k in list(held):
                if not done(k):  # another worker removed its half tar
                    yielded[k] += 1
                    assert yielded[k] <= AGAIN, f"shard {k} was claimed and not written"
                    left.append(k)
                held.pop(k).release()
            if left and waiting:
                time.sleep(min(1.0, ttl / 10))
    finally:
        for lease in held.values():
            lease.release()


class Hold(Protocol):
    """What a lease needs of the place where it lies."""

    def create(self) -> None:
        """Create the mark that says that we hold it; raise FileExistsError if there is one."""

    def refresh(self) -> bool:
        """Change the mark; return False if it is ours no longer."""

    def remove(self) -> None:
        """Remove the mark, unless another worker has broken it and made its own."""

    def read(self) -> tuple[Any, str]:
        """Return a stamp that changes when the mark is refreshed, and HOST.PID of its holder.

        Raises:
            FileNotFoundError: if there is no mark.
        """

    def seize(self, stamp: Any) -> None:
        """Remove the mark of a dead holder; raise FileNotFoundError if it is gone or has changed."""


class Lease:
    """An advisory hold on a shard, which a thread refreshes until it is released."""

    def __init__(self, hold: Hold, ttl: float):
        """Acquire it, and refresh it three times in `ttl` seconds.

        Raises:
            FileExistsError: if another worker holds it.
        """
        hold.create()
        self.hold = hold
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._refresh, args=(ttl / 3,), daemon=True)
        self.thread.start()

    def _refresh(self, interval: float) -> None:
        while not self.stop.wait(interval) and self.hold.refresh():
            pass

    def release(self) -> None:
        """Stop refreshing and give the lease back, unless another worker has broken it."""
        self.stop.set()
        self.thread.join()
        self.hold.remove()


class FileHold:
    """A lease as a file in a local folder; its modification time is the stamp."""

    def __init__(self, path: Path):
        self.path = path

    def create(self) -> None:
        """Create the file exclusively, and keep it open: a rename does not change whose it is."""
        self.descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            os.write(self.descriptor, worker().encode())
        except OSError:  # the disk is full
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            raise

    def refresh(self) -> bool:
        """Set the time of our own file, even if another worker's file has its name by now."""
        try:
            os.utime(self.descriptor)
        except OSError:  # broken and gone (NFS)
            return False
        return True

    def remove(self) -> None:
        """Remove the file if it is ours."""
        with suppress(OSError):  # broken by another worker
            if os.path.samestat(os.stat(self.path), os.fstat(self.descriptor)):
                self.path.unlink()
        os.close(self.descriptor)

    def read(self) -> tuple[int, str]:
        """Return the file's time in ns and its holder."""
        return self.path.stat().st_mtime_ns, self.path.read_text()

    def seize(self, stamp: Any) -> None:
        """Rename the file, then remove it: of several workers that break a lease, one wins."""
        broken = self.path.with_name(f"{self.path.name}.tmp.{worker()}")
        os.rename(self.path, broken)
        broken.unlink()


class ObjectHold:
    """A lease as an object in a store, written again and again with a count; its content is the stamp.

    A store that cannot create an object exclusively has no leases: every call succeeds.
    """

    def __init__(self, store: Bucket, name: str):
        self.store, self.name, self.count = store, name, 0

    def create(self) -> None:
        """Create the object exclusively."""
        if self.store.exclusive and not self.store.create(self.name, f"{worker()} 0".encode()):
            raise FileExistsError(self.name)

    def refresh(self) -> bool:
        """Write the next count, if the object is ours."""
        if not self.store.exclusive:
            return False
        try:
            if self.read()[1] != worker():
                return False
            self.count += 1
            self.store.write(self.name, f"{worker()} {self.count}")
        except FileNotFoundError:  # broken by another worker
            return False
        except UserError:  # the store did not answer: the next round asks again
            pass
        return True

    def remove(self) -> None:
        """Remove the object if it is ours; one that stays is broken by the next worker."""
        if not self.store.exclusive:
            return
        with suppress(FileNotFoundError, UserError):
            if self.read()[1] == worker():
                self.store.remove(self.name)

    def read(self) -> tuple[bytes, str]:
        """Return the object's content and its holder."""
        content = self.store.read(self.name)
        return content, _holder(content)

    def seize(self, stamp: Any) -> None:
        """Remove the object if it has not changed; two workers at once make the same shard."""
        if self.store.read(self.name) != stamp:
            raise FileNotFoundError(self.name)
        self.store.remove(self.name)


def acquire(store: Store, name: str, ttl: float, seen: Seen) -> Lease | None:
    """Acquire a lease, and break one that is dead.

    Args:
        store: the folder or store of the set.
        name: of the lease in it.
        ttl: seconds after which a lease that does not change is broken.
        seen: what earlier calls saw of the leases of others; updated.

    Returns:
        The lease, or None if its holder may be alive.
    """
    hold = ObjectHold(store, name) if isinstance(store, Bucket) else FileHold(store / name)
    with suppress(FileExistsError):
        return Lease(hold, ttl)
    try:
        stamp, holder = hold.read()
        if not _stale(name, stamp, holder, ttl, seen):
            return None
        hold.seize(stamp)
        return Lease(hold, ttl)
    except (FileNotFoundError, FileExistsError):
        return None  # released or taken at this moment; the next round tries again


def _holder(content: bytes) -> str:
    return content.decode(errors="replace").partition(" ")[0]


def _stale(name: str, stamp: Any, holder: str, ttl: float, seen: Seen) -> bool:
    """Return whether a lease is to be broken.

    Only a change of its stamp counts as life: the clocks of hosts differ.
    """
    if seen.get(name, (None, 0.0))[0] != stamp:
        seen[name] = (stamp, time.monotonic())
    return is_dead(holder) or time.monotonic() - seen[name][1] >= ttl


def is_dead(name: str) -> bool:
    """Return whether HOST.PID was a process of this host and is gone.

    A file with our own id was left by an earlier process: containers reuse low numbers.
    """
    host, _, number = name.rpartition(".")
    if host != worker().rpartition(".")[0] or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(number) == os.getpid()


def sweep(folder: Place) -> None:
    """Remove the temporary files and leases that dead processes of this host left.

    Files of other hosts may be in use: only temporary files that nobody has written to for a day are
    removed. A worker that is killed after its commit leaves a lease that no other worker would break.
    """
    store = storage.at(folder)
    for place in (store.scratch, store.scratch / META):
        for path in place.glob("*.tmp.*"):
            with suppress(FileNotFoundError):
                old = time.time() - path.stat().st_mtime > DAY
                if old or is_dead(path.name.rpartition(".tmp.")[2]):
                    path.unlink()
    leases = [f"{META}/{name}" for name in store.names(META) if name.endswith(".lease")]
    for lease, content in zip(leases, store.read_all(leases), strict=True):
        if content is not None and is_dead(_holder(content)):
            store.remove(lease)
