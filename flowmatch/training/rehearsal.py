"""What a run of training will take: measured by three of its updates, which are thrown away.

Where they would take too long, on a machine without the GPU that the run is for, FLOPs are counted.
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowmatch.config import UserError
from flowmatch.models import adapters, flops
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import RunFolder
from flowmatch.runs.process import world_size
from flowmatch.training import loop, sharding
from flowmatch.training.config import FitConfig

UPDATES = 3


class Enough(Exception):
    """The updates are made."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a run in all processes together.

    Attributes:
        frozen: Weights that are not trained.
        trained: Number of parameters that are.
        averages: Bytes of the optimizer's averages, a parameter.
        emas: Number of averages of the weights.
    """

    frozen: int
    trained: int
    averages: int
    emas: int

    @property
    def state(self) -> int:
        """Weights, gradients, optimizer and averages of the weights."""
        return self.frozen + self.trained * (8 + self.averages + 4 * self.emas)

    @property
    def checkpoint(self) -> int:
        """A checkpoint."""
        return self.trained * (4 + self.averages + 4 * self.emas)


def sizes(net: Any, config: FitConfig) -> Sizes:
    """Compute the sizes of a run from its network."""
    trained = sum(p.numel() for p in adapters.trained(net).values())
    frozen = sum(adapters.bytes_of(p) for p in net.parameters() if not p.requires_grad)
    return Sizes(
        frozen, trained, 2 if config.optimizer == "adamw_8bit" else 8, len(config.ema) or 1
    )


def room(device: str) -> int:
    """Return the memory of a device in bytes: of a CUDA GPU, or what is free on this machine."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    text = Path("/proc/meminfo").read_text()
    free = next(line for line in text.splitlines() if line.startswith("MemAvailable"))
    return int(free.split()[1]) * 1024


def check_room(
    net: Any, config: FitConfig, device: str, critic: tuple[int, int] | None = None
) -> None:
    """Check that weights, gradients, optimizer and averages fit.

    Args:
        net: The network, with its adapter.
        config: The training loop.
        device: Of this process.
        critic: Bytes of what a finish has beside them, in memory and in a checkpoint; None for another
            stage.

    Raises:
        UserError: They do not; the message names the key that makes them fit.
    """
    found, has, count = sizes(net, config), room(device), sharding.processes_of(config.shard)
    beside, _ = critic or (0, 0)
    need = found.state // count + beside
    if need <= has:
        return
    way = _way(net, config, found, has)
    if critic is not None:
        half = "" if config.precision == "bf16" else ", with fit.precision=bf16"
        way = f"finish an adapter, which reflow.lora trains{half}"
    others = f", {beside / 1e9:,.1f} of them of other networks" if beside else ""
    raise UserError(
        f"weights, gradients, optimizer and EMA take {need / 1e9:,.1f} GB a process{others}, and "
        f"{device} has {has / 1e9:,.1f} GB: {way}"
    )


def _way(net: Any, config: FitConfig, found: Sizes, has: int) -> str:
    """Name the key with which a state fits."""
    count = sum(p.numel() for p in net.parameters())
    ways = []
    if found.averages == 8 and not config.shard and found.state - 6 * found.trained <= has:
        ways.append("fit.optimizer=adamw_8bit")
    if found.trained == count and 2.2 * count <= has:  # with an adapter of some hundredths
        ways.append("lora={rank: 16} with fit.precision=bf16")
    if found.trained < count and config.precision != "bf16" and found.state / 2 <= has:
        ways.append("fit.precision=bf16")
    saved = 0 if config.shard else adapters.saving(net)
    if found.trained < count and world_size() == 1 and saved and found.state - saved <= has:
        ways.append("lora.quantize=int8 with fit.checkpointing=true")
    if not ways or found.trained == count:
        ways.append(f"fit.shard=true over {math.ceil(found.state / (0.8 * has))} processes or more")
    return f"use {', or '.join(ways)}"


@dataclass(frozen=True)
class Rehearsal:
    """What was measured.

    Attributes:
        seconds: Of an update.
        memory: Peak of a process, bytes.
    """

    seconds: float
    memory: float


