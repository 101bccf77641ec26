"""Who makes which shard: own shards first, then whatever is left, under an advisory lease.

Workers share a folder and nothing else. A lease is a file, made exclusively, whose time its holder
refreshes; one that is not refreshed any more is broken. Two workers that make the same shard make
the same bytes and the first commit stays, so a lost or racy lease costs time and nothing else.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flowmatch.manifest import worker
from flowmatch.shards import META, done, missing

Seen = dict[Path, tuple[int, float]]  # lease -> its time stamp, when we first saw that stamp


def claim(
    folder: str | os.PathLike[str],
    own: Sequence[int],
    every: Sequence[int],
    fingerprint: str,
    ttl: float = 60.0,
    settle: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Yield the numbers of shards to make, until all of `every` are done.

    own: this worker's share, taken first. What is left then is taken from the end of `every`, where
    a slow or dead worker has not been yet. A shard that a living worker holds is waited for; a
    lease that stands still for ttl seconds, or whose process is dead on this host, is broken. The
    caller may write behind: a lease is kept until its shard is done, and settle(), called before all
    else is waited for, returns when all that was yielded is written. Close the generator, best by
    `with contextlib.closing(claim(...)) as todo`, and the leases in hand are given back.
    Raises UserError where a shard of another fingerprint is in the way.
    """
    folder = Path(folder)
    (folder / META).mkdir(parents=True, exist_ok=True)
    sweep(folder)
    mine = set(own)
    left = missing(folder, [*own, *(k for k in reversed(every) if k not in mine)], fingerprint)
    seen: Seen = {}
    held: dict[int, Lease] = {}
    try:
        while left:
            waiting = True
            for k in list(left):
                for other in [other for other in held if done(folder, other, fingerprint)]:
                    held.pop(other).release()
                if done(folder, k, fingerprint):
                    left.remove(k)
                    continue
                lease = _take(folder / META / f"{k:06d}.lease", ttl, seen)
                if lease is None:
                    continue
                held[k], waiting = lease, False
                left.remove(k)
                if not done(folder, k, fingerprint):  # its last holder may just have finished
                    yield k
            settle()
            for k in list(held):
                assert done(folder, k, fingerprint), f"shard {k} was claimed and not written"
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
    # Only whether the stamp changes counts, by our own clock: hosts' clocks differ.
    if seen.get(path, (None, 0.0))[0] != stamp:
        seen[path] = (stamp, time.monotonic())
    if not _dead(holder) and time.monotonic() - seen[path][1] < ttl:
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


def sweep(folder: Path) -> None:
    """Remove the temporary files and leases that dead processes of this host left.

    Others' may be in use. A worker killed after its commit leaves a lease that nobody would break.
    """
    for place in (folder, folder / META):
        for path in place.glob("*.tmp.*"):
            if _dead(path.name.rpartition(".tmp.")[2]):
                path.unlink(missing_ok=True)
    for path in (folder / META).glob("*.lease"):
        try:
            dead = _dead(path.read_text())
        except FileNotFoundError:  # released this moment
            continue
        if dead:
            path.unlink(missing_ok=True)
