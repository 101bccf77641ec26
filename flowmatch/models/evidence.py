"""What a watched run shows: noise levels, the clock of the network's time, arguments that change."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowmatch.config import UserError
from flowmatch.models.watch import Call, Watch


def falling(seen: Watch) -> bool:
    """Return whether the sigmas of a flow fall, as they do where they are the noise levels."""
    return float(seen.steps[0].sigma or 0) >= float(seen.steps[-1].next_sigma or 0)


def levels(seen: Watch) -> list[float]:
    """Return the noise level before each step of a flow, 1 at noise and 0 at data."""
    down = falling(seen)
    return [float(s.sigma or 0) if down else 1 - float(s.sigma or 0) for s in seen.steps]


def rows_of(call: Call) -> int:
    """Return the number of samples in a call of a network: of its first argument."""
    return len(next(iter(call.arguments.values())))


def is_flow(scheduler: Any) -> bool:
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    return kind == "flow_prediction" or bool(scheduler.config.get("use_flow_sigmas"))


def kind_of(scheduler: Any, flow: bool, key: str) -> str:
    kind = "flow" if flow else str(scheduler.config.prediction_type)
    if kind not in ("flow", "epsilon", "v_prediction", "sample"):
        raise UserError(f"{key}: prediction_type={kind!r} of its scheduler is unknown")
    if not flow and not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(
            f"{key}: {type(scheduler).__name__} has no alphas_cumprod, from which the noise levels of "
            "a diffusion are read"
        )
    return kind


def tolerance(pipe: Any) -> float:
    """Return the relative difference that a replay may show in the precision of a pipeline."""
    return 1e-2 if in_half(pipe) else 1e-5


def in_half(pipe: Any) -> bool:
    """Return whether a part of a pipeline is in half precision, which rounds what it is given."""
    kinds = {p.dtype for part in pipe.components.values() for p in _parameters(part)}
    return bool(kinds & {torch.float16, torch.bfloat16})


def _parameters(part: Any) -> Any:
    return part.parameters() if isinstance(part, nn.Module) else ()


ROUNDING = 6e-3  # of a number that was rounded to bfloat16 twice, relative to it


def fit(clock: list[float], times: list[float], half: bool = False) -> tuple[float, float, float]:
    """Fit time = slope * clock + offset.

    Args:
        clock: The scheduler's times.
        times: Those of the network.
        half: Whether a pipeline in half precision may have rounded them; then the line of the fewest
            digits that fits them is taken.

    Returns:
        Slope, offset, and the largest difference relative to the largest time.
    """
    a = np.stack([np.array(clock), np.ones(len(clock))], axis=1)
    (slope, offset), *_ = np.linalg.lstsq(a, np.array(times), rcond=None)
    lines = [(_neat(float(slope)), _neat(float(offset)))]
    if half:
        few = [(float(f"{slope:.{n}g}"), float(f"{offset:.{n}g}")) for n in (1, 2, 3)]
        lines = [*((s, o) for s, whole in few for o in (0.0, whole)), *lines]
    size = max(abs(t) for t in times) + 1e-30
    rests = [float(np.abs(a @ line - times).max() / size) for line in lines]
    best = next((i for i, rest in enumerate(rests) if half and rest <= ROUNDING), -1)
    return *lines[best], rests[best]


def _neat(x: float) -> float:
    """Return a fitted number without its rounding: the nearest with three digits, if it is near."""
    near = float(f"{x:.3g}")
    return 0.0 if abs(x) < 5e-3 else near if abs(near - x) <= 2e-3 * abs(x) else x


def number_of(value: Any) -> float | None:
    """Return the one number of a time argument, or None where it is none or its rows differ."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        return None
    if isinstance(value, Tensor):
        flat = value.detach().flatten()
        if not flat.numel() or not bool((flat == flat[0]).all()):
            return None
        value = flat[0].item()
    return float(value)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b)
