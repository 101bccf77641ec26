"""What a run trains on: what a device can do, and its name for the card, which is in no manifest."""

import json
import platform
from pathlib import Path
from typing import Any

from flowmatch.config import UserError
from flowmatch.runs.files import write_atomic
from flowmatch.runs.process import OTHERS
from flowmatch.training.config import FitConfig

FILE = "hardware.json"


def check(config: FitConfig, device: str) -> None:
    """Refuse what no device but a CPU or one of CUDA does. Raises UserError."""
    if device not in OTHERS:
        return
    given = {
        f"fit.precision={config.precision!r}": config.precision in ("fp16", "tf32"),
        "fit.compile=true": config.compile,
        "fit.shard=true": config.shard,
        f"fit.optimizer={config.optimizer}": config.optimizer != "adamw",
    }
    if faults := [key for key, used in given.items() if used]:
        raise UserError([f"{key}: not on device={device}; leave it out" for key in faults])


def note(folder: Path, accelerator: Any) -> None:
    """Write the device and the number of processes into a run folder.

    Args:
        folder: The run folder.
        accelerator: Accelerate's Accelerator of this process.
    """
    found = {"device": name(accelerator.device), "processes": accelerator.num_processes}
    write_atomic(folder / FILE, json.dumps(found) + "\n")


def name(device: Any) -> str:
    """Name a device: the GPU, or the kind of the processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"
