"""Pipelines that read prompts as teachers: loaded, learnt by watching, and followed.

A teacher's pairs come from its own run, with its scheduler and its guidance, from noise of ours; or, for
a flow, from our solvers on the velocity that was learnt. A student is trained on the same network's
terms, called once a sample, without guidance.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data import prompts as lists
from flowmatch.data.config import PromptsConfig
from flowmatch.data.prompts import PromptList
from flowmatch.models import adapters, learn
from flowmatch.models.conditions import Conditions, Encoded, check_lengths
from flowmatch.models.config import CallConfig
from flowmatch.models.digest import files_digest, network_digest, pipeline_digest
from flowmatch.models.own_run import OwnRun
from flowmatch.models.pipeline import is_pipeline, open_pipeline
from flowmatch.models.rows import Stored
from flowmatch.models.schedule import Schedule, ZeroTerminal, betas_of
from flowmatch.models.script import Script
from flowmatch.models.teachers import (
    TRAINED,
    Teacher,
    checkpoint_of,
    load_made,
    read_made,
    run_of,
    steps_of,
)
from flowmatch.models.text_velocity import TextVelocity
from flowmatch.models.velocity import Velocity
from flowmatch.runs import manifest

BUILT = "tiny_pipeline"  # the stage whose folder is a pipeline


@dataclass(frozen=True)
class TextTeacher(Teacher):
    """A pipeline that reads prompts, as a teacher or as a start.

    Attributes:
        pipe: The pipeline.
        script: What was learnt of it.
        call: Arguments of its call.
        prompts: The prompts.
        schedule: Where its network predicts v for a student's form: after a reflow of a diffusion.
        table: Conditions that were encoded before; then `pipe` has no text encoders, and is not run.
    """

    pipe: Any = None
    script: Script = None  # type: ignore[assignment]
    call: dict[str, Any] = None  # type: ignore[assignment]
    prompts: PromptList = None  # type: ignore[assignment]
    schedule: ZeroTerminal | None = None
    table: Conditions | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the state of one sample."""
        return self.script.shape

    @property
    def classes(self) -> int | None:
        """Number of prompts K."""
        return len(self.prompts)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest of its pairs holds beyond what it holds for a plain flow model."""
        weights = next(self.net.parameters()).dtype
        return {
            "script": self.script.entries(),
            "call": self.call,
            "prompts": {"count": len(self.prompts), "digest": self.prompts.digest},
            "weights": str(weights).removeprefix("torch."),
        }

    @property
    def lines(self) -> list[str]:
        """What a plan says of it: how its network is called, and what switches guidance off."""
        script = self.script
        off = ", ".join(f"{name}={value:g}" for name, value in script.off.items())
        clock = "noise level" if script.kind == "flow" else "timestep"
        times = f"{script.slope:g} * {clock}" + (f" + {script.offset:g}" if script.offset else "")
        lines = [
            f"{script.pipeline}: {script.network}({script.sample}, {script.time} = {times}) predicts "
            f"{script.kind}; without guidance: {off or 'as it is called'}",
            f"{len(self.prompts):,} prompts, {script.steps} steps a run",
        ]
        if script.replayed is not None:
            lines.append(
                f"replayed on other prompts, noise and steps: the network's answers differ by "
                f"{script.replayed:.1g} of the largest"
            )
        if script.rides:
            lines.append("samples depend on the longest prompt of their batch, which rides along")
        return lines

    @property
    def two_times(self) -> bool:
        """Whether it predicts average velocities: never."""
        return False

    @property
    def whole_call(self) -> dict[str, Any]:
        """The arguments of its call, with the negative prompt."""
        negative = self.prompts.negative
        return self.call | ({} if negative is None else {"negative_prompt": negative})

    def conditions(self) -> Conditions:
        """Return its conditions: a table that was made before, or encoded when they are asked for."""
        return self.table or self.encoded()

    def encoded(self) -> Encoded:
        """Return its conditions, encoded when they are asked for."""
        prompts = self.prompts
        null = prompts.negative or ""
        return Encoded(self.pipe, self.script, self.call, prompts.texts, null, prompts.longest)

    def velocity(self, guidance: float = 1.0) -> Velocity:
        """Return its velocity, which may run the pipeline itself."""
        parts = (self.net, self.script, self.conditions(), self.schedule, guidance)
        return OwnRun(self.pipe, self.whole_call, self.prompts, *parts)

    def field(self, net: Any) -> Callable[[Any], Velocity]:
        """Return what makes the velocity of a student of `net`, or of its wrapper, in training."""
        return self._field(net, self.student_schedule())

    def own_field(self, net: Any) -> Callable[[Any], Velocity]:
        """Return what makes the velocity of `net`, which predicts what the pipeline's network does."""
        return self._field(net, self.own_schedule())

    def own_velocity(self, net: Any, guidance: float = 1.0) -> Velocity:
        """Return the velocity of `net`, which predicts what the pipeline's network does."""
        return TextVelocity(net, self.script, self.conditions(), self.own_schedule(), guidance)

    @property
    def can_sample(self) -> bool:
        """Whether few Euler steps of its network, as it is, are those of a student."""
        return self.script.kind == "flow" or self.schedule is not None

    def _field(self, net: Any, schedule: Schedule | None) -> Callable[[Any], Velocity]:
        table = self.conditions()

        def made(net: Any) -> TextVelocity:
            return TextVelocity(net, self.script, table, schedule)

        return made

    @property
    def student_facts(self) -> dict[str, Any]:
        """What the manifest of a student holds of it."""
        facts = {name: self.facts[name] for name in ("script", "call", "prompts")}
        return facts | {"form": "velocity" if self.student_schedule() is None else "v"}

    @property
    def own_facts(self) -> dict[str, Any]:
        """What the manifest of a network holds of it that predicts what the pipeline's own does."""
        form = "velocity" if self.script.kind == "flow" else self.script.kind
        return self.student_facts | {"form": form}

    def student_schedule(self) -> ZeroTerminal | None:
        """Return the schedule of a student: None for a flow."""
        if self.schedule is not None or self.script.kind == "flow":
            return self.schedule
        return ZeroTerminal(betas_of(self.pipe.scheduler))

    def student_grid(self, steps: int) -> Tensor:
        """Return the times of so many Euler steps of a student of it, float64 [steps + 1]."""
        schedule = self.student_schedule()
        return super().student_grid(steps) if schedule is None else schedule.grid(steps)

    def own_schedule(self) -> Schedule | None:
        """Return the schedule of the pipeline's own network: None for a flow."""
        if self.script.kind == "flow":
            return None
        return Schedule(self.pipe.scheduler.alphas_cumprod.double(), self.script.kind)