def rehearse(
    run: Callable[..., Any], config: FitConfig, clock: Callable[[], float] = time.perf_counter
) -> Rehearsal:
    """Make three updates of a run, and throw them away.

    Args:
        run: `run(folder, config, on_log)` trains by `loop.fit`, from the start.
        config: The training loop.
        clock: Seconds, by which the updates are timed.

    Returns:
        What was measured.

    Raises:
        UserError: The device's memory is too small; the message names the key that needs less.
    """
    from accelerate.state import AcceleratorState

    logged: list[tuple[float, float]] = []

    def on_log(step: int, values: dict[str, float]) -> None:
        logged.append((clock(), values["memory_gb"] * 1e9))
        if len(logged) == UPDATES:
            raise Enough

    few = {"steps": max(UPDATES, config.steps), "log_every": 1, "save_every": 10**9, "trackers": []}
    few["sample_every"] = None
    AcceleratorState._reset_state()  # another stage may have another precision
    with tempfile.TemporaryDirectory(prefix="rehearsal") as place:
        with RunFolder("rehearsal", StageConfig(run_dir=place), {}) as folder:
            try:
                run(folder, config.model_copy(update=few), on_log)
            except Enough:
                pass
            except torch.OutOfMemoryError:
                raise UserError(f"the updates do not fit the memory: {_smaller(config)}") from None
            finally:
                AcceleratorState._reset_state()
    seconds = (logged[-1][0] - logged[0][0]) / (UPDATES - 1)
    return Rehearsal(seconds, max(memory for _, memory in logged))


def _smaller(config: FitConfig) -> str:
    """Name the key that needs less memory for activations."""
    micro, _ = loop.split_batch(config, world_size())
    if micro > 1:
        return f"use fit.micro_batch={micro // 2}"
    if not config.checkpointing:
        return "use fit.checkpointing=true"
    return "use lora={rank: 16}, or fit.shard=true over more processes"


def lines(
    run: Callable[..., Any],
    config: FitConfig,
    net: Any,
    device: str,
    a_sample: float | None,
    critic: tuple[int, int] | None = None,
) -> list[str]:
    """Say what a run will take.

    Args:
        run: As in `rehearse`.
        config: The training loop.
        net: The network, with its adapter.
        device: Of this process.
        a_sample: FLOPs of a sample, forward and backward; None: not known.
        critic: As in `check_room`.

    Returns:
        Lines of a plan.

    Raises:
        UserError: It cannot fit.
    """
    check_room(net, config, device, critic)
    found, world, batch = sizes(net, config), world_size(), config.batch_size
    beside, saved = critic or (0, 0)
    state = found.state // sharding.processes_of(config.shard) + beside
    disk = (
        f"{state / 1e9:,.3g} GB of weights, gradients, optimizer and EMA a process; a checkpoint has "
        f"{(found.checkpoint + saved) / 1e9:,.3g} GB, {config.keep + 1} of them at most"
    )
    cost = f"{a_sample * batch / 1e12:,.3g} TFLOP an update" if a_sample else ""
    if device == "cpu" and a_sample and a_sample * batch * UPDATES > flops.PATIENCE:
        words, speed = flops.assumed(config.precision)
        hours = a_sample * batch * config.steps / speed / 3600
        return [
            f"{cost}, counted; there is no GPU here, and nothing is timed: {words}, {config.steps:,} "
            f"updates take {hours:,.2f} GPU hours",
            disk,
        ]
    measured = rehearse(run, config)
    peak = flops.device_peak(torch.device(device), config.precision)
    used = ""
    if peak and a_sample:
        used = f", {a_sample * batch / world / measured.seconds / peak:.0%} of the peak"
    hours = measured.seconds * config.steps / 3600
    return [
        f"three updates were timed on {world} {'process' if world == 1 else 'processes'}: "
        f"{measured.seconds:.3g} s an update, {batch / measured.seconds:,.1f} samples a second"
        f"{', ' if cost else ''}{cost}{used}; at most {measured.memory / 1e9:,.3g} GB a process",
        f"{config.steps:,} updates take {hours:,.2f} hours, {hours * world:,.2f} of "
        f"{'a GPU' if device != 'cpu' else 'a process'}",
        disk,
    ]
