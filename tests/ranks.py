"""Stage one in several real processes that are watched and, on request, die.

accelerate launch ... -m tests.ranks CONFIG.yaml key=value ...

FAULT=kill:RANK:STEP sends a rank SIGKILL before an update, FAULT=raise:RANK:STEP lets it raise.
"""

import os
import signal
import weakref

from flowmatch import fit, run, stage, state
from pipelines import train_flow

WRAPPERS = []


def opened(self, *words, inner=state.State.__init__):
    """Watch what `prepare` wrapped; make this rank's fault."""
    inner(self, *words)
    WRAPPERS.append(weakref.ref(self.model))
    kind, rank, step = os.environ.get("FAULT", ":-1:").split(":")
    if int(rank) != stage.rank():
        return
    update = self.update

    def faulty(*words):
        if self.step == int(step):
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the cause of it all")
        return update(*words)

    self.update = faulty


def started(*words, inner=run.start_accelerator, **options):
    """Let the Accelerator refuse to end while a wrapper is alive."""
    accelerator = inner(*words, **options)
    end = accelerator.end_training

    def ended():
        assert [ref() for ref in WRAPPERS] == [None], "a wrapper outlives its process group"
        end()

    accelerator.end_training = ended
    return accelerator


if __name__ == "__main__":
    state.State.__init__ = opened
    fit.start_accelerator = started
    stage.command("train_flow", train_flow.FlowConfig, train_flow.main, train_flow.__doc__)
