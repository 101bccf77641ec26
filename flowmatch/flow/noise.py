"""Random numbers that depend on (seed, i, stream) alone: numpy's Philox, drawn on the CPU.

Sample i does not depend on batch, rank, order of work or machine. torch.randn cannot promise that: its
CPU seed has 32 bits, and its values differ between instruction sets. The streams of one (seed, i) never
overlap: they are 2**192 blocks apart in Philox's counter.
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
BOOTSTRAP = 10  # samples of a bootstrap
CROP = 11  # places of random crops
WEIGHTS = 12  # weights of random features
FINISH = 13  # noise of the samples that a finish trains on
FINISH_GRID = 14  # the number of steps of an update of a finish, and its point of their grid
CORRUPTION = 20  # noise on the images that a denoising encoder learns from


def generator(seed: int, i: int, stream: int) -> np.random.Generator:
    """Build the random generator of a sample.

    Philox4x64-10 of Salmon et al. 2011 (Parallel random numbers: as easy as 1, 2, 3), 128-bit key.

    Args:
        seed: In [0, 2**64).
        i: Number of the sample, in [0, 2**64).
        stream: What the numbers are for, such as PAIR_NOISE.

    Returns:
        The generator.

    Raises:
        OverflowError: A number is out of range.
    """
    key = np.array([seed, i], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, ids: Iterable[int], shape: tuple[int, ...], stream: int) -> np.ndarray:
    """Draw standard normal noise.

    Args:
        seed: In [0, 2**64).
        ids: Numbers of the samples.
        shape: Shape of one sample.
        stream: What the noise is for, such as PAIR_NOISE.

    Returns:
        float32 [len(ids), *shape].
    """
    ids = list(ids)
    noise = np.empty((len(ids), *shape), dtype=np.float32)
    for row, i in zip(noise, ids, strict=True):
        generator(seed, i, stream).standard_normal(dtype=np.float32, out=row)
    return noise


def labels(seed: int, ids: Iterable[int], classes: int, stream: int = PAIR_LABEL) -> np.ndarray:
    """Draw a label for each of some samples, uniform over range(classes); int64 [len(ids)]."""
    draws = [generator(seed, i, stream).integers(classes) for i in ids]
    return np.array(draws, dtype=np.int64)


def places(seed: int, ids: Iterable[int]) -> np.ndarray:
    """Draw where the crops of some samples lie: float64 [len(ids), 2], uniform in [0, 1)."""
    return np.array([generator(seed, int(i), CROP).random(2) for i in ids]).reshape(-1, 2)


class Order:
    """An endless shuffled order of samples: sample counter -> id.

    Epoch e = counter // n is the permutation of Philox key (seed, e): a function of (seed, ids, counter)
    alone, so that any counter may come first. Each epoch has each id once.

    Args:
        ids: A number n, for the ids 0 to n - 1, or an array of n ids.
        seed: Seed of the order.

    Raises:
        ValueError: There are no ids.
    """

    def __init__(self, ids: int | np.ndarray, seed: int):
        self.n = ids if isinstance(ids, int) else len(ids)
        if self.n < 1:
            raise ValueError(f"n={self.n}: expected 1 or more samples")
        self.ids, self.seed = ids, seed
        self._epochs: dict[int, np.ndarray] = {}  # at most two: a batch may span an end

    def __call__(self, counters: np.ndarray) -> np.ndarray:
        """Return the ids at some counters: int64 [B] -> int64 [B]."""
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
    """An endless order of pairs in which an epoch reads each shard once: sample counter -> id.

    Epoch e = counter // n permutes the shards with Philox key (seed, e) and splits them into groups (the
    last may be smaller), whose pairs are shuffled together. Pair i of shard k has id k * size + i. Like
    `Order`, it is a function of its arguments and the counter alone.

    Args:
        shards: Number of shards.
        size: Pairs in a shard.
        group: Shards in a group.
        seed: Seed of the order.

    Raises:
        ValueError: One of the numbers is less than 1.
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
        """Return the ids at some counters: int64 [B] -> int64 [B]."""
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
        """Return the groups from the first to the last of some counters, numbered through all epochs."""
        ends, _ = self._find(np.array([counters.min(), counters.max()]))
        return range(int(ends[0]), int(ends[1]) + 1)

    def members(self, number: int) -> np.ndarray:
        """Return the shards of a group, which is numbered through all epochs; int64."""
        epoch, group = divmod(number, self.groups)
        if epoch not in self._epochs:
            order = generator(self.seed, epoch, ORDER).permutation(self.shards)
            _remember(self._epochs, epoch, order)
        return self._epochs[epoch][group * self.group : (group + 1) * self.group]

    def _find(self, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the groups of some counters, and their places in them."""
        epochs, places = np.divmod(counters, self.n)
        groups, places = np.divmod(places, self.group * self.size)
        return epochs * self.groups + groups, places


def _remember(last: dict[int, np.ndarray], key: int, value: np.ndarray) -> None:
    """Store a value; two at most: a batch may span the end of an epoch or group."""
    while len(last) > 1:
        del last[min(last)]
    last[key] = value
