"""A stage in several real processes that are watched and, on request, die.

accelerate launch ... -m tests.ranks CONFIG.yaml key=value ...         (stage one)

FAULT=KIND:RANK:STEP makes a rank, before that update, send itself SIGKILL (kill), raise (raise) or
poison a gradient (nan); save:0:STEP kills it in the middle of writing the checkpoint of a step.
"""

import multiprocessing
import os
import signal
import socket
import sys
import weakref
from pathlib import Path

from flowmatch.runs import command, process
from flowmatch.training import loop, state
from pipelines import finish, generate_pairs, reflow, train_flow

STAGES = {
    module.STAGE.name: module.STAGE for module in (finish, generate_pairs, reflow, train_flow)
}
WRAPPERS = []


def opened(self, *words, inner=state.State.__init__):
    """Watch what `prepare` wrapped; make this rank's fault."""
    inner(self, *words)
    if self.model is not self.net:
        WRAPPERS.append(weakref.ref(self.model))
    kind, rank, step = os.environ.get("FAULT", ":-1:").split(":")
    if int(rank) != process.rank():
        return
    if kind == "save":
        return half(int(step))
    update = self.update

    def faulty(*words):
        if self.step == int(step):
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "raise":
                raise OSError("the cause of it all")
            gradient = self.parameters[0].grad
            getattr(gradient, "to_local", lambda: gradient)()[0].fill_(float("nan"))
            counted = update(*words)
            for tensor in [*self.net.state_dict().values(), *self.averaged("net").values()]:
                assert getattr(tensor, "to_local", lambda t=tensor: t)().isfinite().all()
            return counted
        return update(*words)

    self.update = faulty


def half(step):
    """Die when half of the checkpoint of a step is written."""
    import safetensors.torch

    save = safetensors.torch.save_file

    def save_file(tensors, path, **more):
        save(tensors, path, **more)
        path = Path(path)
        if path.parent.name == f"step_{step:08d}" and path.name.startswith("optimizer"):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = save_file


def started(*words, inner=process.start_accelerator, **options):
    """Let the Accelerator refuse to end while a wrapper is alive."""
    accelerator = inner(*words, **options)
    end = accelerator.end_training

    def ended():
        assert not any(ref() for ref in WRAPPERS), "a wrapper outlives its process group"
        end()

    accelerator.end_training = ended
    return accelerator


def main(name="train_flow"):
    """Run a stage on the words of the command line."""
    state.State.__init__ = opened
    loop.start_accelerator = started
    command.main(STAGES[name])


def _rank(number, world, port, name, argv, log, environment):
    os.environ.update(environment, RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv[1:] = argv
    main(name)


def free_port():
    """Find a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(world, argv, log, name="train_flow", **environment):
    """Start ranks as forks of a process that has imported what they need; the output goes to a log."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks", "flowmatch.models.mlp", "accelerate"])
    words = (world, free_port(), name, argv, str(log), environment)
    ranks = [context.Process(target=_rank, args=(i, *words), daemon=True) for i in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


if __name__ == "__main__":
    main()
