"""Stage two: integrate the teacher's flow from noise, and store where it ends: straight pairs.

With `data` in the other direction: images are integrated back to the noise that they come from.

Noise i, its label and so pair i are functions of the config, the teacher and i alone. Workers share
the folder and nothing else: start any number of them, stop them, start others; the bytes are the same.
"""

from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flowmatch.config import UserError, content, counted, require, together
from flowmatch.pairs.config import PairsConfig
from flowmatch.runs import command, folder, manifest, process, stopping, storage

if TYPE_CHECKING:
    from flowmatch.data.dataset import Data
    from flowmatch.models.teachers import Teacher
    from flowmatch.models.velocity import Velocity
    from flowmatch.pairs.generator import Made
    from flowmatch.pairs.layout import Layout


@dataclass
class Plan(folder.Plan):
    """The teacher's velocity, the layout of the shards, and the data to invert."""

    in_store: ClassVar[bool] = True
    device: str
    teacher: "Teacher"
    velocity: "Velocity"
    layout: "Layout"
    source: "Data | None"
    fingerprint: str
    evaluations: float | None  # a pair; None: dopri5 chooses
    texts: list[str]  # prompts by number
    times: list[float]  # of the states that are kept

    @property
    def store(self) -> storage.Store:
        """The folder or store of the set."""
        return storage.at(self.config.run_dir)

    @property
    def count(self) -> int:
        """Number of pairs of the set."""
        return self.config.shards * self.config.shard_size

    def reopen(self) -> bool:
        """Check whether a finished set lacks shards, or its card."""
        from flowmatch.pairs import shards

        lacks_card = self.store.sizes([shards.README]) == [None]
        every = range(self.config.shards)
        return lacks_card or bool(shards.missing(self.store, every, self.fingerprint))

    def measure(self) -> list[str]:
        """Measure what fits, and how long it takes, where nothing is sealed yet."""
        from flowmatch.pairs import generator, rehearsal

        with suppress(storage.Unread):
            if manifest.sealed(self.store):
                return []
        there, precision = process.worker_device(self.device), self.config.precision
        lines = []
        if not self.texts:
            lines = [generator.measure_batch(self.velocity, self.layout.shape, there, precision)]
        if self.evaluations is None or self.source is not None:
            return lines
        how = (self.velocity, self.config.solver, self.config.compute_batch, precision)
        words = (self.count, self.evaluations, process.world_size(), there)
        return lines + rehearsal.lines(self.teacher, *words, *how)


