"""What networks multiply in where they are sampled; weights and the solver's state stay float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowmatch.config import UserError
from flowmatch.models.config import Precision


def check(key: str, precision: str, device: str) -> None:
    """Raise UserError for a precision that the device does not have."""
    if precision == "tf32" and device == "cpu":
        raise UserError(f"{key}='tf32' needs a GPU, and this runs on a CPU; use fp32")
    wanting = device != "cpu" and precision in ("tf32", "bf16")
    if wanting and torch.cuda.get_device_capability() < (8, 0):
        raise UserError(
            f"{key}={precision!r} needs a GPU since Ampere, {torch.cuda.get_device_name()} is older; "
            "use fp32, or in training fp16"
        )


def allow_tf32(allowed: bool) -> None:
    """Let matrices and convolutions be multiplied in TF32, or in all bits of float32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def arithmetic(precision: Precision, device: str | torch.device) -> Iterator[None]:
    """Let networks multiply in fp32 (all of its bits), tf32, or bf16 (autocast's), for a while."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow_tf32(precision == "tf32")
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
