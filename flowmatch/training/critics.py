"""The critic of a finish, as its config asks for it."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from torch import nn

from flowmatch.config import UserError
from flowmatch.data.dataset import Data
from flowmatch.flow import energy, moments, noise
from flowmatch.models import adapters
from flowmatch.models.teachers import Teacher
from flowmatch.training.config import FitConfig, MethodConfig
from flowmatch.training.feature_critic import Features, Samples
from flowmatch.training.finishing import Critic, Sum
from flowmatch.training.score_critic import Apart, Scores, Shared

BATCH = 256  # samples that are read together before the first update


class Counted(Protocol):
    """A stream that says how many samples it has."""

    @property
    def count(self) -> int: ...
    def __call__(self, counters: np.ndarray) -> dict[str, Any]: ...


def batches(read: Callable[[Any], Any], ids: np.ndarray, size: int) -> Callable[[], Samples]:
    """Return what reads samples in order, a batch at a time, anew at each call.

    Args:
        read: Returns the samples of some numbers.
        ids: Their numbers.
        size: Largest number of samples in a batch.
    """
    parts = np.array_split(ids, -(-len(ids) // min(size, BATCH)))
    return lambda: map(read, parts)


def check(config: MethodConfig, fit: FitConfig) -> None:
    """Check that a finish can be trained.

    Raises:
        UserError: Something of the training loop cannot be combined with it; all faults at once.
    """
    faults = []
    if fit.shard:
        faults.append(
            "fit.shard=true: a finish samples outside of the training step, which needs whole weights; "
            "leave it out"
        )
    if fit.compile:
        faults.append(
            "fit.compile=true: a finish evaluates the network in batches of several sizes; leave it out"
        )
    if config.name == "dmd" and fit.precision == "fp16":
        faults.append("fit.precision='fp16': method.name=dmd has a second loss; use bf16 or fp32")
    if faults:
        raise UserError(faults)


def size(teacher: Teacher | None, student: Any) -> tuple[int, int]:
    """Return the bytes of a critic's networks and their optimizer: in memory, and in a checkpoint."""
    if teacher is None:
        return 0, 0
    if teacher.net is student:  # another adapter: weights, gradients and two averages
        count, frozen = sum(p.numel() for p in adapters.trained(student).values()), 0
    else:
        own = [*teacher.net.parameters()]
        count, frozen = sum(p.numel() for p in own), sum(map(adapters.bytes_of, own))
    return frozen + 16 * count, 12 * count


def build(
    config: MethodConfig,
    fit: FitConfig,
    teacher: Teacher | None,
    student: Any,
    modules: dict[str, nn.Module],
    look: nn.Module | None,
    pairs: Counted,
    data: Data | None,
    batch: int,
    seed: int,
) -> Critic:
    """Build a critic.

    Args:
        config: How samples are compared with the data; its guidance is set.
        fit: The training loop.
        teacher: Whose velocity tells the score of the data; None for methods without one.
        student: The network that is trained; that of the teacher, where it is trained as an adapter.
        modules: Of the features, by name; as in `Features`.
        look: Likewise.
        pairs: Returns the pairs of some numbers.
        data: Real samples; None compares with the x1 of the pairs.
        batch: Largest number of samples in a pass of a network.
        seed: Of the order of real samples, and of a second adapter.
    """
    weighed: list[tuple[float, Critic]] = []
    if teacher is not None:
        how = fit.model_copy(update={"lr": config.fake_lr or 10 * fit.lr})
        guidance, shared = config.guidance or 1.0, teacher.net is student
        networks = Shared(teacher, guidance, seed + 1) if shared else Apart(teacher, guidance)
        weighed.append((1.0, Scores(networks, config.fake_updates, how)))
    if config.features:
        kind = moments.Moments if config.features == "moments" else energy.Energy
        make = partial(kind, window=config.window)
        stored, target = batches(pairs, np.arange(pairs.count), batch), None
        if data is not None:
            target = batches(data.batch, noise.Order(len(data), seed)(np.arange(len(data))), batch)
        features = Features(modules, make, target, stored, config.window, look)
        weighed.append((config.moments if weighed else 1.0, features))
    return Sum(weighed)
