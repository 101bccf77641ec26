"""Whether sets of pairs fit the network that is trained on them."""

from typing import Any

from flowmatch.config import UserError
from flowmatch.models import diffusion
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
