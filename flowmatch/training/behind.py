"""Checkpoints of split weights: each process writes its own rows, behind the updates that follow.

A copy of the rows is taken at once; a thread writes and hashes them. Process 0 places the checkpoint
when the parts of all are there: a process that dies before leaves the checkpoints of before.
"""

import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from flowmatch.runs import parts
from flowmatch.runs.checkpoints import Checkpoints
from flowmatch.runs.files import write_atomic
from flowmatch.runs.manifest import sha256_file
from flowmatch.runs.process import leads, rank, world_size
from flowmatch.training import sharding

GRACE = 30.0  # seconds that an error leaves the checkpoint before it


class Behind:
    """Writes the checkpoints of one process, one at a time.

    Args:
        checkpoints: Of the run.
        keep: Number of checkpoints that are kept.
    """

    def __init__(self, checkpoints: Checkpoints, keep: int):
        self.checkpoints, self.keep = checkpoints, keep
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.last: Future[None] | None = None
        self.ended = threading.Event()

    def save(self, step: int, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Begin to write a checkpoint; `settle` was called on every process, and then they met.

        Args:
            step: Of the checkpoint.
            groups: File without its suffix -> name -> tensor, split or not.
        """
        pieces = {stem: sharding.pieces(group) for stem, group in groups.items()}
        self.last = self.pool.submit(self._write, step, pieces)

    def settle(self) -> None:
        """Wait until the checkpoint before is there, on process 0, or this one's part of it."""
        if self.last is not None:
            self.last.result()
            self.last = None

    def close(self) -> None:
        """End, also after an error; what is not written by then is left out."""
        self.ended.set()
        self.pool.shutdown()

    def _write(self, step: int, pieces: Mapping[str, Mapping[str, parts.Piece]]) -> None:
        built, files = self.checkpoints.place_of(step), {}
        for stem, group in pieces.items():
            name = parts.write(built, stem, rank(), group)
            files[name] = sha256_file(built / name)
        write_atomic(built / _told(rank()), json.dumps(files))
        if leads():
            for number in range(1, world_size()):
                files |= self._wait(built / _told(number))
            for number in range(world_size()):
                (built / _told(number)).unlink()
            self.checkpoints.finish(step, files, self.keep)

    def _wait(self, file: Path) -> dict[str, str]:
        """Wait for the names and hashes of another process."""
        last = None
        while not file.exists():
            if self.ended.is_set():
                last = last or time.monotonic() + GRACE
                if time.monotonic() > last:
                    raise TimeoutError(f"{file} is not there")
            time.sleep(0.02)
        found: dict[str, str] = json.loads(file.read_text())
        return found


def _told(number: int) -> str:
    return f"part-{number:05d}.json"
