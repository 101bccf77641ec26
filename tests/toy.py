"""A stage without a network, whose processes form a job: `python -m tests.toy key=value`.

It meets, plans, agrees and waits for a signal as the stages of training do.
"""

import errno
import hashlib
import os
import signal
import time

import numpy as np

from flowmatch.config import Config, NotReady, UserError, option
from flowmatch.runs import command, group, heartbeat, process, stopping
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import Plan, RunFolder


class Fit(Config):
    save_every: int = option(5, "interval", run=True)
    stall_seconds: float = option(30.0, "silence", run=True)


class ToyConfig(StageConfig):
    lr: float = option(0.1, "rate", gt=0)
    batch_size: int = option(8, "what decides how much memory is needed")
    fit: Fit = option(Fit(), "what all processes must have alike")
    fault: str = option("", "what goes wrong, and :RANK where", run=True)
    sleep: float = option(0.0, "seconds that a plan takes", run=True)
    saves: bool = option(True, "whether there is something to save", run=True)
    steps: int = option(10**9, "steps of a twentieth of a second", run=True)


def happens(config, moment):
    """Make the fault of a moment, on the rank that has it."""
    fault, _, where = config.fault.partition(":")
    if where and int(where) != process.rank():
        return
    if fault == moment:
        raise UserError(["first", "second"])
    if moment == "plan" and fault == "input":
        raise NotReady("teacher=x does not exist")
    if moment == "plan" and fault.startswith("E"):
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number))
    if fault == f"memory-{moment}":
        np.empty(1 << 59)
    if moment == "run" and fault == "bug":
        raise RuntimeError("a bug")


def plan(config):
    if config.sleep:
        print("plans", flush=True)
        time.sleep(config.sleep)
    happens(config, "plan")
    return Plan(config, {}, [])


def run(plan):
    config = plan.config
    with RunFolder("toy", config, {}), stopping.heard("toy", defer=config.saves):
        print(f"ready {process.rank()} {process.world_size()}", flush=True)
        happens(config, "run")
        if config.fault == "stuck":  # where Python hears no signal
            while not stopping.asked():
                time.sleep(0.05)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        if config.fault == "slow":  # one long step of Python
            end = time.monotonic() + 2 * config.fit.stall_seconds
            while time.monotonic() < end:
                pass
        for step in range(config.steps):
            if stopping.asked():
                stopping.leave(f" at step {step}")
            time.sleep(0.05)


STAGE = command.Stage("toy", ToyConfig, plan, run, "A toy.", grouped=True)

if __name__ == "__main__":
    heartbeat.TICK, group.LINGER, group.PATIENCE = 0.2, 2.0, 2.0
    if "NOHUP" in os.environ:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    command.main(STAGE)
