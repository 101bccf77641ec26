"""Figures of the training loop: flowmatch.fit and the bare loop, a segment each in turn.

As a process of its own: python -m scripts.bench.training two|memory_ours|memory_bare FOLDER DEVICE QUICK
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flowmatch.flow import coupling, objectives
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.models import flops, networks
from flowmatch.models.config import NetConfig
from flowmatch.pairs import mixture
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import process
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import RunFolder
from flowmatch.training import loop
from flowmatch.training.config import FitConfig
from scripts.bench.yardsticks import (
    BareLoop,
    Figure,
    Load,
    load_for,
    python,
    summary,
    synchronise,
    write_set,
)


class Turns:
    """The loop's segments and the bare loop's in turn: called whenever the loop has read its loss."""

    def __init__(self, bare: BareLoop, steps: int):
        self.bare, self.steps = bare, steps
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.waits: list[float] = []
        self.began = time.perf_counter()

    def turn(self, step: int, values: dict[str, float]) -> None:
        """Close our segment, run a bare one on every process at once, open ours again."""
        self.ours.append(time.perf_counter() - self.began)
        self.waits.append(values["waited"])
        together()
        began = time.perf_counter()
        self.bare.steps(self.steps)
        self.theirs.append(time.perf_counter() - began)
        together()
        self.began = time.perf_counter()


def together() -> None:
    """Let all processes go on at once."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def fit(
    folder: Path,
    load: Load,
    net: Any,
    device: str,
    segments: int,
    on_log: loop.OnLog | None = None,
) -> None:
    """Train as stage three does, from the pairs in folder/set; nothing is saved before the end."""
    values: dict[str, Any] = {"compile": True} if load.compile else {}
    config = FitConfig(
        steps=load.steps * segments,
        batch_size=load.batch * process.world_size(),
        warmup=0,
        lr=1e-4,
        precision=load.precision,
        log_every=load.steps,
        save_every=10**9,
        **values,
    )
    stream = mixture.Mixture([(PairData(folder / "set"), 1.0)], config.batch_size, 0)
    name = "fit" if process.world_size() > 1 else f"fit{os.getpid()}"
    place = StageConfig(run_dir=str(folder / name))
    with RunFolder("reflow", place, {}) as opened:
        times, goal = TimesConfig(), objectives.build(ObjectiveConfig(), LossConfig())
        words = (net, stream, coupling.stored, opened, config, times, goal)
        loop.fit(*words, seed=0, device=device, on_log=on_log)


def turns(folder: Path, load: Load, device: str) -> Turns:
    """Train by flowmatch and by the bare loop, a segment each in turn."""
    net = networks.build(NetConfig(**load.net), load.shape, None, 0)
    both = Turns(BareLoop(net, load, process.worker_device(device)), load.steps)
    fit(folder, load, net, device, load.rounds + 2, both.turn)
    for times in (both.ours, both.theirs, both.waits):
        del times[:2]  # they warm up, and compile
    return both


def training(folder: Path, load: Load, device: str) -> dict[str, Figure]:
    """Time the training step, and the wait for pairs in it."""
    write_set(folder / "set", load.shape, load.pairs)
    both = turns(folder, load, device)
    ratios = [a / b for a, b in zip(both.ours, both.theirs, strict=True)]
    waits = [wait / whole for wait, whole in zip(both.waits, both.ours, strict=True)]
    seconds = summary(both.ours)["median"] / load.steps
    more: dict[str, Any] = {"seconds": seconds, "images_per_second": load.batch / seconds}
    if device == "cuda":
        more |= utilisation(load, seconds)
    return {
        "training step": summary(ratios)
        | {"target": "at most 1.05", "what": "time, ours / bare loop"}
        | more,
        "waiting for pairs": summary(waits)
        | {"target": "at most 0.02", "what": "share of a training step"},
    }


def utilisation(load: Load, seconds: float) -> dict[str, float]:
    """Model FLOP utilisation of a training step: 3 forwards' FLOPs over the GPU's dense bf16 peak."""
    from torch.utils.flop_counter import FlopCounterMode

    net = networks.build(NetConfig(**load.net), load.shape, None, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *load.shape), torch.zeros(1))
    peak = flops.peak_of(torch.cuda.get_device_name(), load.precision)
    rate = 3 * load.batch * counter.get_total_flops() / seconds
    return {"tflops": rate / 1e12} | ({"mfu": rate / peak} if peak else {})


def processes(folder: Path, load: Load, device: str) -> dict[str, Figure]:
    """Time two training processes beside two bare loops at once (or all GPUs, where there are more)."""
    gpus = torch.cuda.device_count()
    number, where = (gpus, device) if gpus > 1 else (2, "cpu")
    quick = load.rounds < 5
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2.yaml"]
    launch += [
        "--num_processes",
        str(number),
        "--main_process_port",
        "0",
        "-m",
        "scripts.bench.training",
    ]
    write_set(folder / "set", load_for(where, quick).shape, load.pairs)
    python(*launch, "two", str(folder), where, str(int(quick)), OMP_NUM_THREADS="1")
    ours, theirs = json.loads((folder / "two.json").read_text())
    return {
        f"{number} processes": summary([b / a for a, b in zip(ours, theirs, strict=True)])
        | {
            "target": "at least 0.93",
            "what": f"speed, ours / {number} bare loops at once, 1 thread each",
        }
    }


def memory(folder: Path, load: Load, device: str) -> dict[str, Figure]:
    """Compare the peak memory of training processes, ours and the bare loop's."""
    write_set(folder / "set", load.shape, load.pairs)
    quick, peaks = str(int(load.rounds < 5)), []
    for _ in range(1 if load.rounds < 5 else 3):
        for which in ("memory_ours", "memory_bare"):
            out = python("-m", "scripts.bench.training", which, str(folder), device, quick)
            peaks.append(float(out.split()[-1]))
    ours, bare = peaks[::2], peaks[1::2]
    what = "peak of a training process, ours / bare loop"
    return {
        "memory": summary([a / b for a, b in zip(ours, bare, strict=True)])
        | {"target": "", "what": what, "mb": summary(ours)["median"]}
    }


def main(which: str, folder: Path, device: str, quick: bool) -> None:
    """Do the part of a figure that needs processes of its own."""
    load = load_for(device, quick)
    if which == "two":
        both = turns(folder, load, device)
        if process.leads():
            (folder / "two.json").write_text(json.dumps([both.ours, both.theirs]))
        return
    net = networks.build(NetConfig(**load.net), load.shape, None, 0)
    if which == "memory_ours":
        fit(folder, load, net, device, 2)
    else:
        BareLoop(net, load, device).steps(2 * load.steps)
    synchronise(device)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(kib / 1024 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")
