"""Stage three as a process that writes down which pairs it reads: RECORD names the folder.

accelerate launch ... -m tests.recorded CONFIG.yaml key=value ...
"""

import json
import os
import time
from pathlib import Path

import numpy as np

from flowmatch.pairs.dataset import PairData
from flowmatch.runs import command, process
from pipelines import reflow


def batch(self, ids, inner=PairData.batch):
    """Write the ids down, whole line by whole line, before they are read; slow enough to be killed."""
    time.sleep(0.02)
    with open(Path(os.environ["RECORD"]) / f"{process.rank()}.jsonl", "a") as file:
        file.write(json.dumps(np.asarray(ids).tolist()) + "\n")
    return inner(self, ids)


if __name__ == "__main__":
    PairData.batch = batch
    (Path(os.environ["RECORD"]) / f"{process.rank()}.pid").write_text(str(os.getpid()))
    command.main(reflow.STAGE)
