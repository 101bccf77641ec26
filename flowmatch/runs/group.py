"""The processes of one job, beside their tensors: they agree before the first step, and end together."""

import atexit
import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowmatch import config as configs
from flowmatch.config import UserError
from flowmatch.runs.files import worker
from flowmatch.runs.heartbeat import LEFT, STALL, Heartbeat
from flowmatch.runs.meeting import Meeting
from flowmatch.runs.process import leads, rank, world_size

JOIN = 1800.0  # seconds that the others wait for a process that has not come yet
PATIENCE = 5.0  # seconds that a process with a fault looks for the others, to say it once
LINGER = 4.0  # seconds that the process with the store waits for the others to read that it ends
GRACE = 30.0  # seconds that a process with a traceback has to end: its launcher names the first
# what gloo, NCCL and torch's store say of a process that is gone
BROKEN = re.compile(r"[Cc]onnection (reset|closed|refused)|[Bb]roken pipe|NCCL|remote process")

_job: "Job | None" = None


def join(name: str, stall: float = STALL) -> "Job | None":
    """Meet the other processes of the job, in the background.

    Args:
        name: Name of the stage, for what it prints.
        stall: Seconds without a sign of life after which a process counts as lost; 0: never.

    Returns:
        The job; None where this process is alone, or does not know where the others are.

    Raises:
        UserError: The port where they meet is taken.
    """
    global _job
    place = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if _job is None and world_size() > 1 and place[0] and place[1].isdecimal():
        _job = Job(name, stall)
    return _job


def tells(name: str, lines: list[str]) -> bool:
    """Tell whether this process is the one that prints a fault: the first of those that have it."""
    with contextlib.suppress(UserError):  # the port is taken
        if job := join(name):
            return job.is_first(lines)
    return True


def end(code: int, text: str = "") -> None:
    """End the other processes of the job, which has failed here or was stopped.

    Args:
        code: What they exit with.
        text: What one of them prints.
    """
    if _job is not None:
        _job.end(code, text)


def ended(patient: bool = False) -> int | None:
    """Return what this process exits with because another one has ended the job.

    patient: Return once that one has had the time to end first.
    """
    record = _job.meeting.ended() if _job is not None else None
    if record is None or record["rank"] == rank():
        return None
    time.sleep(record["grace"] if patient else 0)
    return int(record["code"])


def lost(error: Exception) -> str:
    """Name the process whose end has broken a connection of this one.

    Processes of this machine are looked up. One of another machine has the time to show a sign of life
    again; after that the heartbeat names it, and ends this process.

    Returns:
        What has happened; empty where the error is another one, or all others live.
    """
    if _job is None or not BROKEN.search(str(error)):
        return ""
    return _job.find_lost()


def leave() -> None:
    """Stop to watch: what is left to do takes this process alone."""
    if _job is not None:
        _job.leave()


def speaks() -> str:
    """Return what stands before a line of this process: its rank, where there are several."""
    return f"rank {rank()}: " if world_size() > 1 or not leads() else ""


