"""Means over the samples of an evaluation, with bootstrap intervals.

Samples of one prompt belong together: a resample draws prompts, with all samples of each.
"""

from collections.abc import Callable

import numpy as np

from flowmatch.flow import noise

RESAMPLES = 1000
PART = 50  # resamples at a time


def mean_interval(
    columns: np.ndarray,
    clusters: np.ndarray,
    seed: int,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda means: means[..., 0],
) -> dict[str, float]:
    """Compute a statistic of means over samples, and its 95% interval (Efron 1979, percentiles).

    Args:
        columns: Values of each sample, float64 [N, K]; a sample with a NaN is left out.
        clusters: Number of the prompt of each sample, int64 [N].
        seed: Of the resamples.
        statistic: Means [..., K] -> statistic [...].

    Returns:
        `value`, `low` and `high`.
    """
    kept = ~np.isnan(columns).any(axis=1)
    _, places = np.unique(clusters[kept], return_inverse=True)
    found = columns[kept]
    count = int(places.max(initial=-1)) + 1
    sums = np.zeros((count, columns.shape[1] + 1))
    np.add.at(sums, places, np.concatenate([found, np.ones((len(found), 1))], axis=1))

    def of(total: np.ndarray) -> np.ndarray:
        return statistic(total[..., :-1] / total[..., -1:])

    drawn = noise.generator(seed, 0, noise.BOOTSTRAP).integers(count, size=(RESAMPLES, count))
    again = np.concatenate(
        [of(sums[part].sum(axis=1)) for part in np.split(drawn, range(PART, RESAMPLES, PART))]
    )
    low, high = np.quantile(again, [0.025, 0.975])
    return {"value": float(of(sums.sum(axis=0))), "low": float(low), "high": float(high)}
