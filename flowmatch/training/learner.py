"""An objective that learns beside the network: from the student's own samples, in the training loop."""

from typing import Any

from torch import Tensor

from flowmatch.models.velocity import Condition, Velocity
from flowmatch.training.draw import Drawn


class Learner:
    """What the loop asks of an objective that has a state of its own.

    `begin` comes first, then `errors` for each micro-batch and `learn` after each update that counts.
    Its tensors are in each checkpoint. `noises` is the number of fresh noises of a sample that it needs.
    """

    noises: int

    def begin(self, accelerator: Any, plain: Velocity, saved: dict[str, Any] | None) -> None:
        """Begin a run, or go on from a checkpoint; collective.

        Args:
            accelerator: Accelerate's Accelerator of this process.
            plain: The velocity of the network without the loop's wrappers.
            saved: What `tensors` returned for the checkpoint; None for a new run.
        """
        raise NotImplementedError

    def errors(
        self, v: Velocity, batch: Drawn, cond: Condition | None, step: int, index: int
    ) -> Tensor:
        """Compute the errors of a micro-batch.

        Args:
            v: The velocity that is trained.
            batch: Its samples; `fresh` is noise for samples of the student, [B, noises, ...].
            cond: Conditions of the network, or None.
            step: Updates that were made before.
            index: Of the micro-batch among those of this process in the update.

        Returns:
            Errors, [B].
        """
        raise NotImplementedError

    def learn(self, step: int) -> Tensor | None:
        """Learn from the micro-batches of an update; collective.

        Args:
            step: Updates that were made before it.

        Returns:
            Whether all is finite, a bool []; None where that of the update says so.
        """
        raise NotImplementedError

    def read(self) -> dict[str, float]:
        """Return what is logged: means since the last call."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of it, the same in all processes."""
        raise NotImplementedError
