"""A module whose files may not grow beyond a limit, as on a full disk: tests.limited BYTES MODULE ..."""

import resource
import runpy
import sys

if __name__ == "__main__":
    limit, module, *sys.argv[1:] = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
