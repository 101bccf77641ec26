"""What a run trains on, for its card: no content, so it is in no manifest."""

import json
import platform
from pathlib import Path
from typing import Any

from flowmatch.runs.files import write_atomic

FILE = "hardware.json"


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
