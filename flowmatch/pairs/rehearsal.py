"""What a set of pairs will take: measured by some evaluations of the teacher at the real shapes."""

import time
from typing import Any

import torch

from flowmatch.config import UserError
from flowmatch.flow import noise
from flowmatch.flow.config import SolverConfig
from flowmatch.models import flops
from flowmatch.models.config import Precision
from flowmatch.models.precision import arithmetic, deterministic
from flowmatch.models.velocity import Velocity

EVALUATIONS = 3  # that are timed, after one that chooses its kernels


class Enough(Exception):
    """The evaluations are made."""


@torch.inference_mode()
def seconds_a_pair(
    velocity: Velocity,
    solver: SolverConfig,
    shape: tuple[int, ...],
    batch: int,
    evaluations: float,
    device: str,
    precision: Precision,
) -> float:
    """Time the first evaluations of a batch, and scale them to all of its run.

    Args:
        velocity: Of the teacher.
        solver: What carries the noise.
        shape: Of one sample.
        batch: Pairs that are integrated together.
        evaluations: Rows of the network's input, a pair.
        device: "cpu" or "cuda[:i]".
        precision: Of the network's arithmetic.

    Returns:
        Seconds of a pair; what comes before the first evaluation, such as text encoders, included.

    Raises:
        UserError: The batch does not fit the memory.
    """
    net: Any = velocity.net.to(device)
    stamps, rows = [time.perf_counter()], [0]

    def count(module: Any, args: Any, kwargs: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        rows.append(len(given))
        if device != "cpu":
            torch.accelerator.synchronize(device)
        stamps.append(time.perf_counter())
        if len(stamps) == EVALUATIONS + 3:  # the start, one that does not count, and the end
            raise Enough

    x = torch.from_numpy(noise.normal(0, range(batch), shape, noise.PAIR_NOISE)).to(device)
    ids = None if velocity.classes is None else torch.zeros(batch, dtype=torch.long, device=device)
    hook = net.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with arithmetic(precision, device), deterministic():
            velocity.integrate(x, solver, None if ids is None else {"label": ids})
        stamps.append(time.perf_counter())
    except Enough:
        pass
    except torch.OutOfMemoryError:
        raise UserError(
            f"compute_batch={batch} does not fit the memory of {device}; use "
            f"{'compute_batch=' + str(batch // 2) if batch > 1 else 'precision=bf16'}"
        ) from None
    finally:
        hook.remove()
    first = 2 if len(stamps) > 3 else 1  # of those that count
    one = (stamps[-1] - stamps[first]) / (len(stamps) - 1 - first)
    calls = evaluations * batch / rows[1]
    return (stamps[1] - stamps[0] + calls * one) / batch


def lines(
    teacher: Any, count: int, evaluations: float, world: int, device: str, *how: Any
) -> list[str]:
    """Say what a set will take.

    Args:
        teacher: A `Teacher` or `TextTeacher`.
        count: Pairs of the set.
        evaluations: As in `seconds_a_pair`.
        world: Number of workers.
        device: Of this one.
        how: velocity, solver, batch and precision.

    Returns:
        Lines of a plan.
    """
    velocity, solver, batch, precision = how
    one = flops.of_network(teacher, teacher.net, None, trained=False)
    cost = f"{evaluations * one / 1e12:,.3g} TFLOP a pair" if one else ""
    if device == "cpu" and one and one * batch * EVALUATIONS > flops.PATIENCE:
        words, speed = flops.assumed(precision)
        rate = speed / (one * evaluations)
        told = f"{cost}, counted; there is no GPU here, and nothing is timed: {words},"
    else:
        shape = teacher.shape
        rate = 1 / seconds_a_pair(velocity, solver, shape, batch, evaluations, device, precision)
        peak = flops.device_peak(torch.device(device), precision)
        used = f", {one * evaluations * rate / peak:.0%} of the peak" if one and peak else ""
        memory = _memory(device) if device.startswith("cuda") else ""
        told = f"{EVALUATIONS} evaluations of {batch} pairs were timed: {rate:,.3g} pairs a second"
        told += f"{', ' if cost else ''}{cost}{used}{memory};"
    hours = count / rate / 3600
    return [
        f"{told} {count:,} pairs take {hours:,.2f} hours of a worker, {hours / world:,.2f} of {world}; "
        f"an hour of a worker makes {3600 * rate:,.0f} pairs, 100 hours {360_000 * rate:,.0f}"
    ]


def _memory(device: str) -> str:
    return f", at most {torch.cuda.max_memory_allocated(device) / 1e9:,.2f} GB"
