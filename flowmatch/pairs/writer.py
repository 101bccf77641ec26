"""Background writing: a thread cuts, hashes and commits shards while the next batch is integrated."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

WAITING = 2  # batches that may wait for the writer; bounds memory for shards of any size
END, ABORTED = object(), object()


class Aborted(Exception):
    """Raised in the writer's thread to abandon a shard whose batches have stopped."""


class Writer:
    """Write shards one after another in a thread.

    Use it as a context manager. Leaving the context waits for the thread: it commits the shards that
    were handed over whole and abandons one that was not. An exception in the thread is raised by the
    next call of `shard`, or at the latest by `settle`.
    """

    def __init__(self, write: Callable[[int, Iterator[Any]], Any]):
        """Start no thread yet.

        Args:
            write: write(k, batches) runs in the thread, consumes the batches as they arrive, and
                commits shard k.
        """
        self.write = write
        self.thread = ThreadPoolExecutor(1, "writer")
        self.room = threading.Semaphore(WAITING)
        self.jobs: deque[Future[Any]] = deque()
        self.handed: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.handed.put(ABORTED)  # has no effect on a shard that has its END already
        self.thread.shutdown()

    def shard(self, k: int, batches: Iterable[Any]) -> None:
        """Hand over shard k batch by batch; return when the last batch is handed over, not written."""
        self.settle(1)
        self.handed = queue.SimpleQueue()
        self.jobs.append(self.thread.submit(self.write, k, self._taken(self.handed)))
        for batch in batches:
            while not self.room.acquire(timeout=0.2):
                self._raise_errors()
            self._raise_errors()
            self.handed.put(batch)
        self.handed.put(END)

    def settle(self, leave: int = 0) -> None:
        """Wait until all shards but the last `leave` are committed; raise an error of the thread."""
        while len(self.jobs) > leave:
            self.jobs[0].result()
            self.jobs.popleft()

    def _raise_errors(self) -> None:
        for job in self.jobs:
            if job.done():
                job.result()

    def _taken(self, handed: queue.SimpleQueue[Any]) -> Iterator[Any]:
        while (batch := handed.get()) is not END:
            if batch is ABORTED:
                raise Aborted
            self.room.release()
            yield batch
