"""A stage with little memory, which may kill itself at its Nth touch of a file in its working directory.

tests.forked runs it as scripts.torture.child N COUNTED MODULE WORD ...; N = 0: never. COUNTED is a file
that gets the number of touches at the end, or `-`.
"""

import atexit
import os
import resource
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

MEMORY = (
    8 << 30
)  # bytes of address space: what asks for more gets an error, not the machine's memory
SECONDS = 300  # of processor time
TOUCHES = {
    *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir"),
    *("os.scandir", "os.link", "shutil.rmtree", "os.chmod"),
}


class Touches:
    """Counts the touches, and kills the process just before the Nth."""

    def __init__(self, last: int):
        self.last, self.count, self.root = last, 0, os.getcwd()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in TOUCHES or not isinstance(arguments[0], str | os.PathLike):
            return
        place = os.fspath(arguments[0])
        if isinstance(place, str) and (place[:1] != "/" or place.startswith(self.root)):
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    last, counted, module, *sys.argv[1:] = sys.argv[1:]
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS)):
        resource.setrlimit(limit, (value, value))
    touches = Touches(int(last))
    if counted != "-":
        target, write = Path(counted).absolute(), Path.write_text
        atexit.register(lambda: write(target, str(touches.count)))
    sys.addaudithook(touches)
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
