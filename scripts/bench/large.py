"""Figures of a text transformer: with all weights, with an adapter, and split over two processes.

As a process of its own: python -m scripts.bench.large sharded|ours|bare FOLDER DEVICE QUICK
"""

import contextlib
import copy
import itertools
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmatch.flow import coupling, objectives
from flowmatch.flow.config import LossConfig, ObjectiveConfig, TimesConfig
from flowmatch.models import adapters
from flowmatch.models.config import LoraConfig
from flowmatch.models.script import Script
from flowmatch.models.text_velocity import TextVelocity
from flowmatch.pairs import mixture
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import process
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import RunFolder
from flowmatch.training import loop, rehearsal, state
from flowmatch.training.config import FitConfig
from scripts.bench.training import together
from scripts.bench.yardsticks import Figure, Load, python, summary, synchronise, write_set

RANK, TOKENS = 16, 77


@dataclass(frozen=True)
class Size:
    """A transformer of Stable Diffusion 3's class, and what it is trained with."""

    width: int  # in heads of 64
    layers: int
    side: int  # of the latents
    batch: int
    steps: int  # of a segment
    rounds: int


def size_for(device: str, quick: bool) -> Size:
    """Choose the size: 50M parameters on a CPU, 2.2 billion on a GPU, or a few for a quick look."""
    if quick:
        return Size(1, 1, 8, 2, 1, 2)
    return Size(8, 8, 16, 2, 2, 5) if device == "cpu" else Size(24, 24, 128, 4, 5, 7)


def build(size: Size) -> Any:
    """Build the network."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=size.side,
        num_layers=size.layers,
        attention_head_dim=64,
        num_attention_heads=size.width,
        caption_projection_dim=64 * size.width,
        joint_attention_dim=64 * size.width,
        pooled_projection_dim=64,
        pos_embed_max_size=size.side,
    )


class Fixed:
    """Conditions that are the same for all prompts."""

    count = 1

    def __init__(self, size: Size, device: str):
        self.text = torch.randn(1, TOKENS, 64 * size.width, device=device)
        self.pooled = torch.randn(1, 64, device=device)

    def rows(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the network."""
        n = len(ids)
        text, pooled = self.text.expand(n, -1, -1), self.pooled.expand(n, -1)
        return {"encoder_hidden_states": text, "pooled_projections": pooled}


def field_of(size: Size, device: str) -> Any:
    """Return what makes the velocity of the network."""
    shape = (16, size.side, size.side)
    script = Script("", "transformer", "hidden_states", shape, time="timestep", slope=1000.0)
    table = Fixed(size, device)
    return lambda net: TextVelocity(net, script, table)


class Bare:
    """A loop of torch and peft as one writes it: all weights, an adapter, or split by fully_shard."""

    def __init__(self, net: Any, size: Size, device: str, shard: bool = False):
        self.net, self.device = net.to(device).train(), device
        if shard:
            from torch.distributed.fsdp import fully_shard

            for block in [*net.transformer_blocks, net]:
                fully_shard(block)
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        shape = (size.batch, 16, size.side, size.side)
        self.x, self.target = torch.randn(shape, device=device), torch.randn(shape, device=device)
        self.timestep = 1000 * torch.rand(size.batch, device=device)
        self.conditions = Fixed(size, device).rows(torch.zeros(size.batch))
        self.half = device != "cpu"

    def steps(self, n: int) -> None:
        """Make n updates and wait for the device."""
        for _ in range(n):
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, self.half):
                out = self.net(self.x, timestep=self.timestep, **self.conditions).sample
            torch.nn.functional.mse_loss(out.float(), self.target).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)
            with torch.no_grad():
                gaps = torch._foreach_sub(self.ema, self.parameters)
                torch._foreach_sub_(self.ema, gaps, alpha=1e-3)
        synchronise(self.device)


def config_of(size: Size, device: str, **values: Any) -> FitConfig:
    """Return the training loop of a run."""
    return FitConfig(
        steps=size.steps * (size.rounds + 2),
        batch_size=size.batch * process.world_size(),
        warmup=0,
        lr=1e-4,
        precision="fp32" if device == "cpu" else "bf16",
        log_every=size.steps,
        **{"save_every": 10**9} | values,
    )


