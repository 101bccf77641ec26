"""The processes of a stage, as children of the chain: they end when it does, and hear its signals."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flowmatch.runs import command, stopping
from flowmatch.runs.command import Stage
from flowmatch.runs.config import PREEMPTED

PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent ends


def fork(body: Callable[[], int]) -> int:
    """Run a body in a forked process of a group of its own, which ends with this one.

    Returns:
        Its number.
    """
    chain = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        stopping.forget()
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        if sys.platform == "linux":  # also when the chain is killed
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == chain:
            code = body()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code % 256)


def ranks(stage: Stage, words: list[str], count: int) -> int:
    """Run the ranks of a stage as forks of this process, which has imported their libraries."""
    from torch.multiprocessing import ProcessExitedException, start_processes

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if count > 1:
            os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            command.main(stage, words)
        except Exception:  # which the first rank to end would hide
            traceback.print_exc()
            sys.exit(1)

    signal.signal(signal.SIGTERM, _pass_on)  # the ranks save
    try:
        start_processes(rank, nprocs=count, start_method="fork")
    except ProcessExitedException as error:
        return error.exit_code if error.exit_code >= 0 else 128 - error.exit_code
    return 0


def accelerate(file: str, module: str, words: list[str], variables: dict[str, str]) -> int:
    """Start a module by `accelerate launch`, in this process, which has imported torch already."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.clear()
    os.environ.update(variables)
    options = ["--config_file", file, "--module", module, *words]
    signal.signal(signal.SIGTERM, _pass_on)  # until the launcher of several takes it over
    try:
        launch_command(launch_command_parser().parse_args(options))
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except SignalException:
        return PREEMPTED
    return 0


def _pass_on(number: int, frame: Any) -> None:
    """Hand SIGTERM to the processes of this group, and wait for them as before."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    signal.signal(signal.SIGTERM, _pass_on)


class Signals:
    """Signals to the chain: those that ask it to stop go on to the stage as SIGTERM, which saves.

    After one of them, or SIGUSR2, no further stage starts. A second Ctrl-C kills the stage. asked:
    whether one of them came.
    """

    def __init__(self) -> None:
        self.asked, self.interrupted, self.child = False, False, 0

    def __enter__(self) -> "Signals":
        self.before = {n: signal.signal(n, self._on_signal) for n in self.numbers()}
        return self

    @staticmethod
    def numbers() -> list[signal.Signals]:
        """List the signals that the chain answers."""
        return [*stopping.heard_signals(), signal.SIGUSR2]

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        stopping.drop_dead_outputs()
        again = number == signal.SIGINT and self.interrupted
        self.asked, self.interrupted = True, self.interrupted or number == signal.SIGINT
        if self.child and number != signal.SIGUSR2:
            with suppress(ProcessLookupError):
                os.killpg(self.child, signal.SIGKILL if again else signal.SIGTERM)
        if again:
            stopping.die_of_sigint()

    def wait(self, child: int) -> int:
        """Wait for a process group; return the exit status of its first process."""
        self.child = child
        if self.asked:  # it came while the process was started
            self._on_signal(signal.SIGTERM, None)
        _, status = os.waitpid(child, 0)
        self.child = 0
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code
