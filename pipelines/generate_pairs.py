"""Stage two: carry noise along the teacher's flow, and store where it ends: straight pairs.

Noise i, its label and so pair i are functions of the config, the teacher and i alone. Workers share
the folder and nothing else: start any number of them, stop them, start others; the bytes are the same.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowmatch import claims, manifest, nets, noise, shards, solvers, stage, stores, teachers
from flowmatch import config as configs
from flowmatch.behind import Behind
from flowmatch.config import UserError, option, required
from flowmatch.progress import Progress
from flowmatch.solvers import SolverConfig

PAIR_FORMAT = 1  # raised when the same config would make other bytes


class PairsConfig(stage.StageConfig):
    """Config of stage two."""

    teacher: str = required(
        "a sealed training stage (its EMA weights), a diffusers flow model, or a diffusers pipeline "
        "whose network predicts noise, data or v",
        run=True,
    )
    shards: int = required("number of shards; more of them extend a finished set", run=True, ge=1)
    shard_size: int = option(16384, "pairs in a shard, the unit of work and of retry", ge=1)
    block: int = option(64, "pairs in a tar member; choose it so that one is 0.25 to 4 MB", ge=1)
    compute_batch: int = option(256, "pairs integrated together; part of what comes out", ge=1)
    solver: SolverConfig = option(SolverConfig(), "how the teacher's ODE is solved")
    guidance: float = option(
        1.0, "classifier-free guidance scale w, baked into the pairs; 1 is none, others cost twice"
    )
    dtype: Literal["float16", "float32"] = option("float16", "stored dtype; the noise stays exact")
    compile: bool = option(
        False,
        "compile the network by torch.compile; alters rounding, so let all workers of a set agree",
        run=True,
    )
    lease_seconds: float = option(
        60.0, "a shard whose worker has not moved for so long is taken over", run=True, gt=0
    )


def main(config: PairsConfig, dry_run: bool) -> None:
    """Plan, then make the shards that are missing; the worker that finds all of them there seals."""
    faults = configs.Faults()
    with faults:
        device = stage.pick_device(config.device)
    with faults:
        teacher = teachers.load(config.teacher, "teacher")
        teacher.check_teaches("teacher")
        velocity = teacher.velocity(config.guidance)
        layout = shards.Layout(
            shape=teacher.shape,
            dtype=config.dtype,
            labels=teacher.classes is not None,
            shard_size=config.shard_size,
            block=min(config.block, config.shard_size),
        )
    with faults:
        folder = stores.at(config.run_dir)
        refuse_fewer(folder, config.shards)
    faults.check()
    inputs = {"teacher": teacher.digest}
    content = configs.content(config)
    fingerprint = manifest.fingerprint(
        {"format": PAIR_FORMAT, "config": content, "inputs": inputs, "round": teacher.round}
    )
    pairs = config.shards * config.shard_size
    evaluations: float | None = config.solver.evaluations  # a pair
    cost = "dopri5 chooses its evaluations"
    if evaluations is not None:
        evaluations += velocity.extra
        evaluations *= 1 if config.guidance == 1 else 2
        cost = f"{evaluations} evaluations a pair ({config.solver.name}), {pairs * evaluations:,} in all"
    plan = [
        f"{pairs:,} pairs of {list(teacher.shape)} in {config.shards} shards, "
        f"{config.shards * layout.tar_bytes / 1e6:,.1f} MB on disk",
        f"{type(teacher.net).__name__} of {teacher.net.num_parameters():,} parameters, on {device}: "
        f"{cost}",
    ]
    every = range(config.shards)

    def unfinished() -> bool:
        return bool(shards.missing(folder, every, fingerprint))

    if dry_run and not manifest.sealed(folder):
        plan.append(teachers.measure_batch(velocity, layout.shape, stage.worker_device(device)))
    if not stage.begin("generate_pairs", config, inputs, plan, dry_run, unfinished):
        return
    stage.exit_on_sigterm()
    folder.make()
    stage.write_config(config, inputs)
    make = Maker(config, layout, velocity, stage.worker_device(device))
    card = CARD.format(
        pairs=f"{pairs:,}",
        shape=list(teacher.shape),
        solver=how(config.solver, evaluations),
        guidance=config.guidance,
        digest=teacher.digest,
        labels=LABELS if layout.labels else "",
    )
    own = list(every)[stage.rank() :: stage.world_size()]

    def write(k: int, batches: Iterator[Batch]) -> None:
        environment = dict(make.environment)
        blocks = cut(batches, layout, environment)
        shards.write_shard(folder, k, layout, blocks, fingerprint, environment, card)

    shown = Progress(folder, every, fingerprint, config.shard_size, shown=stage.has_log())
    behind = Behind(write)
    todo = claims.claim(folder, own, every, fingerprint, config.lease_seconds, behind.settle)
    with shown, closing(todo), behind:  # left the other way round: leases outlast the writer
        for k in todo:
            behind.shard(k, make.batches(k))
    sidecars = dict(zip(every, shards.sidecars(folder, every), strict=True))
    if evaluations is None:  # a pair, as counted; the mean over all batches
        counts = [side["environment"]["evaluations"] for side in sidecars.values()]
        evaluations = sum(counts) / len(counts)
    manifest.seal(
        folder,
        stage="generate_pairs",
        config=configs.content(config),
        inputs=inputs,
        outputs={shards.tar_name(k): side["sha256"] for k, side in sidecars.items()},
        fingerprint=fingerprint,
        kind="generated",
        round=teacher.round,
        classes=teacher.classes,
        evaluations=evaluations,
        layout=asdict(layout),
        shards=config.shards,
        count=pairs,
        convention="x0 noise, x1 data, x_t = (1 - t) x0 + t x1, v = x1 - x0",
        **teacher.facts,
    )
    stage.say(f"generate_pairs: sealed {folder}")


def refuse_fewer(folder: stores.Store, number: int) -> None:
    """Raise UserError where a set has more shards than are asked for: stock readers take every tar."""
    there = max(shards.committed(folder), default=-1) + 1
    if manifest.sealed(folder):
        sealed = manifest.read(folder, "run_dir")["facts"].get("shards")
        there = max(there, sealed if isinstance(sealed, int) else 0)  # what is damaged is no number
    if there > number:
        raise UserError(
            f"shards={number}: run_dir={folder} has {there} already, and a set never shrinks; give "
            f"shards={there} or more, or another run_dir"
        )


@dataclass(frozen=True)
class Batch:
    """Pairs that were integrated together. x1: waits for them. evaluations: a pair, of the network."""

    x0: np.ndarray
    x1: Callable[[], np.ndarray]
    label: np.ndarray | None
    evaluations: int


class Maker:
    """Makes the pairs of a shard, batch by batch."""

    def __init__(
        self, config: PairsConfig, layout: shards.Layout, velocity: nets.Velocity, device: str
    ):
        velocity.net.to(device)
        if config.compile:  # every batch is a whole one: a single graph
            velocity.net.compile(fullgraph=True, dynamic=False)
        self.config, self.layout, self.velocity, self.device = config, layout, velocity, device
        self.environment: dict[str, Any] = {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "processor": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
            "threads": torch.get_num_threads(),
            "compile": config.compile,
        }
        torch.backends.cudnn.deterministic = True

    @torch.inference_mode()
    def batches(self, k: int) -> Iterator[Batch]:
        """Integrate shard k in batches of compute_batch; the last one is padded with the next ids.

        The noise is rounded to the stored dtype before it is integrated: a stored pair is exact.
        Nothing here waits for a GPU: it integrates while the noise of the next batch is drawn.
        """
        config, size = self.config, self.config.shard_size
        for start in range(0, size, self.config.compute_batch):
            ids = k * size + start + np.arange(config.compute_batch)
            x0 = noise.normal(config.seed, ids, self.layout.shape, noise.PAIR_NOISE)
            x0 = x0.astype(self.layout.dtype)
            label, cond = None, None
            if self.velocity.classes is not None:
                label = noise.labels(config.seed, ids, self.velocity.classes)
                cond = {"label": self.to_device(label)}
            before = self.velocity.evaluations
            x1 = self.velocity.carry(
                self.to_device(x0.astype(np.float32)),
                lambda v, x, span: solvers.solve(v, x, config.solver, span),
                cond,
            )
            keep = min(config.compute_batch, size - start)
            evaluations = self.velocity.evaluations - before
            yield Batch(
                x0[:keep], to_host(x1[:keep]), None if label is None else label[:keep], evaluations
            )

    def to_device(self, array: np.ndarray) -> Tensor:
        """Copy an array to where the network is, without waiting for what runs there."""
        tensor = torch.from_numpy(array)
        if self.device == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def to_host(x: Tensor) -> Callable[[], np.ndarray]:
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
    batches: Iterable[Batch], layout: shards.Layout, environment: dict[str, Any]
) -> Iterator[shards.Block]:
    """Cut the batches of a shard into the blocks of its layout, and note their mean evaluations."""
    held: list[shards.Block] = []
    counts = []
    for batch in batches:
        counts.append(batch.evaluations)
        held.append((batch.x0, batch.x1().astype(layout.dtype), batch.label))
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


def how(solver: SolverConfig, evaluations: float | None) -> str:
    """Say in words how the pairs were integrated."""
    if evaluations is None:
        return f"dopri5 to rtol {solver.rtol:g}, atol {solver.atol:g}"
    grid = "" if solver.grid == "uniform" else f" on a grid {solver.grid}"
    return (
        f"{solver.name} with {solver.steps} steps{grid}, {evaluations} network evaluations a pair"
    )


LABELS = ", `.y.npy` (class label, int64)"
CARD = """# Noise/sample pairs of a flow model

{pairs} pairs of shape {shape}, made by flowmatch for reflow: `x1` is where the teacher's flow carries
the noise `x0` (x_t = (1 - t) x0 + t x1, from t = 0 to 1), {solver},
guidance {guidance}. Teacher: sha256 {digest}.

The tars hold blocks of pairs: `.x0.npy` (noise), `.x1.npy` (sample){labels}, with the pairs of a block
along the first axis. `manifest.json` holds the full provenance and the sha256 of every tar.

```python
import glob, webdataset
for block in webdataset.WebDataset(sorted(glob.glob("*.tar")), shardshuffle=False).decode():
    x0, x1 = block["x0.npy"], block["x1.npy"]  # [block, ...]
```

```python
import datasets
pairs = datasets.load_dataset("path/of/this/folder", split="train").with_format("numpy")
```
"""


if __name__ == "__main__":
    stage.command("generate_pairs", PairsConfig, main, __doc__)
