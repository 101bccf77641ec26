"""Signals that ask a process to stop: it saves what it has, says so, and exits with 75.

SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP mean the same. Where there is something to save they are deferred,
and the stage asks `asked()`; everywhere else they unwind it at once. A second Ctrl-C kills.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from flowmatch.runs.config import PREEMPTED
from flowmatch.runs.process import say

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(SystemExit):
    """A stage leaves after a signal, with 75. line: what the outermost `heard` says."""

    def __init__(self, line: str):
        super().__init__(PREEMPTED)
        self.line = line


class _State:
    """What was asked for, by which signal, and what to do then."""

    name = ""
    asked: signal.Signals | None = None
    deferred = False
    depth = 0


_state = _State()


@contextmanager
def heard(name: str, defer: bool = False) -> Iterator[None]:
    """Listen to the signals inside the block.

    Args:
        name: Name of the stage, for the line that it prints.
        defer: Only note them; the block asks `asked` and leaves by itself.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers belong to that one
        yield
        return
    outer = _state.name, _state.deferred
    _state.name, _state.deferred, _state.depth = name, defer, _state.depth + 1
    handlers = {number: signal.signal(number, _on_signal) for number in heard_signals()}
    try:
        yield
    except Stopped as stopped:
        if _state.depth == 1:
            say(stopped.line)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        (_state.name, _state.deferred), _state.depth = outer, _state.depth - 1
        if not _state.depth:
            _state.asked = None


def forget() -> None:
    """Hear nothing, as a new program: for a fork of a process that is inside `heard`."""
    global _state
    for number in heard_signals():
        signal.signal(number, signal.SIG_DFL)
    _state = _State()


def heard_signals() -> list[signal.Signals]:
    """List the signals that mean "stop"; SIGHUP does not where `nohup` has switched it off."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOPS if number != signal.SIGHUP or not nohup]


def asked() -> signal.Signals | None:
    """Return the signal that has asked this process to stop."""
    return _state.asked


def leave(where: str = "", number: signal.Signals | None = None) -> NoReturn:
    """Unwind the stage, to exit with 75 and a line. where: it stopped. number: of another process."""
    number = number or _state.asked or signal.SIGTERM
    raise Stopped(f"{_state.name}: stopped by {number.name}{where}; repeat the command to go on")


def leave_if_asked() -> None:
    """Leave if a signal has come."""
    if _state.asked is not None:
        leave()


def _on_signal(number: int, frame: FrameType | None) -> None:
    drop_dead_outputs()
    if _state.asked is not None:
        if number == signal.SIGINT:
            die_of_sigint()
        return
    _state.asked = signal.Signals(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once, even inside a call of a library
    if not _state.deferred:
        leave()


def die_of_sigint() -> None:
    """End as an interrupted program does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def drop_dead_outputs() -> None:
    """Send stdout and stderr nowhere if their terminal or reader has gone: printing would fail."""
    for file in (1, 2):
        poll = select.poll()
        poll.register(file, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file)
            os.close(nowhere)


def watch_launcher(name: str) -> None:
    """Stop as after SIGTERM when the process that started this one ends.

    A launcher that is killed tells its processes nothing. They save rather than just end: the work since
    the newest checkpoint is then not lost.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        drop_dead_outputs()
        say(f"\n{name}: the launcher, process {parent}, has ended")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
