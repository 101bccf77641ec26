"""Stage two: carry noise along the teacher's flow, and store where it ends: straight pairs.

With `data` the other way round: images are carried back to the noise that the teacher makes them from.

Noise i, its label and so pair i are functions of the config, the teacher and i alone. Workers share
the folder and nothing else: start any number of them, stop them, start others; the bytes are the same.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import Literal

import pydantic

from flowmatch import config as configs
from flowmatch.config import UserError, option, required
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.data.dataset import Data
from flowmatch.flow.config import SolverConfig
from flowmatch.models import precision, teachers
from flowmatch.models.config import Precision
from flowmatch.pairs import generator, leases, shards
from flowmatch.pairs.generator import Made, PairGenerator
from flowmatch.pairs.layout import Layout
from flowmatch.pairs.progress import ShardProgress
from flowmatch.pairs.writer import Writer
from flowmatch.runs import command, manifest, process, storage
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import begin, write_config
from flowmatch.runs.storage import Store


class PairsConfig(StageConfig):
    """Config of stage two."""

    teacher: str = required(
        "a sealed training stage (its EMA weights), a diffusers flow model, or a diffusers pipeline "
        "whose network predicts noise, data or v",
        run=True,
    )
    data: DataConfig | None = option(
        None, "invert this data: pair i is item i and its noise; default: generate from noise"
    )
    shards: int = required("number of shards; more of them extend a finished set", run=True, ge=1)
    shard_size: int = option(16384, "pairs in a shard, the unit of work and of retry", ge=1)
    block: int = option(64, "pairs in a tar member; choose it so that one is 0.25 to 4 MB", ge=1)
    compute_batch: int = option(256, "pairs integrated together; part of what comes out", ge=1)
    solver: SolverConfig = option(SolverConfig(), "how the teacher's ODE is solved")
    guidance: float = option(
        1.0, "classifier-free guidance scale w, baked into the pairs; 1 is none, others cost twice"
    )
    dtype: Literal["float16", "float32"] = option(
        "float16", "stored dtype; the noise stays exact; float32 with data", validate_default=True
    )
    precision: Precision = option(
        "fp32",
        "the network's arithmetic (tf32: float32, multiplied in fewer bits, on a GPU); the state that "
        "the solver carries stays float32",
    )
    compile: bool = option(
        False,
        "compile the network by torch.compile; alters rounding, so let all workers of a set agree",
        run=True,
    )
    lease_seconds: float = option(
        60.0, "a shard whose worker has not moved for so long is taken over", run=True, gt=0
    )

    @pydantic.field_validator("dtype")
    @classmethod
    def _exact(cls, dtype: str, info: pydantic.ValidationInfo) -> str:
        if info.data.get("data") is not None and dtype != "float32":
            raise ValueError("the noise of inverted data is found, not drawn; set dtype=float32")
        return dtype


def main(config: PairsConfig, dry_run: bool) -> None:
    """Plan, then make the shards that are missing; the worker that finds all of them there seals."""
    faults = configs.Faults()
    with faults:
        device = process.pick_device(config.device)
        precision.check("precision", config.precision, device)
    with faults:
        teacher = teachers.load(config.teacher, "teacher")
        teacher.check_teaches("teacher")
        velocity = teacher.velocity(config.guidance)
        layout = Layout(
            shape=teacher.shape,
            dtype=config.dtype,
            labels=teacher.classes is not None,
            shard_size=config.shard_size,
            block=min(config.block, config.shard_size),
            index=config.data is not None,
        )
    source = None
    if config.data is not None:
        with faults:
            source = dataset.load(config.data)
            check_data(source, teacher, config)
    with faults:
        folder = storage.at(config.run_dir)
        refuse_fewer(folder, config.shards)
    faults.check()
    inputs = {"teacher": teacher.digest} | ({"data": source.digest} if source else {})
    fingerprint = manifest.pair_fingerprint(configs.content(config), inputs, teacher.round)
    pairs = config.shards * config.shard_size
    evaluations: float | None = config.solver.evaluations  # a pair
    cost = "dopri5 chooses its evaluations"
    if evaluations is not None:
        evaluations += 0 if source else velocity.extra
        evaluations *= 1 if config.guidance == 1 else 2
        cost = f"{evaluations} evaluations a pair ({config.solver.name}), {pairs * evaluations:,} in all"
    plan = [
        f"{pairs:,} pairs of {list(teacher.shape)} in {config.shards} shards, "
        f"{config.shards * layout.tar_bytes / 1e6:,.1f} MB on disk",
        f"{type(teacher.net).__name__} of {teacher.net.num_parameters():,} parameters, on {device}: "
        f"{cost}",
    ]
    if source:
        plan.append(f"inverted: items 0 to {pairs - 1:,} of the {len(source):,} of the data")
    every = range(config.shards)

    def unfinished() -> bool:
        lacks_card = folder.sizes([shards.README]) == [None]
        return lacks_card or bool(shards.missing(folder, every, fingerprint))

    if dry_run and not manifest.sealed(folder):
        there = process.worker_device(device)
        plan.append(generator.measure_batch(velocity, layout.shape, there, config.precision))
    if not begin("generate_pairs", config, inputs, plan, dry_run, unfinished):
        return
    look = command.heed_sigterm()
    folder.make()
    write_config(config, inputs)
    make = PairGenerator(
        layout,
        velocity,
        process.worker_device(device),
        data=source,
        before_evaluation=look,
        **{
            name: getattr(config, name)
            for name in ("seed", "compute_batch", "solver", "precision", "compile")
        },
    )
    card = CARD.format(
        ends=INVERTED.format(digest=source.digest) if source else GENERATED,
        pairs=f"{pairs:,}",
        shape=list(teacher.shape),
        solver=how(config, evaluations),
        guidance=config.guidance,
        digest=teacher.digest,
        labels=(LABELS if layout.labels else "") + (INDEX if layout.index else ""),
    )
    shards.write_card(folder, card)
    own = list(every)[process.rank() :: process.world_size()]

    def write(k: int, made: Iterator[Made]) -> None:
        environment = dict(make.environment)
        blocks = generator.cut(made, layout, environment)
        shards.write_shard(folder, k, layout, blocks, fingerprint, environment, card)

    shown = ShardProgress(folder, every, fingerprint, config.shard_size, shown=process.has_log())
    behind = Writer(write)

    def settle() -> None:
        behind.settle()
        look()

    todo = leases.claim(folder, own, every, fingerprint, config.lease_seconds, settle)
    with shown, closing(todo), behind:  # left the other way round: leases outlast the writer
        for k in todo:
            behind.shard(k, make.batches(k))
    refuse_fewer(folder, config.shards)  # others may have made it grow meanwhile
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
        kind="inverted" if source else "generated",
        round=teacher.round,
        classes=teacher.classes,
        evaluations=evaluations,
        layout=layout.entries(),
        shards=config.shards,
        count=pairs,
        convention="x0 noise, x1 data, x_t = (1 - t) x0 + t x1, v = x1 - x0",
        **teacher.facts,
    )
    process.say(f"generate_pairs: sealed {folder}")


def check_data(source: Data, teacher: teachers.Teacher, config: PairsConfig) -> None:
    """Raise UserError where data is not what the teacher makes, or has fewer items than pairs."""
    faults, count, pairs = [], len(source), config.shards * config.shard_size
    if source.shape != teacher.shape:
        faults.append(
            f"data: samples are {list(source.shape)}; the teacher's are {list(teacher.shape)}"
        )
    if source.classes != teacher.classes:
        faults.append(
            f"data: {source.classes or 'no'} classes (data.labels={source.classes is not None}); the "
            f"teacher has {teacher.classes or 'none'}"
        )
    if pairs > count:
        whole = max(d for d in range(1, min(config.shard_size, count) + 1) if count % d == 0)
        faults.append(
            f"shards={config.shards} x shard_size={config.shard_size} are {pairs:,} pairs; the data has "
            f"{count:,} items: use at most shards={count // config.shard_size}, or to invert all of "
            f"them shards={count // whole} shard_size={whole}"
        )
    if faults:
        raise UserError(faults)


def refuse_fewer(folder: Store, number: int) -> None:
    """Raise UserError where a set has more shards than are asked for: stock readers take every tar."""
    there = max(shards.committed(folder), default=-1) + 1
    if (sealed := manifest.find(folder, "run_dir")) is not None:
        number_then = sealed["facts"].get("shards")  # what is damaged is no number
        there = max(there, number_then if isinstance(number_then, int) else 0)
    if there > number:
        raise UserError(
            f"shards={number}: run_dir={folder} has {there} already, and a set never shrinks; give "
            f"shards={there} or more, or another run_dir"
        )


def how(config: PairsConfig, evaluations: float | None) -> str:
    """Say in words how the pairs are integrated."""
    solver = config.solver
    rounded = "" if config.precision == "fp32" else f", the network in {config.precision}"
    if evaluations is None:
        return f"dopri5 to rtol {solver.rtol:g}, atol {solver.atol:g}{rounded}"
    grid = "" if solver.grid == "uniform" else f" on a grid {solver.grid}"
    return (
        f"{solver.name} with {solver.steps} steps{grid}, {evaluations} network evaluations a pair"
        f"{rounded}"
    )


GENERATED = """`x1` is where the teacher's flow carries
the noise `x0` (x_t = (1 - t) x0 + t x1, from t = 0 to 1)"""
INVERTED = """`x0` is where the teacher's flow,
followed backward (x_t = (1 - t) x0 + t x1, from t = 1 to 0), carries the sample `x1` of a data set
(sha256 {digest})"""
INDEX = ", `.i.npy` (the sample's number in the data, int64)"
LABELS = ", `.y.npy` (class label, int64)"
CARD = """# Noise/sample pairs of a flow model

{pairs} pairs of shape {shape}, made by flowmatch for reflow: {ends},
{solver}, guidance {guidance}. Teacher: sha256 {digest}.

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
    command.command("generate_pairs", PairsConfig, main, __doc__)
