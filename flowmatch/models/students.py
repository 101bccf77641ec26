"""Students of pipelines that read prompts: a network in the terms of its teacher's."""

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowmatch.config import UserError
from flowmatch.data.config import PromptsConfig
from flowmatch.models import teachers, text
from flowmatch.models.config import CallConfig
from flowmatch.models.pipeline import is_pipeline
from flowmatch.models.teachers import Teacher, read_made, run_of
from flowmatch.models.text import TextTeacher, with_network
from flowmatch.runs import manifest

TERMS = (
    *("pipeline", "network", "sample", "time", "kind", "slope", "offset", "sign", "half"),
    *("direction", "shape"),
)  # of a script: how a network is called
DIFFUSION = ("epsilon", "sample", "v_prediction")  # forms of a network that is no student


def load(
    teacher: TextTeacher, path: str | os.PathLike[str], key: str, merged: bool = True
) -> TextTeacher:
    """Load a student of a pipeline, with which it shares all but the network.

    Args:
        teacher: The pipeline.
        path: A sealed run folder of a training stage with prompts, or a checkpoint of one.
        key: Name of the config's key, for the messages.
        merged: As in `text.with_network`.

    Returns:
        The student; its digest is that of its network.

    Raises:
        UserError: It is of another pipeline, or of none.
        NotReady: It is not made yet.
    """
    sealed = read_made(path, key)
    script, own = sealed["facts"].get("script"), teacher.script.entries()
    if script is None:
        raise UserError(
            f"{key}={path} was trained without prompts; name a run of reflow with prompts"
        )
    if sealed["facts"]["form"] in DIFFUSION:
        raise UserError(
            f"{key}={path} predicts {sealed['facts']['form']}, as its pipeline's own network does: "
            "it is a teacher; name a reflow of it"
        )
    terms = [f"{n}: {own[n]} -> {script.get(n)}" for n in TERMS if script.get(n) != own[n]]
    if terms:
        raise UserError(
            f"{key}={path} is of another pipeline than teacher: {'; '.join(terms)}; name its own teacher"
        )
    return with_network(teacher, path, key, sealed, merged)


def load_pair(
    start: str,
    teacher: str | None,
    prompts: PromptsConfig | None,
    call: CallConfig,
    *,
    pipeline: str | None,
    adapted: bool,
    **more: Any,
) -> tuple[Teacher, Teacher | None]:
    """Load a student and perhaps its teacher; with prompts they share all but the network.

    Args:
        start: As in `teachers.load`, or in `text.load` with prompts.
        teacher: Likewise; or None.
        prompts: The prompts; None for networks that read none.
        call: Arguments of the pipeline's call.
        pipeline: As in `text.load`; no other than a teacher that is a pipeline.
        adapted: Whether the student is trained as an adapter, which a start that has one keeps beside
            its weights. Both then share the network, too.
        more: As in `text.load`.

    Returns:
        Both.

    Raises:
        UserError: They do not belong together, or cannot be loaded.
        NotReady: One is not made yet.
    """
    if prompts is None:
        student = teachers.load(start, "start")
        found = None if teacher is None else teachers.load(teacher, "teacher")
        if adapted and found is not None:
            if found.digest != student.digest:
                raise UserError(_apart(start, teacher))
            found = student
        return student, found
    more |= {"pipeline": pipeline}
    if teacher is None:
        return text.load(start, "start", prompts, call, merged=not adapted, **more), None
    if _pipeline(teacher) and pipeline not in (None, teacher):
        raise UserError(
            f"pipeline={pipeline}: with method.name=dmd it is that of teacher={teacher}; leave it out"
        )
    pipe = text.load(teacher, "teacher", prompts, call, **more)
    if is_pipeline(teacher):  # an export is one
        made_by = manifest.find(teacher, "teacher", ("export", text.BUILT)) or {"facts": {}}
        pipe = replace(pipe, round=made_by["facts"].get("round", 0))
    if start == teacher:
        return replace(pipe, net=pipe.net if adapted else copy.deepcopy(pipe.net)), pipe
    if _pipeline(start):
        raise UserError(
            f"start={start} is another pipeline than teacher={teacher}; name a reflow of the teacher, "
            "or the teacher itself"
        )
    loaded = load(pipe, start, "start", merged=not adapted)
    if adapted and loaded.net is not pipe.net:
        raise UserError(_apart(start, teacher))
    return loaded, pipe


def adapter_of(path: str) -> dict[str, Any] | None:
    """Return the facts of a finished run whose network is an adapter alone; None of any other start."""
    run, _ = run_of(path)
    facts = manifest.read(run, "start")["facts"] if manifest.sealed(run) else {}
    return facts if facts.get("base") else None


def _apart(start: str, teacher: str | None) -> str:
    return (
        f"lora: with method.name=dmd student and teacher share one network, and start={start} has other "
        f"weights than teacher={teacher}; start from an adapter of the teacher, or leave lora out"
    )


def _pipeline(path: str) -> bool:
    return is_pipeline(path) or not Path(path).exists()  # else a name on the hub
