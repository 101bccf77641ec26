"""This process within the job: its rank, what it prints, its device."""

import os
import sys
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


def pick_device(device: str) -> str:
    """Resolve `auto`; raise UserError where a GPU is asked for and there is none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda': torch sees no GPU here; use device=auto or device=cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


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
    kind = pick_device(device)
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
