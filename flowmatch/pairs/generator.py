"""The pairs of a shard, integrated batch by batch: from noise to data, or from data back to noise."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.data.dataset import Data
from flowmatch.flow import noise
from flowmatch.flow.config import SolverConfig
from flowmatch.flow.solvers import Keep
from flowmatch.models.config import Precision
from flowmatch.models.precision import arithmetic, deterministic
from flowmatch.models.velocity import Velocity
from flowmatch.pairs import shards
from flowmatch.pairs.layout import Layout

Array = Callable[[], np.ndarray]  # waits until the array is computed and copied, then returns it


@dataclass(frozen=True)
class Made:
    """Pairs that were integrated together: x0, x1 [n, *shape] float32 or of the stored dtype.

    label is int64 [n] or None; evaluations counts the network's evaluations of each pair; states are
    those of the path, [n, K, *shape], or None.
    """

    x0: Array
    x1: Array
    label: np.ndarray | None
    evaluations: int
    states: Array | None = None


class PairGenerator:
    """Makes the pairs of a shard: pair i from noise i, or from item i of the data.

    The start of each integration is rounded to the stored dtype first, so that this side of a pair is
    stored exactly.
    """

    def __init__(
        self,
        layout: Layout,
        velocity: Velocity,
        device: str,
        *,
        data: Data | None,
        seed: int,
        compute_batch: int,
        solver: SolverConfig,
        precision: Precision,
        compile: bool,
        times: Sequence[float] = (),
        before_evaluation: Callable[[], None] = lambda: None,
    ):
        """Move the network to the device, and compile it if asked to.

        Args:
            layout: of the shards.
            velocity: of the teacher.
            device: "cpu" or "cuda[:i]".
            data: the data to invert; None to start from noise.
            seed: of the noise and labels.
            compute_batch: pairs that are integrated together.
            solver: config of the ODE solver.
            precision: of the network's arithmetic, see `precision.arithmetic`.
            compile: whether to compile the network.
            times: rising times of the solver at which the state is kept.
            before_evaluation: called before each evaluation of the network; an exception that it
                raises ends the generation.
        """
        velocity.net.to(device)
        if compile:  # all batches have one size, so that a single graph is enough
            velocity.net.compile(fullgraph=True, dynamic=False)
        self.layout, self.velocity, self.device, self.data = layout, velocity, device, data
        self.seed, self.compute_batch, self.solver = seed, compute_batch, solver
        self.before_evaluation, self.times = before_evaluation, tuple(times)
        self.environment: dict[str, Any] = {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "processor": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
            "threads": torch.get_num_threads(),
            "compile": compile,
        }
        self.precision = precision

    @torch.inference_mode()
    def batches(self, k: int) -> Iterator[Made]:
        """Integrate shard k in batches of compute_batch; the last batch is padded with the next ids.

        This generator does not wait for a GPU, which integrates while the next noise is drawn.
        """
        size, step, backward = self.layout.shard_size, self.compute_batch, self.data is not None
        for begin in range(0, size, step):
            x, label = self._starts(k * size + begin + np.arange(step))
            cond = None if label is None else {"label": self._to_device(label)}
            before = self.velocity.evaluations
            keep: Keep = dict.fromkeys(self.times)
            with arithmetic(self.precision, self.device), deterministic():
                carried = self.velocity.integrate(
                    self._to_device(x.astype(np.float32)),
                    self.solver,
                    cond,
                    backward=backward,
                    before=self.before_evaluation,
                    keep=keep,
                )
            n = min(step, size - begin)
            start, end = on_host(x[:n]), to_host(carried[:n])
            x0, x1 = (end, start) if backward else (start, end)
            evaluations = self.velocity.evaluations - before
            kept = [keep[t][:n].float() for t in self.times]
            states = to_host(torch.stack(kept, 1)) if kept else None
            yield Made(x0, x1, None if label is None else label[:n], evaluations, states)

    def _starts(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Draw noise and labels, or read data; padding beyond the last item continues with the first."""
        if self.data is not None:
            batch = self.data.batch(ids % len(self.data))
            label = batch["label"].numpy() if "label" in batch else None
            return batch["x1"].numpy().astype(self.layout.dtype), label
        x0 = noise.normal(self.seed, ids, self.layout.shape, noise.PAIR_NOISE)
        classes = self.velocity.classes
        label = None if classes is None else self.velocity.labels(self.seed, ids)
        return x0.astype(self.layout.dtype), label

    def _to_device(self, array: np.ndarray) -> Tensor:
        """Copy an array to the device without waiting for its kernels."""
        tensor = torch.from_numpy(array)
        if self.device == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def on_host(x: np.ndarray) -> Array:
    """Return an array that needs no waiting, with the interface of `to_host`."""
    return lambda: x


