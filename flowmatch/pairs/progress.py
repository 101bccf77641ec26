"""The progress of a whole set of pairs, of all its workers together, read from the commits."""

import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Self

from tqdm import tqdm

from flowmatch.config import UserError
from flowmatch.pairs import shards
from flowmatch.runs.storage import Place

TERMINAL, LOG = 3.0, 30.0  # seconds between two listings of the folder
WINDOW = 32  # listings with new shards from which the rate is computed


class ShardProgress:
    """Show the progress of the whole set: a bar on a terminal, otherwise a line of the log.

    A thread lists the sidecars every few seconds and reads the new ones. The rate counts the shards
    that all workers committed while this one watched.
    """

    def __init__(
        self,
        folder: Place,
        every: Sequence[int],
        fingerprint: str,
        shard_size: int,
        *,
        shown: bool = True,
        interval: float | None = None,
    ):
        """Watch a set from the moment the context is entered.

        Args:
            folder: path or URL of the set.
            every: the numbers of its shards.
            fingerprint: of the set.
            shard_size: pairs in a shard.
            shown: whether to show anything.
            interval: seconds between two listings; default: 3 on a terminal, else 30.
        """
        self.folder, self.every, self.fingerprint, self.size = (
            folder,
            every,
            fingerprint,
            shard_size,
        )
        self.left = list(every)
        self.seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # (when, shards done)
        self.shown, self.terminal = shown, sys.stderr.isatty()
        self.interval = interval or (TERMINAL if self.terminal else LOG)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.bar: Any = None

    def __enter__(self) -> Self:
        if self.shown:
            self.update(time.monotonic())
            if self.terminal:
                form = "{percentage:3.0f}%|{bar}| {desc}"
                self.bar = tqdm(total=len(self.every), bar_format=form, dynamic_ncols=True)
                self._show()
            self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.shown:
            self.stop.set()
            self.thread.join()
            self._show()
            if self.bar is not None:
                self.bar.close()

    def update(self, now: float) -> None:
        """Count the committed shards.

        Args:
            now: seconds of a monotonic clock.
        """
        try:
            listed = shards.committed(self.folder).intersection(self.left)
            new = listed.difference(shards.missing(self.folder, sorted(listed), self.fingerprint))
        except (UserError, OSError):  # the stage meets the error too, and decides what to do
            return
        self.left = [k for k in self.left if k not in new]
        if new or not self.seen:
            self.seen.append((now, len(self.every) - len(self.left)))

    def line(self) -> str:
        """Describe the progress as of the last update."""
        done, number = len(self.every) - len(self.left), len(self.every)
        text = (
            f"{done:,} of {number:,} shards, {done * self.size:,} of {number * self.size:,} pairs"
        )
        if len(self.seen) > 1:
            (began, before), (ended, after) = self.seen[0], self.seen[-1]
            rate = (after - before) * self.size / (ended - began)
            text += f", {rate:,.0f} pairs/s" if rate >= 10 else f", {rate:.2g} pairs/s"
            if self.left:
                text += f", {timedelta(seconds=round(len(self.left) * self.size / rate))} left"
        return text

    def _watch(self) -> None:
        while not self.stop.wait(self.interval):
            self._show()

    def _show(self) -> None:
        self.update(time.monotonic())
        if self.bar is not None:
            self.bar.n = len(self.every) - len(self.left)
            self.bar.set_description_str(self.line())
        else:
            print(f"generate_pairs: {self.line()}", file=sys.stderr, flush=True)