def plan(config: PairsConfig) -> Plan:
    """Check the config, load the teacher, and lay out the shards."""
    from flowmatch.data import dataset
    from flowmatch.models import precision
    from flowmatch.pairs import path_times, shards
    from flowmatch.pairs.layout import Layout, bytes_per_pair

    def check_device() -> str:
        device = process.device_of(config)
        precision.check("precision", config.precision, device)
        if device == "mps" and (config.solver.name == "dopri5" or config.solver.state == "float64"):
            raise UserError(
                "device='mps' has no float64: use a solver of fixed steps with solver.state=float32, or "
                "device=cpu"
            )
        if config.solver.name == "dopri5":
            require("torchdiffeq", "eval", "solver.name=dopri5")
        return device

    def load_teacher() -> "tuple[Teacher, Velocity, Layout, list[float]]":
        teacher = load(config)
        teacher.check_teaches("teacher")
        texts = texts_of(teacher)
        layout = Layout(
            shape=teacher.shape,
            dtype=config.dtype,
            labels=teacher.classes is not None,
            shard_size=config.shard_size,
            block=min(config.block, config.shard_size),
            index=config.data is not None,
            prompt_bytes=bytes_per_pair(texts) if texts else 0,
            noise=config.x0 == "stored",
            states=len(config.states),
        )
        velocity = teacher.velocity(config.guidance)
        return teacher, velocity, layout, path_times.of(config, velocity)

    def check_store() -> list[str]:
        try:
            if config.per_image is None:
                shards.refuse_fewer(storage.at(config.run_dir), config.shards)
        except storage.Unread as error:
            return [f"later: run_dir={line}" for line in error.faults]
        return []

    device, (teacher, velocity, layout, times), source, later = together(
        check_device,
        load_teacher,
        lambda: None if config.data is None else dataset.load(config.data),
        check_store,
    )
    if config.per_image is not None:
        config = config.over(teacher.samples)
        shards.refuse_fewer(storage.at(config.run_dir), config.shards)
    if source is not None:
        check_data(source, teacher, config)
    inputs = {"teacher": teacher.digest} | ({"data": source.digest} if source else {})
    if config.prompts is not None:
        inputs["prompts"] = teacher.facts["prompts"]["digest"]
    fingerprint = manifest.pair_fingerprint(content(config), inputs, teacher.round)
    count = config.shards * config.shard_size
    own = config.solver.name == "own"
    evaluations: float | None = None if own else config.solver.evaluations
    cost = "dopri5 chooses its evaluations"
    if evaluations is not None:
        evaluations += 0 if source else velocity.extra
        evaluations *= 1 if config.guidance == 1 else 2
        cost = f"{evaluations} evaluations a pair ({config.solver.name}), {count * evaluations:,} in all"
    if own:
        evaluations = teacher.facts["script"]["evaluations"]
        cost = (
            f"its own run, {evaluations} evaluations a pair, {count * (evaluations or 0):,} in all"
        )
    lines = [
        f"{count:,} pairs of {list(teacher.shape)} in {counted(config.shards, 'shard')}, "
        f"{config.shards * layout.tar_bytes / 1e6:,.1f} MB on disk",
        f"{type(teacher.net).__name__} of {teacher.net.num_parameters():,} parameters, on {device}: "
        f"{cost}",
        *process.untested(device),
    ]
    if source:
        lines.append(f"inverted: items 0 to {count - 1:,} of the {len(source):,} of the data")
        lines += source.notes
    if times:
        lines.append(f"states of each path are kept at t = {', '.join(f'{t:.4g}' for t in times)}")
    lines += [*teacher.lines, *later]
    opened = (device, teacher, velocity, layout, source)
    return Plan(config, inputs, lines, *opened, fingerprint, evaluations, texts_of(teacher), times)


def load(config: PairsConfig) -> "Teacher":
    """Load the teacher: a flow or diffusion model, or a pipeline that reads prompts."""
    from flowmatch.models import teachers

    if config.prompts is None:
        return teachers.load(config.teacher, "teacher")
    import torch

    from flowmatch.models import text

    teacher = text.load(
        config.teacher,
        "teacher",
        config.prompts,
        config.call,
        pipeline=config.pipeline,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        device=process.worker_device(process.device_of(config)),
    )
    own, velocity = config.solver.name == "own", teacher.schedule or teacher.script.kind == "flow"
    if own and teacher.round:
        raise UserError(
            f"solver.name=own: teacher={config.teacher} is a student, with guidance in it, which its "
            "pipeline's own run would guide again; name a solver, such as solver.name=ab2"
        )
    if not own and not velocity:
        raise UserError(
            f"solver.name={config.solver.name}: the network of teacher={config.teacher} predicts "
            f"{teacher.script.kind}; use solver.name=own, its own run"
        )
    return teacher


def texts_of(teacher: "Teacher") -> list[str]:
    """Return the prompts of a teacher by number; none for one that reads no text."""
    prompts = getattr(teacher, "prompts", None)
    return [] if prompts is None else prompts.texts


def run(plan: Plan) -> None:
    """Make the missing shards; the worker that finds all of them there seals the set."""
    with stopping.heard("generate_pairs", defer=True):  # no lease is left half made
        make_shards(plan)
    seal(plan)


