"""Random numbers that depend on (seed, i, stream) alone: numpy's Philox, drawn on the CPU.

Sample i is the same whatever the batch, the rank, the order of work or the machine. torch.randn
cannot promise that: its CPU seed is cut to 32 bits and its values differ between instruction sets.
The streams of one (seed, i) never overlap: they are 2**192 blocks apart in Philox's counter.
"""

from collections.abc import Iterable

import numpy as np

PAIR_NOISE = 0  # x0 of a stored pair; evaluation never draws from it
PAIR_LABEL = 1  # class label of a stored pair
TRAINING = 2  # noise, times and dropped labels of a training step
EVALUATION = 3  # noise of the samples that are scored
SAMPLER = 4  # noise that a stochastic sampler adds
ORDER = 5  # order of an epoch's samples
RING = 6  # samples of the 2-D ring
DIRECTIONS = 7  # projections of the sliced Wasserstein distance
TOY = 8  # exact samples of a closed-form target


def generator(seed: int, i: int, stream: int) -> np.random.Generator:
    """Build the generator of sample i; seed, i, stream: integers in [0, 2**64).

    Philox4x64-10 of Salmon et al. 2011 (Parallel random numbers: as easy as 1, 2, 3), 128-bit key.
    Raises OverflowError outside that range.
    """
    key = np.array([seed, i], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, ids: Iterable[int], shape: tuple[int, ...], stream: int) -> np.ndarray:
    """Draw standard normal noise for the samples ids; float32 [len(ids), *shape]."""
    ids = list(ids)
    noise = np.empty((len(ids), *shape), dtype=np.float32)
    for row, i in zip(noise, ids, strict=True):
        generator(seed, i, stream).standard_normal(dtype=np.float32, out=row)
    return noise


def labels(seed: int, ids: Iterable[int], classes: int, stream: int = PAIR_LABEL) -> np.ndarray:
    """Draw a label for the samples ids, uniform over range(classes); int64 [len(ids)]."""
    draws = [generator(seed, i, stream).integers(classes) for i in ids]
    return np.array(draws, dtype=np.int64)


class Order:
    """Walk n samples in an endless shuffled order: sample counter -> id.

    Epoch e = counter // n is the permutation of Philox key (seed, e): a function of (seed, n, counter)
    alone, so any counter can come first, and every n of them in a row from a multiple of n hold each
    id once.
    """

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError(f"n={n}: there is nothing to put in order")
        self.n, self.seed = n, seed
        self._epochs: dict[int, np.ndarray] = {}  # at most two: a batch may straddle an end

    def __call__(self, counters: np.ndarray) -> np.ndarray:
        """Give the ids at some counters: int64 [B] -> int64 [B]."""
        epochs, places = np.divmod(counters, self.n)
        ids = np.empty(len(counters), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = self._permutation(epoch)[places[here]]
        return ids

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = generator(self.seed, epoch, ORDER).permutation(self.n)
        return self._epochs[epoch]
