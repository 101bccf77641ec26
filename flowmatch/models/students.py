"""Students of pipelines that read prompts: a network in the terms of its teacher's."""

import os

from flowmatch.config import UserError
from flowmatch.models.teachers import read_made
from flowmatch.models.text import TextTeacher, with_network

TERMS = (
    *("pipeline", "network", "sample", "time", "kind", "slope", "offset", "sign", "half"),
    *("direction", "shape"),
)  # of a script: how a network is called
DIFFUSION = ("epsilon", "sample", "v_prediction")  # forms of a network that is no student


def load(teacher: TextTeacher, path: str | os.PathLike[str], key: str) -> TextTeacher:
    """Load a student of a pipeline, with which it shares all but the network.

    Args:
        teacher: The pipeline.
        path: A sealed run folder of a training stage with prompts, or a checkpoint of one.
        key: Name of the config's key, for the messages.

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
    return with_network(teacher, path, key, sealed)
