"""Whether sets of pairs, the network that is trained on them, and its teacher fit each other."""

from typing import Any

from flowmatch.config import UserError, step_words
from flowmatch.data.dataset import Data
from flowmatch.models import diffusion, two_time
from flowmatch.models.teachers import Teacher
from flowmatch.pairs.dataset import PairData


def check_match(start: Any, sets: list[PairData]) -> None:
    """Check that sets of pairs fit a network, and that it can predict a velocity.

    Args:
        start: The `Teacher` from whose weights the training starts.
        sets: The sets.

    Raises:
        UserError: They do not, or it cannot; all faults at once.
    """
    faults = []
    if start.diffusion is not None and not diffusion.can_be_velocity(start.net):
        faults.append(
            "start= cannot predict a velocity: it predicts a variance too, or has no row for the "
            "null class; start from a flow model"
        )
    for data in sets:
        if data.shape != start.shape:
            faults.append(
                f"{data.key}={data.folder} holds {list(data.shape)}; the network at start= takes "
                f"{list(start.shape)}"
            )
        classes = data.sealed["facts"].get("classes")
        if classes != start.classes and "prompts" not in start.facts:
            faults.append(
                f"{data.key}={data.folder} has {classes or 'no'} classes; the network at start= takes "
                f"{start.classes or 'none'}"
            )
        ours, listed = start.facts.get("prompts"), getattr(start, "prompts", None)
        theirs = data.sealed["facts"].get("prompts")
        if data.has_prompts and listed is None:
            faults.append(
                f"{data.key}={data.folder} has prompts; set prompts= to their list and start= to a "
                "pipeline that reads text"
            )
        elif listed is not None and theirs and theirs["count"] < len(listed):
            if listed.digest_of(theirs["count"]) != theirs["digest"]:
                faults.append(
                    f"{data.key}={data.folder} was made with {theirs['count']:,} prompts, which are not "
                    "the first ones of prompts=; add prompts at the end of a list only"
                )
        elif ours != theirs:
            faults.append(
                f"{data.key}={data.folder} was made with other prompts: {theirs}, and prompts= is "
                f"{ours}; name the list of the pairs"
            )
    if faults:
        raise UserError(faults)


def guidance_of(sets: list[PairData], teacher: Teacher, asked: float | None) -> float:
    """Return the guidance of a teacher that makes the distribution of some pairs.

    Args:
        sets: The sets.
        teacher: The teacher.
        asked: The guidance, where the user gives it; else that with which the pairs were made.

    Raises:
        UserError: That is not known, or not the same for all, or the teacher cannot be guided.
    """
    found = _guidance(sets) if asked is None else asked
    teacher.own_velocity(teacher.net, found)
    return found


def _guidance(sets: list[PairData]) -> float:
    known: dict[float, PairData] = {}
    for data in sets:
        made, facts = data.sealed["config"], data.sealed["facts"]
        where, script = f"{data.key}={data.folder}", facts.get("script") or {}
        own = made.get("solver", {}).get("name") == "own"
        if own and facts["evaluations"] > script["steps"]:
            raise UserError(
                f"method.guidance: {where} are the guided run of a pipeline, call={facts.get('call')}; "
                "set it to w of v = v_null + w (v_prompt - v_null), for most classes guidance_scale"
            )
        if (script and facts["round"]) or (data.has_prompts and "solver" not in made):
            raise UserError(
                f"method.guidance: {where} are of a student, or of another trainer, and do not say with "
                "which guidance its teacher was followed; set it"
            )
        known[1.0 if own else made.get("guidance", 1.0)] = data
    if len(known) > 1:
        told = ", ".join(f"{data.key}={data.folder} with {w:g}" for w, data in known.items())
        raise UserError(f"method.guidance: the pairs were made {told}; set it")
    return next(iter(known))


def check_finish(start: Teacher, path: str, for_steps: list[int]) -> None:
    """Check that a student can be trained on its own samples.

    Args:
        start: The student.
        path: Where it is, for the message.
        for_steps: Numbers of Euler steps that make the samples.

    Raises:
        UserError: They do not make its samples; all faults at once.
    """
    faults, where = [], f"start={path}"
    if not start.can_sample:
        faults.append(f"{where} is a diffusion model; reflow it first")
    if two_time.argument(start.net) is not None:
        faults.append(
            f"{where} takes a second time (MeanFlow), which a finish would leave untrained; start "
            "from a student without one"
        )
    if start.windows:
        faults.append(
            f"{where} is straight in {start.windows} windows (objective.name=segments): one step from "
            "within does not reach the data; start from another student"
        )
    if (known := start.for_steps) and not set(for_steps) <= set(known):
        faults.append(
            f"for_steps={for_steps}: {where} is for {step_words(known)} only; use {list(known)}"
        )
    if faults:
        raise UserError(faults)


def check_target(
    start: Teacher,
    data: Data | None,
    teacher: Teacher | None,
    path: str,
    shape: tuple[int, ...],
) -> None:
    """Check that a student makes what its samples are compared with.

    Args:
        start: The student.
        data: Real samples, or None.
        teacher: A teacher whose velocity tells the score of the data, or None.
        path: Where the teacher is, for the message.
        shape: Of the samples, or of their pictures where these are compared.

    Raises:
        UserError: It does not; all faults at once.
    """
    if data is not None and data.shape != shape:
        raise UserError(f"data holds {list(data.shape)}; the network at start= makes {list(shape)}")
    if teacher is None:
        return
    faults, where = [], f"teacher={path}"
    if teacher.round:
        faults.append(
            f"{where} is of round {teacher.round}: after a reflow noise and data belong together, and "
            "its velocity is no score; name the flow of stage one"
        )
    if teacher.diffusion is not None or two_time.argument(teacher.net) is not None:
        faults.append(f"{where}: method.name=dmd takes a flow of a single time")
    if (teacher.shape, teacher.classes) != (start.shape, start.classes):
        faults.append(
            f"{where} makes {list(teacher.shape)} of {teacher.classes or 'no'} classes, start= "
            f"{list(start.shape)} of {start.classes or 'none'}"
        )
    if faults:
        raise UserError(faults)
