"""FLOPs of networks, counted by torch, and the peaks of devices."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmatch.models import adapters
from flowmatch.models.config import LoraConfig
from flowmatch.models.velocity import Velocity

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
PATIENCE = 3e12  # FLOPs that a CPU is asked for in a dry run: about a minute
ASSUMED = ("H100", 0.4)  # a device, and the share of its peak, where none is measured
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


def assumed(precision: str) -> tuple[str, float]:
    """Return words on a device that is assumed where none is at hand, and its FLOP/s."""
    name, share = ASSUMED
    words = f"on an {name} at {share:.0%} of its peak in {precision}, which is assumed"
    return words, share * (peak_of(name, precision) or 0.0)


def to_meta(value: Any) -> Any:
    """Replace the tensors in nested arguments by ones without content."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: to_meta(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_meta(part) for part in value)
    return value


def of_network(start: Any, net: Any, lora: LoraConfig | None, *, trained: bool) -> float | None:
    """Count the FLOPs of a network for one sample, without weights and without computing anything.

    Args:
        start: A `Teacher`, `TextTeacher` or `Data`, which says what the network is called with.
        net: The network, of whose config a twin without weights is made.
        lora: The adapter of a student, or None.
        trained: Whether the backward pass counts, too.

    Returns:
        The FLOPs; None where the class cannot be called without weights.
    """
    call = _call(start)
    try:
        with torch.device("meta"):
            twin = type(net).from_config(copy.deepcopy(dict(net.config)))
        if lora is not None:
            adapters.add(twin, lora, 0)
        with counter() as counted, torch.set_grad_enabled(trained):
            out = call(twin)
            if trained:
                out.sum().backward()
    except Exception:  # classes of diffusers raise anything where a tensor has no content
        return None
    return float(counted.get_total_flops())


def _call(start: Any) -> Callable[[Any], Tensor]:
    """Return what calls a network without weights for one sample, as a start does."""
    script = getattr(start, "script", None)
    x = torch.zeros(1, *start.shape, device="meta")
    clock = torch.zeros(1, device="meta")
    if script is not None:
        arguments = to_meta(start.conditions().rows(torch.zeros(1, dtype=torch.long)))
        return lambda net: script.evaluate(net, x, clock, arguments)
    label = torch.zeros(1, dtype=torch.long, device="meta")
    cond = None if start.classes is None else {"label": label}
    return lambda net: Velocity(net)(x, clock, cond)
