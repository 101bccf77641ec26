"""A sign of life of each process of a job, once a second, from a thread.

Whatever the process is busy with, the thread counts: it shows that the process lives, not that it is
fast. Rank 0 looks at all of them, the others at rank 0; one that stands still is named and ends the job.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

from flowmatch.runs import stopping
from flowmatch.runs.files import worker
from flowmatch.runs.meeting import Meeting

TICK = 1.0  # seconds between two signs of life
STALL = 30.0  # seconds without one, after which a process counts as lost
LEFT = "left"  # the sign of a process that needs the others no more


class Heartbeat:
    """The threads of this process.

    Args:
        name: Name of the stage, for what is printed.
        meeting: Where the processes meet; it is joined here.
        stall: Seconds without a sign of life after which a process counts as lost; 0: never.
    """

    def __init__(self, name: str, meeting: Meeting, stall: float):
        self.name, self.meeting, self.stall = name, meeting, stall
        self.ending = False  # the main thread ends this process by itself
        self._following = self._stood_still = False
        self._replied = time.monotonic()
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its sign, and since when
        self._workers: dict[int, str] = {}  # rank -> HOST.PID
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()
        threading.Thread(target=self._guard, daemon=True).start()

    def stop(self) -> None:
        """End the threads: one inside a call of the store would abort the process at its end."""
        self.meeting.closed.set()
        self._beats.join(2)

    def _beat(self) -> None:
        """Count, and look whether the others do."""
        meeting = self.meeting
        with contextlib.suppress(RuntimeError):  # the store has gone: see `_guard`
            if not meeting.join():
                return
            count, last = 0, time.monotonic()
            while not meeting.closed.wait(TICK if count else 0):
                now = time.monotonic()
                if now - last > 5 * TICK:  # this process stood still, or the store did
                    self._stood_still = True
                    self._seen = {r: (sign, now) for r, (sign, _) in self._seen.items()}
                last, count = now, count + 1
                meeting.put("beat", str(count))
                self._replied = time.monotonic()
                if record := meeting.ended():
                    self._follow(record)
                elif (lost := self._lost(now)) is not None:
                    # what stood still itself knows nothing of the others
                    text = "" if self._stood_still else self._describe(lost)
                    meeting.end(1, lost, text, grace=0)
                    self._wake(lost)

    def _lost(self, now: float) -> int | None:
        """Return a process that has not counted for long."""
        meeting = self.meeting
        for r in range(meeting.world) if meeting.rank == 0 else [0]:
            sign = None if r == meeting.rank else meeting.get("beat", r)
            if sign is None:
                continue
            if r not in self._workers:
                self._workers[r] = meeting.get("worker", r) or ""
            if self._seen.get(r, ("", now))[0] != sign:
                self._seen[r] = sign, now
            if self.stall and now - self._seen[r][1] > self.stall and sign != LEFT:
                return r
        return None

    def _guard(self) -> None:
        """End this process where the store does not answer: a call to it may wait for ever."""
        last = self._replied
        while not self.meeting.closed.wait(TICK):
            now = time.monotonic()
            if now - last > 5 * TICK or not self.meeting.open.is_set():
                self._replied = now
            last = now
            if self.stall and now - self._replied > self.stall and not self._following:
                self._wake(0)
                self._exit(1, self._describe(0))

    def _describe(self, lost: int) -> str:
        host, _, number = self._workers.get(lost, "").rpartition(".")
        where = (
            f"process {number} on {host}" if host else f"{self.meeting.host}:{self.meeting.port}"
        )
        return (
            f"rank {lost} ({where}) has shown no sign of life for {self.stall:.0f} seconds: it stands "
            "still or is gone; repeat the command to go on from the newest checkpoint"
        )

    def _wake(self, lost: int) -> None:
        """Let a process of this machine that was suspended see that the job has ended."""
        host, _, number = self._workers.get(lost, "").rpartition(".")
        if host and host == worker().rpartition(".")[0]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(number), signal.SIGCONT)

    def _follow(self, record: dict[str, Any]) -> None:
        """End as another process asks for, once it has had the time to end before."""
        meeting, self._following = self.meeting, True
        if record["rank"] != meeting.rank:
            meeting.closed.wait(record["grace"])
        tells = record["text"] and stopping.asked() is None
        with contextlib.suppress(RuntimeError):  # the store has gone
            tells = tells and meeting.claim("told", str(meeting.rank))
            meeting.put("beat", LEFT)  # last: the store may go now
        self._exit(int(record["code"]), record["text"] if tells else "")

    def _exit(self, code: int, text: str) -> None:
        if self.ending or self.meeting.closed.is_set():
            return
        if text:
            print(f"\n{self.name}: {text}", file=sys.stderr)  # below a bar
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
