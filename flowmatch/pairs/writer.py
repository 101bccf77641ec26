"""Writing in the background: one thread cuts, hashes and commits while the next batch is made."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

WAITING = 2  # batches that wait for the writer at most, whatever the size of a shard
END, ABORTED = object(), object()


class Aborted(Exception):
    """Unwinds the writing of a shard that will never be whole."""


class Writer:
    """Write shards one after another in a thread of its own.

    write(k, batches): called in that thread; takes batches as they come and commits shard k. What it
    raises is raised from the next call here, at the latest from `settle`. Leaving the context waits for
    the thread: shards that were handed over whole are committed, one that was not is unwound.
    """

    def __init__(self, write: Callable[[int, Iterator[Any]], Any]):
        self.write = write
        self.thread = ThreadPoolExecutor(1, "writer")
        self.room = threading.Semaphore(WAITING)
        self.jobs: deque[Future[Any]] = deque()
        self.handed: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.handed.put(ABORTED)  # not seen where END came before
        self.thread.shutdown()

    def shard(self, k: int, batches: Iterable[Any]) -> None:
        """Hand over shard k, batch by batch as they are made; its last ones may still be unwritten."""
        self.settle(1)
        self.handed = queue.SimpleQueue()
        self.jobs.append(self.thread.submit(self.write, k, self._taken(self.handed)))
        for batch in batches:
            while not self.room.acquire(timeout=0.2):
                self._check()
            self._check()
            self.handed.put(batch)
        self.handed.put(END)

    def settle(self, leave: int = 0) -> None:
        """Wait until all shards but the last `leave` are committed; raise what their writing raised."""
        while len(self.jobs) > leave:
            self.jobs[0].result()
            self.jobs.popleft()

    def _check(self) -> None:
        for job in self.jobs:
            if job.done():
                job.result()

    def _taken(self, handed: queue.SimpleQueue[Any]) -> Iterator[Any]:
        while (batch := handed.get()) is not END:
            if batch is ABORTED:
                raise Aborted
            self.room.release()
            yield batch
