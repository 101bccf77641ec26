"""A fresh process, in which an export is loaded as its users load it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flowmatch.config import UserError

start: Any = subprocess.Popen  # fast tests put forks of a process with diffusers in its place


class Fresh:
    """A fresh process that cannot import flowmatch and samples the export.

    It is started first and given its task last, so that it imports diffusers while the folder is
    written. A context manager: it never outlives its block.
    """

    def __init__(self, cpu: bool = True) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        program = Path(__file__).with_name("sample_fresh.py")
        environment = {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": f"{self.scratch.name}/modules",  # other folders ship a pipeline.py, too
            "OMP_NUM_THREADS": "1",
        }
        if cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.process = start(
            [sys.executable, str(program)],
            cwd=self.scratch.name,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Fresh":
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        self.scratch.cleanup()

    def sample(self, task: dict[str, Any]) -> Any:
        """Run a task; return its samples: steps -> name -> [samples, ...]. Raises UserError."""
        import torch

        _, err = self.process.communicate(json.dumps(task))
        if self.process.returncode:
            raise UserError(
                "a fresh process could not load or sample the export: "
                f"{(err.strip().splitlines() or ['it ended without a word'])[-1]}"
            )
        return torch.load(Path(self.scratch.name) / "samples.pt", weights_only=True)