def load(
    path: str | os.PathLike[str],
    key: str,
    prompts: PromptsConfig | PromptList,
    call: CallConfig,
    *,
    truncate: str = "prompts",
    run_folder: str = "set pipeline= to the pipeline of its network",
    pipeline: str | None = None,
    rows: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    merged: bool = True,
) -> TextTeacher:
    """Load a pipeline that reads prompts, and learn it.

    Args:
        path: A pipeline; or a sealed run folder of a training stage, whose network is put in the place
            of that of `pipeline`.
        key: Name of the config's key, for the messages.
        prompts: The prompts, or the captions of pictures.
        call: Arguments of the pipeline's call.
        truncate: The key whose `truncate` allows prompts to be cut, for the messages; "" to allow it.
        run_folder: What to do where `path` is a run folder and `pipeline` is missing, for the message.
        pipeline: The pipeline of a run folder.
        rows: A sealed folder of encode_prompts, made with this pipeline and call. Its text encoders are
            not loaded then, and nothing is run: the network stays on the CPU, the rows go to `device`.
        dtype: Of the weights of a teacher.
        device: Where it is watched; it stays there.
        merged: Whether the adapter of a run folder is put into the weights; else it stands beside them.

    Returns:
        The teacher.

    Raises:
        UserError: It cannot be loaded or learnt.
        NotReady: It is not made yet.
    """
    where, (folder, _), trained = f"{key}={path}", run_of(path), None
    unfinished = (folder / "config.yaml").is_file() and not is_pipeline(folder)
    if checkpoint_of(path) is not None:
        trained = read_made(path, key)
    elif unfinished or manifest.sealed(folder):
        made = manifest.read(folder, key, (*TRAINED, BUILT))
        if made["stage"] == BUILT:
            manifest.verify(folder, key, made)
        else:
            trained = made
    source = path if trained is None else pipeline
    if source is None:
        raise UserError(f"{where} is a run folder; {run_folder}")
    if trained is None and not is_pipeline(path) and Path(path).is_dir():
        raise UserError(f"{where} is no pipeline with a text encoder; leave prompts out")
    if isinstance(prompts, PromptsConfig):
        truncate = "" if prompts.truncate else truncate
        prompts = lists.load(prompts)
    given = call.model_dump()
    table = None if rows is None else Stored(rows, "conditions", device)
    pipe = open_pipeline(source, key if trained is None else "pipeline", dtype, table is None)
    if table is None:
        pipe.to(device)
        script = learn.learn(pipe, given | _negative(prompts), where)
    else:
        script = Script.of(table.sealed["facts"]["script"])
        check_rows(table, pipe, prompts, given)
    absent = None if table is None else table.sealed["facts"].get("parts")
    if table is None and truncate:
        check_lengths(pipe, prompts, given, truncate)
    teacher = TextTeacher(
        getattr(pipe, script.network).eval(),
        pipeline_digest(pipe, script, absent),
        0,
        pipe=pipe,
        script=script,
        call=given,
        prompts=prompts,
        table=table,
    )
    if trained is None:
        return teacher
    student = with_network(teacher, path, key, trained, merged)
    if student.net is teacher.net:
        return replace(student, digest=manifest.fingerprint([teacher.digest, student.digest]))
    setattr(pipe, script.network, student.net)
    return replace(student, digest=pipeline_digest(pipe, script, absent))


