"""A stage from the command line to its plan: errors as exit codes, one folder, one content.

Resume means: repeat the command. The same content resumes, a sealed folder says so and is left alone,
other content is an error that lists the keys.
"""

import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from flowmatch import config as configs
from flowmatch.config import NotReady, UserError
from flowmatch.runs.config import PREEMPTED, REFUSED, USER_ERROR, StageConfig
from flowmatch.runs.process import has_log, say

S = TypeVar("S", bound=StageConfig)


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind a stage that has nothing to save, and exit 75."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(PREEMPTED)

    signal.signal(signal.SIGTERM, leave)


def heed_sigterm() -> Callable[[], None]:
    """Note SIGTERM from now on; the call returned exits 75 once it came.

    For a stage that holds leases: between making one and knowing of it, nothing may unwind.
    """
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: asked.set())

    def look() -> None:
        if asked.is_set():
            sys.exit(PREEMPTED)

    return look


def command(name: str, model: type[S], body: Callable[[S, bool], None], summary: str) -> None:
    """Run a stage from the command line: `body(config, dry_run)` with its errors as exit codes."""
    argv = sys.argv[1:]
    try:
        config, call = configs.load(model, argv)
        if config is None:
            say(configs.usage(model, name, summary))
            return
        body(config, call.dry_run)
    except NotReady as error:
        if "--dry-run" not in argv:
            _fail(name, error)
        for line in error.faults:
            say(f"{name}: later: {line}")
    except UserError as error:
        _fail(name, error)
    except Exception as error:
        # safetensors' own error, which is no OSError, has the number in its words
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number not in REFUSED:
            raise
        again = (
            "free space there or make it writable, and repeat the command: what is whole is kept"
        )
        _fail(name, UserError(f"the disk refuses: {error}; {again}"))


def _fail(name: str, error: UserError) -> None:
    if has_log():
        for line in error.faults:
            print(f"{name}: {line}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)