def make_shards(plan: Plan) -> None:
    """Make the missing shards, together with the other workers."""
    from flowmatch.pairs import generator, leases, shards
    from flowmatch.pairs.progress import ShardProgress
    from flowmatch.pairs.writer import Writer

    config: PairsConfig = plan.config
    layout, store = plan.layout, plan.store
    store.make()
    folder.write_config(config, plan.inputs)
    make = generator.PairGenerator(
        layout,
        plan.velocity,
        process.worker_device(plan.device),
        data=plan.source,
        before_evaluation=stopping.leave_if_asked,
        seed=config.seed,
        compute_batch=config.compute_batch,
        solver=config.solver,
        precision=config.precision,
        compile=config.compile,
        times=plan.times,
    )
    card = card_of(plan)
    shards.write_card(store, card)
    every = range(config.shards)
    own = list(every)[process.rank() :: process.world_size()]

    def write(k: int, made: "Iterator[Made]") -> None:
        environment = dict(make.environment)
        blocks = generator.cut(made, layout, environment, plan.texts)
        try:
            shards.write_shard(store, k, layout, blocks, plan.fingerprint, environment, card)
        except shards.Vanished:
            process.say(f"generate_pairs: another worker removed half of shard {k}: made again")

    progress = ShardProgress(
        store, every, plan.fingerprint, config.shard_size, shown=process.has_log()
    )
    writer = Writer(write)

    def settle() -> None:
        writer.settle()
        stopping.leave_if_asked()

    todo = leases.claim(store, own, every, plan.fingerprint, config.lease_seconds, settle)
    # left in reverse order: the leases outlast the writer
    with progress, closing(todo), writer:
        for k in todo:
            writer.shard(k, make.batches(k))
    shards.refuse_fewer(store, config.shards)  # other workers may have grown the set meanwhile


def seal(plan: Plan) -> None:
    """Write the manifest of a set whose shards are all committed."""
    from flowmatch.pairs import shards

    config, evaluations = plan.config, plan.evaluations
    every = range(config.shards)
    sidecars = {
        k: side for k, side in zip(every, shards.sidecars(plan.store, every), strict=True) if side
    }
    if evaluations is None:  # a pair, as counted; the mean over all batches
        counts = [side["environment"]["evaluations"] for side in sidecars.values()]
        evaluations = sum(counts) / len(counts)
    manifest.seal(
        plan.store,
        stage="generate_pairs",
        config=content(config),
        inputs=plan.inputs,
        outputs={shards.tar_name(k): side["sha256"] for k, side in sidecars.items()},
        fingerprint=plan.fingerprint,
        kind="inverted" if plan.source else "generated",
        round=plan.teacher.round,
        classes=plan.teacher.classes,
        evaluations=evaluations,
        layout=plan.layout.entries(),
        shards=config.shards,
        count=plan.count,
        convention="x0 noise, x1 data, x_t = (1 - t) x0 + t x1, v = x1 - x0",
        **({"times": plan.times} if plan.times else {}),
        **plan.teacher.facts,
    )
    process.say(f"generate_pairs: sealed {plan.store}")


def intact(config: PairsConfig, sealed: dict[str, Any]) -> bool:
    """Check that a finished set has its shards, as many as the config asks for, and its card."""
    from flowmatch.pairs import shards

    store, facts = storage.at(config.run_dir), sealed["facts"]
    if facts.get("shards") != config.shards or store.sizes([shards.README]) == [None]:
        return False
    return not shards.missing(store, range(config.shards), facts["fingerprint"])


def check_data(source: "Data", teacher: "Teacher", config: PairsConfig) -> None:
    """Raise UserError where the data do not match the teacher's samples, or are fewer than the pairs."""
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


def card_of(plan: Plan) -> str:
    """Write the card of a set, the README.md of its folder."""
    from flowmatch.pairs import card

    config = plan.config
    return card.text(
        plan.count,
        plan.layout,
        card.describe(config.solver, plan.evaluations, config.precision),
        config.guidance,
        plan.teacher.digest,
        None if plan.source is None else plan.source.digest,
        plan.teacher.names,
    )


STAGE = command.Stage("generate_pairs", PairsConfig, plan, run, __doc__, intact)

if __name__ == "__main__":
    command.main(STAGE)
