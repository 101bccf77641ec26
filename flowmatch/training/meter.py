"""What a training step costs: FLOPs, their share of the device's peak, and memory."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# dense FLOP/s without sparsity, of tensor cores in bf16, in tf32, and of plain float32, as the makers
# say; the first name that a device's contains counts
PEAKS = {
    "B200": (2250e12, 1125e12, 75e12),
    "H200": (989e12, 494e12, 67e12),
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100": (989e12, 494e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "RTX 4090": (165e12, 82.6e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12, 35.6e12),
    "A10G": (70e12, 35e12, 35e12),
    "L4": (121e12, 60e12, 30.3e12),
}
PLACE = {"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 2}


def peak_of(name: str, precision: str) -> float | None:
    """Return the peak of a device in FLOP/s, by its name and a precision; None: unknown."""
    known = [peaks for part, peaks in PEAKS.items() if part in name]
    return known[0][PLACE[precision]] if known else None


def device_peak(device: torch.device, precision: str) -> float | None:
    """Return the peak of a device in FLOP/s in a precision of products; None: unknown."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held, in bytes: of its GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def counter() -> Any:
    """Return torch's counter of FLOPs, which knows the CPU's fused attention, too."""
    from torch.utils import flop_counter

    def forward(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(q, k, v)

    def backward(
        grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        return flop_counter.sdpa_backward_flop_count(grad, q, k, v)

    aten = torch.ops.aten
    more: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return flop_counter.FlopCounterMode(display=False, custom_mapping=more)


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
