"""The pairs of a shard, integrated batch by batch: noise carried to data, or data back to noise."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.data.dataset import Data
from flowmatch.flow import noise
from flowmatch.flow.config import SolverConfig
from flowmatch.models.config import Precision
from flowmatch.models.precision import arithmetic
from flowmatch.models.velocity import Velocity
from flowmatch.pairs import shards
from flowmatch.pairs.layout import Layout

Array = Callable[[], np.ndarray]  # waits for what is still being made


@dataclass(frozen=True)
class Made:
    """Pairs that were integrated together. evaluations: a pair, of the network."""

    x0: Array
    x1: Array
    label: np.ndarray | None
    evaluations: int


class PairGenerator:
    """Makes the pairs of a shard: pair i from noise i, or from item i of the data.

    Noise is rounded to the stored dtype before it is integrated: the given side of a pair is exact.
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
        look: Callable[[], None] = lambda: None,
    ):
        """Put the network on the device. look: called before each evaluation; it may raise.

        precision: of the network alone, see precision.arithmetic.
        """
        velocity.net.to(device)
        if compile:  # every batch is a whole one: a single graph
            velocity.net.compile(fullgraph=True, dynamic=False)
        self.layout, self.velocity, self.device, self.data = layout, velocity, device, data
        self.seed, self.compute_batch, self.solver, self.look = seed, compute_batch, solver, look
        self.environment: dict[str, Any] = {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "processor": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
            "threads": torch.get_num_threads(),
            "compile": compile,
        }
        self.precision = precision
        torch.backends.cudnn.deterministic = True

    @torch.inference_mode()
    def batches(self, k: int) -> Iterator[Made]:
        """Integrate shard k in batches of compute_batch; the last one is padded with the next ids.

        Nothing here waits for a GPU: it integrates while the noise of the next batch is drawn.
        """
        size, step, backward = self.layout.shard_size, self.compute_batch, self.data is not None
        for start in range(0, size, step):
            x, label = self._given(k * size + start + np.arange(step))
            cond = None if label is None else {"label": self._to_device(label)}
            before = self.velocity.evaluations
            with arithmetic(self.precision, self.device):
                found = self.velocity.integrate(
                    self._to_device(x.astype(np.float32)),
                    self.solver,
                    cond,
                    backward=backward,
                    before=self.look,
                )
            keep = min(step, size - start)
            ends: list[Array] = [lambda kept=x[:keep]: kept, to_host(found[:keep])]  # type: ignore[misc]
            x0, x1 = reversed(ends) if backward else ends
            evaluations = self.velocity.evaluations - before
            yield Made(x0, x1, None if label is None else label[:keep], evaluations)

    def _given(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Draw noise and labels, or read data; the data begins anew where padding goes past its end."""
        if self.data is not None:
            batch = self.data.batch(ids % len(self.data))
            label = batch["label"].numpy() if "label" in batch else None
            return batch["x1"].numpy().astype(self.layout.dtype), label
        x0 = noise.normal(self.seed, ids, self.layout.shape, noise.PAIR_NOISE)
        classes = self.velocity.classes
        label = None if classes is None else noise.labels(self.seed, ids, classes)
        return x0.astype(self.layout.dtype), label

    def _to_device(self, array: np.ndarray) -> Tensor:
        """Copy an array to where the network is, without waiting for what runs there."""
        tensor = torch.from_numpy(array)
        if self.device == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def to_host(x: Tensor) -> Array:
    """Begin to copy a tensor to the host; calling the answer, from any thread, waits for the copy."""
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
    batches: Iterable[Made], layout: Layout, environment: dict[str, Any]
) -> Iterator[shards.Block]:
    """Cut the batches of a shard into the blocks of its layout, and note their mean evaluations."""
    held: list[shards.Block] = []
    counts = []
    for batch in batches:
        counts.append(batch.evaluations)
        x0, x1 = (end().astype(layout.dtype) for end in (batch.x0, batch.x1))
        held.append((x0, x1, batch.label))
        x0, x1, y = (join(column) for column in zip(*held, strict=True))
        whole = len(x0) // layout.block * layout.block
        for a in range(0, whole, layout.block):
            b = a + layout.block
            yield x0[a:b], x1[a:b], None if y is None else y[a:b]
        held = [(x0[whole:], x1[whole:], None if y is None else y[whole:])]
    if len(held[0][0]):
        yield held[0]
    environment["evaluations"] = sum(counts) / len(counts)


def join(column: tuple[np.ndarray | None, ...]) -> Any:
    """Concatenate arrays, or pass None on."""
    return (
        None if column[0] is None else np.concatenate([part for part in column if part is not None])
    )


@torch.inference_mode()
def measure_batch(
    velocity: Velocity,
    shape: tuple[int, ...],
    device: str,
    precision: Precision,
    seconds: float = 2.0,
) -> str:
    """Say which batches fit and which is fastest a sample: doubled until memory or time runs out.

    On a GPU a tenth of the memory is left to the solver's states; on a CPU memory hardly sets a limit.
    """
    net, on_gpu = velocity.net.to(device), device != "cpu"
    t, best, size, end = sum(velocity.span) / 2, (float("inf"), 0), 1, time.perf_counter() + seconds
    reached = "no more were tried"
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(0.9, device)
    try:
        while True:
            label = torch.zeros(size, dtype=torch.long, device=device)
            cond = None if velocity.classes is None else {"label": label}
            x = torch.randn(size, *shape, device=device)
            for _ in range(2):  # the first call of a size chooses its kernels
                began = time.perf_counter()
                with arithmetic(precision, device):
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
        return f"compute_batch: not one sample fits this {device}"
    return (
        f"compute_batch: up to {size:,} fit ({reached}); fastest a sample {best[1]:,}, "
        f"{1e3 * best[0]:.3g} ms an evaluation on this {'GPU' if on_gpu else 'CPU'}"
    )
