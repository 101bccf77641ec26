"""This process within the job: its rank, what it prints, its device."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from flowmatch.config import UserError
from flowmatch.runs import environment


def rank() -> int:
    """Number this process within the job."""
    return _number("RANK", 0)


def leads() -> bool:
    """Tell whether this process speaks for the job (rank 0)."""
    return rank() == 0


def world_size() -> int:
    """Count the processes of the job."""
    return _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:  # `ranks.settle` refuses what is no number
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def has_log() -> bool:
    """Tell whether what this process prints is its own: rank 0 of a launcher, or no launcher's."""
    return leads() or "LOCAL_RANK" not in os.environ


def say(text: str) -> None:
    """Print on rank 0 alone."""
    if leads():
        print(text, flush=True)


def bar_options() -> dict[str, Any]:
    """Options of tqdm: rank 0 alone, and seldom where the output is a log and no terminal."""
    return {"disable": not leads(), "mininterval": 1 if sys.stderr.isatty() else 30}


OTHERS = ("xpu", "mps")  # devices that no machine of the tests has


def pick_device(device: str, others: Sequence[str] = ()) -> str:
    """Resolve `auto`.

    Args:
        device: auto, cpu, cuda, xpu or mps.
        others: Which of the last two the stage takes; `auto` uses them in a single process alone.

    Raises:
        UserError: A device is asked for that torch does not see here, that the stage does not take, or
            that several processes would share.
    """
    import torch

    if device == "cpu":
        return device
    if device in OTHERS and device not in others:
        raise UserError(
            f"device={device!r}: only flow, pairs and reflow run there; use device=cpu for this stage"
        )
    seen = [kind for kind in ("cuda", *OTHERS) if _backend(torch, kind).is_available()]
    if device == "auto":
        taken = ("cuda", *(others if world_size() == 1 else ()))
        return next((kind for kind in seen if kind in taken), "cpu")
    if device not in seen:
        what = "no GPU" if device == "cuda" else f"no {device} device"
        raise UserError(f"device={device!r}: torch sees {what} here; use device=auto or device=cpu")
    if device in OTHERS and world_size() > 1:
        raise UserError(f"device={device!r}: one process alone; start one, or use device=cpu")
    return device


def _backend(torch: Any, kind: str) -> Any:
    return torch.backends.mps if kind == "mps" else getattr(torch, kind)


def device_of(config: Any) -> str:
    """Resolve the device of a stage's config, as `pick_device`."""
    return pick_device(config.device, config.others)


def untested(device: str) -> list[str]:
    """Say in a plan that flowmatch is not tested on a device; nothing for the others."""
    return [f"{device}: flowmatch's tests have no such device"] if device in OTHERS else []


def worker_device(device: str) -> str:
    """Give this process its own GPU of the machine, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def start_accelerator(device: str, **options: Any) -> Any:
    """Make the Accelerator from what it is told here alone, and check what it has made of it.

    On a machine without a GPU the launcher's obvious flags leave every process believing to be rank
    0 of 1; such a job is stopped here. float32 means all of its bits, until `fit` allows TF32.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        TorchDynamoPlugin,
    )

    environment.settle()
    torch.backends.cudnn.allow_tf32 = False
    kind = pick_device(device, () if device == "auto" else OTHERS)
    if kind == "cuda" and world_size() > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            "LOCAL_RANK is missing: the number of this process on its machine, which is that of its GPU"
        )
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]  # no copy
    if kind == "cpu" and world_size() > 1 and "MASTER_ADDR" in os.environ:  # not torch's MPI
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        cpu=kind == "cpu",
        kwargs_handlers=handlers,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        **options,
    )
    if accelerator.num_processes != world_size():
        raise UserError(
            f"the launcher started {world_size()} processes, Accelerate sees "
            f"{accelerator.num_processes}; use --config_file configs/accelerate/cpu_2.yaml on CPUs"
        )
    if accelerator.device.type != kind:
        raise UserError(f"Accelerate chose the device {accelerator.device}, the stage {kind}")
    return accelerator
