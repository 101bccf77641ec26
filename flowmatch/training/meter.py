"""What a training step costs: FLOPs, their share of the device's peak, and memory."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowmatch.models.flops import counter, device_peak


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held, in bytes: of its GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Again(TorchDispatchMode):
    """Counts what a backward pass computes again (`fit.checkpointing`), which is no work of the model.

    It is the part of that pass with gradients enabled.

    Args:
        counter: The counter of all FLOPs, which is entered before.
    """

    def __init__(self, counter: Any):
        super().__init__()
        self.counter, self.backward, self.flops = counter, False, 0

    def begin(self) -> None:
        """Begin the backward pass."""
        self.backward = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator, and count it where it is computed again."""
        if not (self.backward and torch.is_grad_enabled()):
            return func(*args, **(kwargs or {}))
        before = self.counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        self.flops += self.counter.get_total_flops() - before
        return out


class Meter:
    """The cost of a training step, counted once where the device's peak is known.

    Args:
        device: Of this process.
        precision: Of the network's products.
        micro: Samples in a micro-batch.
    """

    def __init__(self, device: torch.device, precision: str, micro: int):
        self.device, self.micro = device, micro
        self.peak = device_peak(device, precision)
        self.flops: float | None = None  # of a sample, forward and backward

    @contextmanager
    def counted(self) -> Iterator[Any]:
        """Count a micro-batch; yield what is to be called between its two passes."""
        if self.peak is None:
            yield lambda: None
            return
        with counter() as found, Again(found) as again:
            yield again.begin
        self.flops = (found.get_total_flops() - again.flops) / self.micro

    def values(self, rate: float) -> dict[str, float]:
        """Return what a line of the log says.

        Args:
            rate: Samples a second of this process.

        Returns:
            `memory_gb`, the peak in 10^9 bytes, and `mfu`, the share of the device's peak, where known.
        """
        values = {"memory_gb": round(peak_memory(self.device) / 1e9, 3)}
        if self.peak and self.flops:
            values["mfu"] = round(rate * self.flops / self.peak, 4)
        return values