class Stopped(Exception):
    """All segments are done."""


def fit(folder: Path, size: Size, net: Any, device: str, on_log: Any, **values: Any) -> None:
    """Train as stage three does, until `on_log` raises Stopped."""
    config = config_of(size, device, **values)
    train(folder, size, net, device)(folder / f"fit{values}", config, on_log)


def train(folder: Path, size: Size, net: Any, device: str) -> Any:
    """Return what trains a network in a folder by a config."""
    there = process.worker_device(device)

    def run(place: Any, config: FitConfig, on_log: Any) -> None:
        stream = mixture.Mixture([(PairData(folder / "set"), 1.0)], config.batch_size, 0)
        times, goal = TimesConfig(), objectives.build(ObjectiveConfig(), LossConfig())
        how: dict[str, Any] = {"seed": 0, "device": device, "field": field_of(size, there)}

        def go(opened: RunFolder) -> None:
            words = (labelled(stream), coupling.stored, opened, config, times, goal)
            loop.fit(net, *words, on_log=on_log, **how)

        if isinstance(place, RunFolder):
            return go(place)
        with RunFolder("reflow", StageConfig(run_dir=str(place)), {}) as opened:
            with contextlib.suppress(Stopped):
                go(opened)

    return run


def labelled(stream: Any) -> Any:
    """Give the pairs of a stream prompt 0."""
    return lambda counters: (
        stream(counters) | {"label": torch.zeros(len(counters), dtype=torch.long)}
    )


class Turns:
    """Our segments and the bare loop's in turn, called whenever our loop has read its loss."""

    def __init__(self, bare: Bare, size: Size, device: str):
        self.bare, self.size, self.device = bare, size, device
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.began = 0.0

    def turn(self, step: int, values: dict[str, float]) -> None:
        """Close our segment, run a bare one, open ours again."""
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        self.ours.append(clock() - self.began)
        together()
        began = clock()
        self.bare.steps(self.size.steps)
        self.theirs.append(clock() - began)
        together()
        if len(self.ours) == self.size.rounds + 2:
            raise Stopped
        self.began = clock()

    def ratios(self) -> list[float]:
        """Return ours over theirs, a segment; the first two warm up."""
        return [a / b for a, b in zip(self.ours[2:], self.theirs[2:], strict=True)]


def large(folder: Path, load: Load, device: str) -> dict[str, Figure]:
    """Time steps of a text transformer beside bare loops of torch and peft."""
    quick = load.rounds < 5
    size = size_for(device, quick)
    write_set(folder / "set", (16, size.side, size.side), 64)
    net = build(size)
    count = sum(p.numel() for p in net.parameters())
    found: dict[str, Figure] = {}
    for name, lora, target in (("all weights", False, 1.05), ("an adapter", True, 1.03)):
        ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
        for one in (ours, theirs) if lora else ():
            adapters.add(one, LoraConfig(rank=RANK), 0)
        turns = Turns(Bare(theirs, size, device), size, device)
        fit(folder, size, ours, device, turns.turn, keep=1 + lora)
        found[f"text transformer, {name}"] = summary(turns.ratios()) | {
            "target": f"at most {target}",
            "what": f"time of a step, ours / bare loop; {count / 1e6:.0f}M parameters",
        }
    found |= planned(folder, size, net, device) | memory(folder, device, quick)
    return found | sharded(folder, size, device, quick)


