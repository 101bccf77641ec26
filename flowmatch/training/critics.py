"""The critic of a finish, as its config asks for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from flowmatch.flow import energy, moments
from flowmatch.training.config import MethodConfig
from flowmatch.training.feature_critic import Features, Samples
from flowmatch.training.finishing import Critic, Sum

BATCH = 256  # samples that are read together before the first update


def batches(read: Callable[[Any], Any], ids: np.ndarray, size: int) -> Callable[[], Samples]:
    """Return what reads samples in order, a batch at a time, anew at each call.

    Args:
        read: Returns the samples of some numbers.
        ids: Their numbers.
        size: Largest number of samples in a batch.
    """
    parts = np.array_split(ids, -(-len(ids) // min(size, BATCH)))
    return lambda: map(read, parts)


def build(
    config: MethodConfig,
    scores: Critic | None,
    modules: dict[str, nn.Module],
    pairs: Callable[[], Samples],
    data: Callable[[], Samples] | None,
) -> Critic:
    """Build a critic.

    Args:
        config: How samples are compared with the data.
        scores: Compares them by velocities; with other methods None.
        modules: Of the features, by name; as in `Features`.
        pairs: Yields batches of pairs, anew at each call.
        data: Likewise of real samples; None compares with the x1 of the pairs.
    """
    weighed: list[tuple[float, Critic]] = [] if scores is None else [(1.0, scores)]
    if config.features:
        kind = moments.Moments if config.features == "moments" else energy.Energy
        make = partial(kind, window=config.window)
        features = Features(modules, make, data or pairs, pairs, config.window)
        weighed.append((config.moments if weighed else 1.0, features))
    return Sum(weighed)