def to_host(x: Tensor) -> Array:
    """Begin to copy a tensor to the host.

    Returns:
        A function that waits for the copy and returns it; any thread may call it.
    """
    if x.device.type == "cpu":
        return x.numpy
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    copied.record(torch.cuda.current_stream(x.device))

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


def cut(
    batches: Iterable[Made], layout: Layout, environment: dict[str, Any], texts: Sequence[str] = ()
) -> Iterator[shards.Block | shards.Prompted]:
    """Cut the batches of a shard into the blocks of its layout.

    Args:
        batches: of the shard, in order.
        layout: of the shard.
        texts: prompts by number, for a layout with prompts.
        environment: gets the mean number of evaluations as "evaluations", after the last block.
    """

    def piece(x0: Any, x1: Any, y: Any, states: Any) -> Any:
        kept = [states] if layout.states else []
        prompts = [[texts[i] for i in y.tolist()]] if layout.prompt_bytes else []
        return (x0 if layout.noise else None, x1, y, *kept, *prompts)

    held: list[Any] = []
    counts = []
    for batch in batches:
        counts.append(batch.evaluations)
        x0, x1 = (end().astype(layout.dtype) for end in (batch.x0, batch.x1))
        states = None if batch.states is None else batch.states().astype(layout.dtype)
        held.append((x0, x1, batch.label, states))
        columns = [join(column) for column in zip(*held, strict=True)]
        whole = len(columns[0]) // layout.block * layout.block
        for a in range(0, whole, layout.block):
            b = a + layout.block
            yield piece(*(None if column is None else column[a:b] for column in columns))
        held = [tuple(None if column is None else column[whole:] for column in columns)]
    if len(held[0][0]):
        yield piece(*held[0])
    environment["evaluations"] = sum(counts) / len(counts)


def join(column: tuple[np.ndarray | None, ...]) -> Any:
    """Concatenate arrays; return None for a column of None."""
    parts = [part for part in column if part is not None]
    return np.concatenate(parts) if parts else None


@torch.inference_mode()
def measure_batch(
    velocity: Velocity,
    shape: tuple[int, ...],
    device: str,
    precision: Precision,
    seconds: float = 2.0,
) -> str:
    """Measure which batches fit the device, and which is the fastest for each sample.

    The batch is doubled until memory or time runs out. On a GPU a tenth of the memory is reserved for
    the states of the solver; on a CPU time ends the measurement.

    Args:
        velocity: of the teacher.
        shape: of one sample.
        device: "cpu" or "cuda[:i]".
        precision: of the network's arithmetic.
        seconds: that the measurement may take.

    Returns:
        A line for the plan.
    """
    net, on_gpu = velocity.net.to(device), device != "cpu"
    t, best, size, end = sum(velocity.span) / 2, (float("inf"), 0), 1, time.perf_counter() + seconds
    reached = "larger batches were not tried"
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(0.9, device)
    try:
        while True:
            label = torch.zeros(size, dtype=torch.long, device=device)
            cond = None if velocity.classes is None else {"label": label}
            x = torch.randn(size, *shape, device=device)
            for _ in range(2):  # the first call of a size chooses its kernels
                began = time.perf_counter()
                with arithmetic(precision, device), deterministic():
                    velocity(x, t, cond)
                if on_gpu:
                    torch.cuda.synchronize(device)
                now = time.perf_counter()
            best = min(best, ((now - began) / size, size))
            if now + 4 * (now - began) > end:
                break
            size *= 2
    except torch.OutOfMemoryError:
        reached, size = f"{size:,} do not", size // 2
    finally:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            torch.cuda.empty_cache()
        net.cpu()
    if not size:
        return f"compute_batch: not even one sample fits {device}"
    return (
        f"compute_batch: up to {size:,} fit ({reached}); fastest a sample {best[1]:,}, "
        f"{1e3 * best[0]:.3g} ms an evaluation on this {'GPU' if on_gpu else 'CPU'}"
    )