def planned(folder: Path, size: Size, net: Any, device: str) -> dict[str, Figure]:
    """Compare what three updates say with the run that follows."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    run, stamps = train(folder, size, copy.deepcopy(net), device), [clock()]

    def on_log(step: int, values: dict[str, float]) -> None:
        stamps.append(clock())
        if len(stamps) == size.rounds + 2:
            raise Stopped

    told = rehearsal.rehearse(run, config_of(size, device), clock).seconds
    run(folder / "planned", config_of(size, device), on_log)
    real = [(b - a) / size.steps for a, b in itertools.pairwise(stamps[1:])]
    return {
        "plan of training": summary([told / one for one in real])
        | {"target": "0.8 to 1.2", "what": "seconds of a step, planned / of the run that follows"}
    }


def memory(folder: Path, device: str, quick: bool) -> dict[str, Figure]:
    """Compare the peak memory of training an adapter, in processes of their own."""
    peaks = []
    for _ in range(1 if quick else 3):
        for which in ("ours", "bare"):
            out = python("-m", "scripts.bench.large", which, str(folder), device, str(int(quick)))
            peaks.append(float(out.split()[-1]))
    return {
        "adapter, memory": summary([a / b for a, b in zip(peaks[::2], peaks[1::2], strict=True)])
        | {"target": "at most 1.03", "what": "peak of a training process, ours / bare loop"}
        | {"mb": summary(peaks[::2])["median"]}
    }


def sharded(folder: Path, size: Size, device: str, quick: bool) -> dict[str, Figure]:
    """Measure two processes (or all GPUs), beside bare `fully_shard`."""
    gpus = torch.cuda.device_count()
    number, where = (gpus, device) if gpus > 1 else (2, "cpu")
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2.yaml"]
    launch += ["--num_processes", str(number), "--main_process_port", "0"]
    launch += ["-m", "scripts.bench.large", "sharded", str(folder), where, str(int(quick))]
    python(*launch, OMP_NUM_THREADS="1")
    told = json.loads((folder / "sharded.json").read_text())
    share = 1 / number
    return {
        f"split over {number} processes": summary(told["ratios"])
        | {"target": "at most 1.05", "what": "time of a step, ours / bare fully_shard"},
        "split, memory of a process": summary([told["share"]])
        | {"target": f"at most {share * 1.1:.2f}", "what": "weights, optimizer, EMA / unsplit"},
        "split, checkpoint in memory": summary([told["copy"]])
        | {"target": f"at most {share + 0.1:.2f}", "what": "memory for a checkpoint / its bytes"},
        "split, checkpoint": summary([told["wait"] / 600])
        | {"target": "at most 0.02", "what": "share of 10 minutes that the loop waits for one"},
    }


def split(folder: Path, size: Size, device: str) -> None:
    """Be one of the processes of `sharded`."""
    net, told = build(size), {}
    whole = sum(p.numel() for p in net.parameters()) * 16  # weights, two averages, EMA, in float32
    process.start_accelerator(device)
    bare = Bare(build(size), size, process.worker_device(device), shard=True)
    turns = Turns(bare, size, device)
    states: list[Any] = []

    def on_log(step: int, values: dict[str, float]) -> None:
        try:
            turns.turn(step, values)
        except Stopped:
            one = states[0]
            held = [one.parameters, one.averages["net"].tensors]
            averages = [one.adamw.state_of(p) for p in one.parameters]
            held += [[state[key] for state in averages] for key in ("exp_avg", "exp_avg_sq")]
            local = sum(t.to_local().nbytes for group in held for t in group)
            peaks = [resident()]
            for number in range(2):
                began = time.perf_counter()
                one.step += number
                one.save()
                told["wait"] = time.perf_counter() - began
                while not one.behind.last.done():
                    peaks.append(resident())
                    time.sleep(0.01)
                one.behind.settle()
            told["share"], told["copy"] = local / whole, (max(peaks) - peaks[0]) / whole
            raise

    inner = state.State.__init__

    def opened(self: Any, *words: Any) -> None:
        inner(self, *words)
        states.append(self)

    state.State.__init__ = opened  # type: ignore[method-assign]
    fit(folder, size, net, device, on_log, shard=True)
    if process.leads():
        told["ratios"] = turns.ratios()
        (folder / "sharded.json").write_text(json.dumps(told))


def resident() -> int:
    """Return the memory that this process holds now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(which: str, folder: Path, device: str, quick: bool) -> None:
    """Do the part of a figure that needs processes of its own."""
    size = size_for(device, quick)
    if which == "sharded":
        return split(folder, size, device)
    net = build(size)
    adapters.add(net, LoraConfig(rank=RANK), 0)
    if which == "ours":

        def on_log(step: int, values: dict[str, float]) -> None:
            if step >= 2 * size.steps:
                raise Stopped

        fit(folder, size, net, device, on_log, keep=7)
    else:
        Bare(net, size, process.worker_device(device)).steps(2 * size.steps)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(kib / 1024 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")