def lives(number: int) -> bool:
    """Tell whether a process of this machine runs; a zombie does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


class Job:
    """This process's line to the others.

    Args:
        name: Name of the stage, for what it prints.
        stall: Seconds without a sign of life after which a process counts as lost; 0: never.
    """

    def __init__(self, name: str, stall: float):
        self.name, self.meeting = name, Meeting()
        self.places: dict[int, str] = {}  # rank -> HOST.PID
        self.heartbeat = Heartbeat(name, self.meeting, stall)
        atexit.register(self.heartbeat.stop)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Check that all processes have the same facts.

        Args:
            facts: What decides the result, by name.

        Raises:
            UserError: This process differs from rank 0, or one has not come.
        """
        meeting, text = self.meeting, json.dumps(facts, sort_keys=True)
        self._wait_for(lambda: ["rank 0"], meeting.open.is_set)
        if not meeting.claim(f"process/{meeting.rank}", worker()):
            raise UserError(f"RANK={meeting.rank} is that of another process of the job, too")
        meeting.put("facts", text)
        meeting.put("digest", hashlib.sha256(text.encode()).hexdigest())

        def missing() -> list[str]:
            return [f"rank {r}" for r in range(meeting.world) if meeting.get("digest", r) is None]

        self._wait_for(missing, lambda: meeting.all_put("digest"))
        digests = meeting.get_all("digest")
        self.places = {r: meeting.get("worker", r) or "" for r in range(meeting.world)}
        if digests[meeting.rank] != digests[0]:
            theirs = json.loads(meeting.get("facts", 0) or "{}")
            raise UserError(
                ["differs from rank 0, and would train the same model on other terms:"]
                + [f"  {line}" for line in configs.differences(theirs, json.loads(text))]
            )
        if others := [r for r, digest in enumerate(digests) if digest != digests[0]]:
            time.sleep(PATIENCE)  # its own line ends this process
            raise UserError(f"rank {others[0]} differs from rank 0")

    def _wait_for(self, missing: Callable[[], list[str]], ready: Callable[[], bool]) -> None:
        began, told, pause = time.monotonic(), False, 0.02
        while not ready():
            waited = time.monotonic() - began
            if waited > JOIN:
                raise UserError(f"{', '.join(missing())}: not there after {JOIN / 60:.0f} minutes")
            if waited > 60 and not told:
                told = True
                line = f"{self.name}: {speaks()}waits for {', '.join(missing())}"
                print(line, file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)

    def is_first(self, lines: list[str]) -> bool:
        """Tell whether no other process has had the same fault before."""
        self.heartbeat.ending, meeting = True, self.meeting
        if meeting.closed.is_set() or not meeting.open.wait(PATIENCE):
            return True
        key = f"said/{hashlib.sha256(repr(lines).encode()).hexdigest()}"
        with contextlib.suppress(RuntimeError):
            return meeting.claim(key, str(meeting.rank))
        return True

    def find_lost(self) -> str:
        """Name a process that is gone: see `lost`."""
        meeting, stall = self.meeting, self.heartbeat.stall
        own, _, _ = worker().rpartition(".")
        deadline = time.monotonic() + (stall + 5 if stall else 0)
        while True:
            far = False
            for r in range(meeting.world):
                with contextlib.suppress(RuntimeError):  # the store has gone with rank 0
                    self.places[r] = self.places.get(r) or meeting.get("worker", r) or ""
                host, _, number = self.places.get(r, "").rpartition(".")
                far = far or host != own
                if host == own and not lives(int(number)):
                    return f"rank {r} (process {number} on {host}) is gone"
            if not far or meeting.ended() or time.monotonic() > deadline:
                return ""
            time.sleep(0.5)

    def end(self, code: int, text: str) -> None:
        """End the other processes: see `end`."""
        self.heartbeat.ending, meeting = True, self.meeting
        if meeting.closed.is_set() or not meeting.open.wait(PATIENCE):
            return
        launched = "TORCHELASTIC_RUN_ID" in os.environ  # else nobody asks which was the first
        with contextlib.suppress(RuntimeError):
            meeting.end(code, meeting.rank, text, GRACE if code == 1 and launched else 0.2)
            meeting.put("beat", LEFT)
            deadline = time.monotonic() + LINGER
            while meeting.serves and time.monotonic() < deadline and not self._all_left():
                time.sleep(0.1)  # the others ask the store of this process
        self.heartbeat.stop()

    def _all_left(self) -> bool:
        return self.meeting.all_put("beat") and set(self.meeting.get_all("beat")) == {LEFT}

    def leave(self) -> None:
        """Show the others that this process needs them no more."""
        self.heartbeat.stop()
        if self.meeting.open.is_set():
            with contextlib.suppress(RuntimeError):
                self.meeting.put("beat", LEFT)
