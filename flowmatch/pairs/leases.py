"""Who makes which shard: own shards first, then whatever is left, under an advisory lease.

Workers share a folder and nothing else. A lease is a file, made exclusively, whose time its holder
refreshes; one that is not refreshed any more is broken. Two workers that make the same shard make
the same bytes and the first commit stays, so a lost or racy lease costs time and nothing else. In an
object store whose client cannot create exclusively there are no leases.
"""

import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowmatch.config import UserError
from flowmatch.pairs.shards import META, done, missing
from flowmatch.runs import storage
from flowmatch.runs.files import worker
from flowmatch.runs.storage import Bucket, Place, Store

DAY = 86_400.0  # seconds
Seen = dict[Any, tuple[Any, float]]  # lease -> its stamp, when we first saw that stamp


def claim(
    folder: Place,
    own: Sequence[int],
    every: Sequence[int],
    fingerprint: str,
    ttl: float = 60.0,
    settle: Callable[[], None] = lambda: None,
) -> Generator[int]:
    """Yield the numbers of shards to make, until all of `every` are done.

    own: this worker's share, taken first. What is left then is taken from the end of `every`, where
    a slow or dead worker has not been yet. A shard that a living worker holds is waited for; a
    lease that stands still for ttl seconds, or whose process is dead on this host, is broken. The
    caller may write behind: a lease is kept until its shard is done, and settle(), called before all
    else is waited for, returns when all that was yielded is written. Close the generator, best by
    `with contextlib.closing(claim(...)) as todo`, and the leases in hand are given back.
    Raises UserError where a shard of another fingerprint is in the way.
    """
    store = storage.at(folder)
    store.make(META)
    sweep(store)
    mine = set(own)
    left = missing(store, [*own, *(k for k in reversed(every) if k not in mine)], fingerprint)
    seen: Seen = {}
    held: dict[int, Any] = {}
    try:
        while left:
            waiting = True
            for k in list(left):
                for other in [other for other in held if done(store, other, fingerprint)]:
                    held.pop(other).release()
                if done(store, k, fingerprint):
                    left.remove(k)
                    continue
                lease = _hold(store, f"{META}/{k:06d}.lease", ttl, seen)
                if lease is None:
                    continue
                held[k], waiting = lease, False
                left.remove(k)
                if not done(store, k, fingerprint):  # its last holder may just have finished
                    yield k
            settle()
            for k in list(held):
                assert done(store, k, fingerprint), f"shard {k} was claimed and not written"
                held.pop(k).release()
            if left and waiting:
                time.sleep(min(1.0, ttl / 10))
    finally:
        for lease in held.values():
            lease.release()


class Lease:
    """An advisory hold on a file's name, kept fresh by a thread until released."""

    def __init__(self, path: Path, ttl: float):
        """Make the file; raises FileExistsError where another worker holds it."""
        self.path = path
        self.descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            os.write(self.descriptor, worker().encode())
        except OSError:  # the disk is full
            path.unlink(missing_ok=True)
            os.close(self.descriptor)
            raise
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._refresh, args=(ttl / 3,), daemon=True)
        self.thread.start()

    def _refresh(self, interval: float) -> None:
        while not self.stop.wait(interval):
            try:
                os.utime(self.descriptor)  # our own file, even where the name is another's by now
            except OSError:  # broken and gone (NFS): nothing left to keep
                return

    def release(self) -> None:
        """Give the name back, unless another worker broke the lease and holds it now."""
        self.stop.set()
        self.thread.join()
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self.descriptor)):
                self.path.unlink()
        except OSError:  # broken by another worker
            pass
        os.close(self.descriptor)


class RemoteLease:
    """The same in an object store: an object that is written again and again."""

    def __init__(self, store: Bucket, name: str, ttl: float):
        """Make the object; raises FileExistsError where another worker holds it."""
        self.store, self.name = store, name
        if store.exclusive and not store.create(name, f"{worker()} 0".encode()):
            raise FileExistsError(name)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._refresh, args=(ttl / 3,), daemon=True)
        if store.exclusive:
            self.thread.start()

    def _ours(self) -> bool:
        return _holder(self.store.read(self.name)) == worker()

    def _refresh(self, interval: float) -> None:
        count = 0
        while not self.stop.wait(interval):
            try:
                if not self._ours():
                    return
                count += 1
                self.store.write(self.name, f"{worker()} {count}")
            except FileNotFoundError:  # broken by another worker
                return
            except UserError:  # the store did not answer: the next round asks again
                continue

    def release(self) -> None:
        """Give the name back, unless another worker broke the lease and holds it now."""
        self.stop.set()
        if not self.store.exclusive:
            return
        self.thread.join()
        with suppress(FileNotFoundError, UserError):  # a lease that stays is broken by the next
            if self._ours():
                self.store.remove(self.name)


def _hold(store: Store, name: str, ttl: float, seen: Seen) -> Lease | RemoteLease | None:
    """Acquire a lease, breaking one that is dead; None where its holder may be alive."""
    if not isinstance(store, Bucket):
        return _take(store / name, ttl, seen)
    try:
        return RemoteLease(store, name, ttl)
    except FileExistsError:
        pass
    try:
        content = store.read(name)
        if not _stale(name, content, _holder(content), ttl, seen) or store.read(name) != content:
            return None
        store.remove(name)  # two that break it at once make the same shard
        return RemoteLease(store, name, ttl)
    except (FileNotFoundError, FileExistsError):
        return None


def _holder(content: bytes) -> str:
    return content.decode(errors="replace").partition(" ")[0]


def _stale(lease: Any, stamp: Any, holder: str, ttl: float, seen: Seen) -> bool:
    """Tell whether a lease is to be broken. Whether its stamp changes counts: hosts' clocks differ."""
    if seen.get(lease, (None, 0.0))[0] != stamp:
        seen[lease] = (stamp, time.monotonic())
    return _dead(holder) or time.monotonic() - seen[lease][1] >= ttl


def _take(path: Path, ttl: float, seen: Seen) -> Lease | None:
    """Acquire a lease, breaking one that is dead; None where its holder may be alive."""
    try:
        return Lease(path, ttl)
    except FileExistsError:
        pass
    try:
        stamp, holder = path.stat().st_mtime_ns, path.read_text()
    except FileNotFoundError:
        return None  # released this moment; the next round takes it
    if not _stale(path, stamp, holder, ttl, seen):
        return None
    broken = path.with_name(f"{path.name}.tmp.{worker()}")
    try:
        os.rename(path, broken)  # of several that break it, one wins
        broken.unlink()
        return Lease(path, ttl)
    except (FileNotFoundError, FileExistsError):
        return None


def _dead(name: str) -> bool:
    """Tell whether HOST.PID is a process of this host that is gone.

    A file that bears our own id was left by an earlier process: containers reuse low numbers.
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

    Others' may be in use, but for temporary files that nobody has written to for a day. A worker
    killed after its commit leaves a lease that nobody would break.
    """
    store = storage.at(folder)
    for place in (store.scratch, store.scratch / META):
        for path in place.glob("*.tmp.*"):
            with suppress(FileNotFoundError):
                old = time.time() - path.stat().st_mtime > DAY
                if old or _dead(path.name.rpartition(".tmp.")[2]):
                    path.unlink()
    leases = [f"{META}/{name}" for name in store.names(META) if name.endswith(".lease")]
    for lease, content in zip(leases, store.read_all(leases), strict=True):
        if content is not None and _dead(_holder(content)):
            store.remove(lease)
