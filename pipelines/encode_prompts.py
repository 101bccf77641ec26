"""Encode the prompts of a pipeline once: a row of the network's arguments for each, which reflow reads.

Stage three then loads no text encoder. Workers share the folder and nothing else; start any number of
them, stop them, start others: each file is a function of the config and its number.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flowmatch.config import LocalPath, content, counted, option, required
from flowmatch.data.config import PromptsConfig
from flowmatch.models.config import CallConfig
from flowmatch.runs import command, folder, manifest, process, stopping
from flowmatch.runs.config import StageConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowmatch.models.text import TextTeacher


class EncodeConfig(StageConfig):
    """Config of the encoding of prompts."""

    stage: ClassVar[str] = "encode_prompts"

    teacher: LocalPath = required(
        "a diffusers pipeline that reads text: a folder or a hub name", run=True
    )
    prompts: PromptsConfig = required("the prompts")
    call: CallConfig = option(CallConfig(), "arguments of the pipeline's call")
    shard_size: int = option(1024, "prompts in a file, the unit of work", ge=1)
    batch_size: int = option(16, "prompts that are encoded together; changes rounding", ge=1)


@dataclass
class Plan(folder.Plan):
    """The pipeline, learnt, and its axes of the batch."""

    teacher: "TextTeacher"
    axes: Any
    form: Any
    shared: dict[str, Any]

    @property
    def rows(self) -> int:
        """Number of rows: of the prompts, and of the null prompt."""
        return len(self.teacher.prompts) + 1

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.rows // self.config.shard_size)


def plan(config: EncodeConfig) -> Plan:
    """Load and learn the pipeline, and encode one prompt to see what a row is."""
    from flowmatch.models import rows, text

    device = process.worker_device(process.device_of(config))
    teacher = text.load(config.teacher, "teacher", config.prompts, config.call, device=device)
    table, shared = teacher.encoded(), {}  # type: ignore[var-annotated]
    first = table.encode([table.longest] * 2)
    form = rows.form_of(first, table.axes, "", shared)
    row = rows.rows_of(first, form, 1)[0]
    size = sum(tensor.nbytes for tensor in row.values())
    inputs = {"teacher": teacher.digest, "prompts": teacher.prompts.digest}
    made = Plan(config, inputs, [], teacher, table.axes, form, shared)
    made.lines += [
        f"{made.rows:,} rows (the last is the null prompt) in {counted(made.shards, 'file')}, "
        f"{size / 1e3:,.1f} kB a row, {made.rows * size / 1e6:,.1f} MB on disk",
        *teacher.lines,
    ]
    return made


def run(plan: Plan) -> None:
    """Encode the missing files; the worker that finds all of them seals the folder."""
    with stopping.heard("encode_prompts", defer=True):
        encode(plan)


def encode(plan: Plan) -> None:
    """Encode the missing files, and seal the folder."""
    from contextlib import closing

    from flowmatch.models import digest, rows
    from flowmatch.pairs import leases
    from flowmatch.runs import files, storage

    config: EncodeConfig = plan.config
    place = Path(config.run_dir)
    storage.at(config.run_dir).make()
    folder.write_config(config, plan.inputs)
    if process.leads():
        rows.write_shared(place, plan.form, plan.shared)
    table, every = plan.teacher.encoded(), range(plan.shards)
    own = list(every)[process.rank() :: process.world_size()]

    whole: set[int] = set()  # hashed once

    def missing(store: Any, numbers: "Sequence[int]", fingerprint: str) -> list[int]:
        left = [k for k in numbers if k not in whole]
        whole.update(k for k in left if files.committed(place / rows.file_name(k)))
        return [k for k in left if k not in whole]

    if there := plan.shards - len(missing(place, every, "")):
        process.say(
            f"encode_prompts: resumes: {there} of {counted(plan.shards, 'file')} made before"
        )
    with closing(leases.claim(place, own, every, "", missing=missing)) as todo:
        for k in todo:
            begin = k * config.shard_size
            end = min(begin + config.shard_size, plan.rows)
            made: list[Any] = []
            for at in range(begin, end, config.batch_size):
                stopping.leave_if_asked()
                numbers = [i if i < end else end - 1 for i in range(at, at + config.batch_size)]
                batch = table.encode([*(table.texts[i] for i in numbers), table.longest])
                made += rows.rows_of(batch, plan.form, min(at + config.batch_size, end) - at)
            rows.write_rows(place, k, made)
            process.say(f"encode_prompts: {k + 1} of {plan.shards} files")
    if not process.leads() and not (place / rows.FORM).exists():
        return  # rank 0 writes it, and seals
    teacher = plan.teacher
    manifest.seal(
        place,
        stage="encode_prompts",
        config=content(config),
        inputs=plan.inputs,
        outputs=[rows.FORM, rows.SHARED, *(rows.file_name(k) for k in every)],
        shard_size=config.shard_size,
        parts=digest.parts_of(teacher.pipe, teacher.script),
        **teacher.facts,
    )
    process.say(f"encode_prompts: sealed {place}")


STAGE = command.Stage("encode_prompts", EncodeConfig, plan, run, __doc__)

if __name__ == "__main__":
    command.main(STAGE)
