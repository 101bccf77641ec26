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
GROUP = 9  # order within a group of shards


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
    """Walk samples in an endless shuffled order: sample counter -> id.

    ids: a number n for 0 to n - 1, or an array of n. Epoch e = counter // n is their permutation by
    Philox key (seed, e): a function of (seed, ids, counter) alone, so any counter can come first, and
    every n of them in a row from a multiple of n hold each id once.
    """

    def __init__(self, ids: int | np.ndarray, seed: int):
        self.n = ids if isinstance(ids, int) else len(ids)
        if self.n < 1:
            raise ValueError(f"n={self.n}: there is nothing to put in order")
        self.ids, self.seed = ids, seed
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
            order = generator(self.seed, epoch, ORDER).permutation(self.ids)
            _remember(self._epochs, epoch, order)
        return self._epochs[epoch]


class GroupedOrder:
    """Walk the pairs of shards so that an epoch touches each shard once: sample counter -> id.

    Epoch e = counter // n permutes the shards by Philox key (seed, e), and cuts them into groups of
    `group` shards (the last may be smaller), whose pairs are shuffled together. Pair i of shard k has
    id k * size + i. Like `Order`, a function of its settings and the counter alone.
    """

    def __init__(self, shards: int, size: int, group: int, seed: int):
        if min(shards, size, group) < 1:
            raise ValueError(f"shards={shards}, size={size}, group={group}: expected 1 or more")
        self.shards, self.size, self.group, self.seed = shards, size, min(group, shards), seed
        self.n = shards * size
        self.groups = -(-self.shards // self.group)  # in an epoch
        self._epochs: dict[int, np.ndarray] = {}
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, counters: np.ndarray) -> np.ndarray:
        """Give the ids at some counters: int64 [B] -> int64 [B]."""
        numbers, places = self._find(counters)
        ids = np.empty(len(counters), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            here, members = numbers == number, self.members(number)
            if number not in self._orders:
                count = len(members) * self.size
                order = generator(self.seed, number, GROUP).permutation(count)
                _remember(self._orders, number, order)
            which, index = np.divmod(self._orders[number][places[here]], self.size)
            ids[here] = members[which] * self.size + index
        return ids

    def span(self, counters: np.ndarray) -> range:
        """Give the groups, numbered through all epochs, from the first to the last of some counters."""
        ends, _ = self._find(np.array([counters.min(), counters.max()]))
        return range(int(ends[0]), int(ends[1]) + 1)

    def members(self, number: int) -> np.ndarray:
        """Give the shards of a group, numbered through all epochs; int64."""
        epoch, group = divmod(number, self.groups)
        if epoch not in self._epochs:
            order = generator(self.seed, epoch, ORDER).permutation(self.shards)
            _remember(self._epochs, epoch, order)
        return self._epochs[epoch][group * self.group : (group + 1) * self.group]

    def _find(self, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the groups of some counters, and their places there."""
        epochs, places = np.divmod(counters, self.n)
        groups, places = np.divmod(places, self.group * self.size)
        return epochs * self.groups + groups, places


def _remember(last: dict[int, np.ndarray], key: int, value: np.ndarray) -> None:
    """Keep two at most: a batch may straddle an end."""
    while len(last) > 1:
        del last[min(last)]
    last[key] = value