def with_network(
    teacher: TextTeacher,
    path: str | os.PathLike[str],
    key: str,
    sealed: dict[str, Any],
    merged: bool = True,
) -> TextTeacher:
    """Load the network of a training stage, with all else of a pipeline, which stays as it is.

    An adapter is put into the weights of a copy of the pipeline's network; or, unmerged, into the
    network itself, which then has it beside its weights.
    """
    weights, facts = next(teacher.net.parameters()), sealed["facts"]
    adapted = facts.get("base") is not None
    if adapted:
        if facts["base"] != files_digest(teacher.net):
            raise UserError(
                f"{key}={path} is an adapter of another network than that of the given pipeline; name "
                "the pipeline of its training"
            )
        folder, name = run_of(path)
        manifest.verify(folder, key, sealed)
        if merged:
            net = adapters.apply(teacher.net, folder / name, facts["lora"])
        else:
            net = teacher.net
            adapters.put(net, folder / name, facts["lora"])
    else:
        net = load_made(path, key, sealed).to(weights.device).eval()
    if weights.dtype != torch.float32 and net is not teacher.net:
        net.to(weights.dtype)
    schedule = ZeroTerminal(betas_of(teacher.pipe.scheduler)) if facts.get("form") == "v" else None
    return replace(
        teacher,
        net=net,
        digest=facts["net"] if adapted else network_digest(net),
        round=facts["round"],
        for_steps=steps_of(facts),
        features=tuple(facts.get("features", ())),
        schedule=schedule,
    )


def check_rows(table: Stored, pipe: Any, prompts: PromptList, call: dict[str, Any]) -> None:
    """Check that stored conditions were made with a pipeline, a list of prompts, and a call.

    Raises:
        UserError: They were made with others.
    """
    facts = table.sealed["facts"]
    ours = {
        "pipeline": type(pipe).__name__,
        "call": call,
        "prompts": {"count": len(prompts), "digest": prompts.digest},
    }
    theirs = {"pipeline": facts["script"]["pipeline"]} | {n: facts[n] for n in ("call", "prompts")}
    faults = [
        f"conditions={table.folder} was made with {name} {theirs[name]}; here it is {ours[name]}: "
        "repeat encode_prompts with these, or leave conditions out"
        for name in ours
        if ours[name] != theirs[name]
    ]
    if faults:
        raise UserError(faults)


def _negative(prompts: PromptList) -> dict[str, str]:
    return {} if prompts.negative is None else {"negative_prompt": prompts.negative}


def freeze_unused(net: Any, field: Callable[[Any], Velocity], shape: tuple[int, ...]) -> list[str]:
    """Freeze the parameters that the network's answer does not depend on, as DDP needs it.

    Returns:
        Their names.
    """
    first = next(net.parameters())
    device, half = first.device, first.dtype != torch.float32
    x, t = torch.zeros(1, *shape, device=device), torch.full((1,), 0.5, device=device)
    with torch.autocast(device.type, first.dtype if half else torch.bfloat16, enabled=half):
        v = field(net)(x, t, {"label": torch.zeros(1, dtype=torch.long)})
    v.sum().backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None]
    for name, parameter in net.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.requires_grad and name not in unused)
    return unused
