"""Torch's global state: the precision of float32 products, cuDNN's flags and seeds, always restored."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowmatch.config import UserError
from flowmatch.models.config import Precision


def check(key: str, precision: str, device: str) -> None:
    """Check that a device has a precision.

    Args:
        key: Name of the config's key, for the message.
        precision: "fp32", "tf32", "bf16" or "fp16".
        device: "cpu", "cuda", "xpu" or "mps".

    Raises:
        UserError: The device does not have it.
    """
    if precision == "tf32" and device != "cuda":
        raise UserError(f"{key}='tf32' needs a GPU of CUDA, and this is {device}; use fp32")
    wanting = device == "cuda" and precision in ("tf32", "bf16")
    if wanting and torch.cuda.get_device_capability() < (8, 0):
        raise UserError(
            f"{key}={precision!r} needs an Ampere GPU or a newer one, and "
            f"{torch.cuda.get_device_name()} is older; use fp32, or fp16 in training"
        )


def allow_tf32(allowed: bool) -> None:
    """Let matrix products and convolutions use TF32, or all bits of float32, inside `restored`."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def restored() -> Iterator[None]:
    """Restore torch's TF32 and cuDNN flags at the end of the block."""
    cudnn = torch.backends.cudnn
    matmul, tf32 = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = tf32
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark


@contextmanager
def deterministic() -> Iterator[None]:
    """Let cuDNN use deterministic algorithms alone, inside the block."""
    with restored():
        torch.backends.cudnn.deterministic = True
        yield


@contextmanager
def arithmetic(precision: Precision, device: str | torch.device) -> Iterator[None]:
    """Let networks multiply in a precision, inside the block; weights and states stay float32.

    Args:
        precision: "fp32" (all of its bits), "tf32", or "bf16" (by autocast).
        device: Where the network is.
    """
    with restored():
        allow_tf32(precision == "tf32")
        with torch.autocast(torch.device(device).type, torch.bfloat16, precision == "bf16"):
            yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU inside the block; restore its state at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """Restore the states of torch's generators, of the CPU and of a device, at the end of the block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
