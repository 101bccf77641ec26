"""Distance truncation: the pairs that lie farthest apart are left out of training, not of the set."""

import numpy as np

from flowmatch.config import UserError
from flowmatch.pairs.dataset import PairData
from flowmatch.runs.storage import Bucket

READ = 1 << 24  # values of x0 read at once


def costs(data: PairData) -> np.ndarray:
    """Read a whole set once: |x1 - x0|^2 of every pair, float64 [N]."""
    rows = max(1, READ // int(np.prod(data.shape)))
    found = np.empty(len(data))
    for start in range(0, len(data), rows):
        ids = np.arange(start, min(start + rows, len(data)))
        batch = data.batch(ids)
        gap = (batch["x1"] - batch["x0"]).flatten(1).numpy().astype(np.float64)
        # a row's sum is the same on every rank, however many threads torch has
        found[ids] = np.einsum("bd,bd->b", gap, gap)
    return found


def check(data: PairData, share: float) -> None:
    """Raise UserError for a set in a store, or one that is read group by group."""
    if data.group or isinstance(data.folder, Bucket):
        raise UserError(
            f"{data.key}={data.folder}: truncate={share:g} reads the whole set first, and takes pairs "
            "from all over it; copy it to a local folder and leave group out, or leave truncate out"
        )


def truncate(data: PairData, share: float) -> tuple[np.ndarray, str]:
    """Leave out the share of pairs with the largest |x1 - x0|^2: the ids that are kept, and the cut.

    ids: ascending, int64; of equal costs the first are kept. The whole set is read, by each process
    at its start.
    """
    cost = costs(data)
    number = len(data) - int(share * len(data))
    by_cost = np.argsort(cost, kind="stable")
    return np.sort(by_cost[:number]), (
        f"{number:,} of {len(data):,} pairs of {data.folder} are kept, those up to |x1 - x0|^2 = "
        f"{cost[by_cost[number - 1]]:.6g}"
    )
