"""Distance truncation: training leaves out the pairs that lie farthest apart; the set keeps them."""

import numpy as np

from flowmatch.config import UserError
from flowmatch.pairs.dataset import PairData, transport_cost
from flowmatch.runs.storage import Bucket


def costs(data: PairData) -> np.ndarray:
    """Return |x1 - x0|^2 of every pair, float64 [N]; reads the whole set once."""
    parts = data.parts(np.arange(len(data)))
    return np.concatenate([transport_cost(batch["x0"], batch["x1"]) for batch in parts])


def check(data: PairData, share: float) -> None:
    """Raise UserError for a set in a store, or one that is read in groups of shards."""
    if data.group or isinstance(data.folder, Bucket):
        raise UserError(
            f"{data.key}={data.folder}: truncate={share:g} reads the whole set first and draws pairs "
            "from all of it; copy the set to a local folder and remove group, or remove truncate"
        )


def truncate(data: PairData, share: float) -> tuple[np.ndarray, str]:
    """Choose the pairs that remain without the share with the largest |x1 - x0|^2.

    Each process reads the whole set at its start. Of equal costs the first pairs remain.

    Args:
        data: the set.
        share: of the pairs to leave out, in [0, 1).

    Returns:
        The ids of the remaining pairs, int64, ascending, and a line for the plan.
    """
    cost = costs(data)
    number = len(data) - int(share * len(data))
    by_cost = np.argsort(cost, kind="stable")
    return np.sort(by_cost[:number]), (
        f"{number:,} of {len(data):,} pairs of {data.folder} are kept, those up to |x1 - x0|^2 = "
        f"{cost[by_cost[number - 1]]:.6g}"
    )
