"""Pictures from a pipeline's states, decoded by the pipeline itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.models.learn import FAILURES
from flowmatch.models.script import Script, answered_once, dtype_of, few_steps, unguided
from flowmatch.models.text import TextTeacher
from flowmatch.models.watch import quiet, run


class Decoder:
    """Turns states after the last step into pictures, as a pipeline does.

    The pipeline runs two steps without guidance, each of which returns the given state, and goes on
    to its end: whatever it unpacks, scales and decodes there is done. Its network is called once for
    each size of a batch; later runs get that answer, which has no effect.

    Args:
        pipe: The pipeline.
        script: From `learn`.
        call: Arguments of the pipeline's call.
    """

    def __init__(self, pipe: Any, script: Script, call: dict[str, Any]):
        self.pipe, self.script, self.call = pipe, script, call
        self._answers: dict[Any, Any] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        """Decode some states.

        Args:
            x: States, [B, *shape].
            prompts: Of the samples, [B].

        Returns:
            Pictures [B, C, H, W], or frames [B, F, C, H, W], float32 in [0, 1] on the CPU.

        Raises:
            UserError: The pipeline returns no pictures.
        """
        pipe, script = self.pipe, self.script
        call = few_steps(pipe, self.call | script.off, 2)  # one step is too few for some classes
        end = x.to(pipe._execution_device, dtype_of(pipe, script.network))
        how: dict[str, Any] = dict(inject=script.inject, network=script.network, end=end)
        net = getattr(pipe, script.network)
        with quiet(), unguided(pipe, script), answered_once(net, self._answers):
            return pictures(run(pipe, prompts, call, end, **how).result)


def pictures(result: Any) -> Tensor:
    """Return what a pipeline returned as pictures, as in `Decoder`."""
    found = result[0]
    if isinstance(found, list):
        found = np.stack([np.asarray(one, dtype=np.float32) for one in found])
    found = np.asarray(found)
    if found.ndim not in (4, 5) or found.shape[-1] not in (1, 3):
        raise UserError(f"the pipeline returns {list(found.shape)}; expected pictures")
    return torch.from_numpy(np.moveaxis(found.astype(np.float32), -1, -3).copy())


def find(teacher: TextTeacher) -> tuple[Decoder | None, tuple[int, ...], str]:
    """Decode one sample, to see what a pipeline makes of its states.

    Returns:
        The decoder, the shape of a picture and ""; or None, () and why there are no pictures.
    """
    decode = Decoder(teacher.pipe, teacher.script, teacher.call)
    try:
        shown = decode(torch.zeros(1, *teacher.shape), teacher.prompts.texts[:1])
    except (*FAILURES, UserError) as error:
        told = " ".join(str(error).split())[:200]
        return None, (), f"{teacher.script.pipeline} does not decode a state: {told}"
    return decode, tuple(shown.shape[1:]), ""
