"""Pairs without a teacher, for the tests of the pair store; also a worker process of its own.

python -m tests.store FOLDER RANK WORLD SHARDS TTL DELAY [race]: make shards, DELAY seconds a block.
"""

import sys
import time
from contextlib import closing

import numpy as np

from flowmatch.flow import noise
from flowmatch.pairs import leases, shards
from flowmatch.pairs.layout import Layout
from flowmatch.runs import manifest

PRINT = "a" * 64  # fingerprint
CARD = "# Pairs\n\nNoise and what a teacher made of it.\n"
WORKED = Layout((3, 4, 4), "float16", True, 10, 2)  # what a worker process makes

LAYOUT_OF_POINTS = Layout((2,), "float32", False, 8, 4)
RAGGED = [  # shape, dtype, labels, shard_size, block
    ((2,), "float32", True, 10, 4),
    ((2,), "float16", False, 1, 1),
    ((3, 5, 7), "float16", True, 7, 3),
    ((1, 8, 8), "float32", False, 64, 16),
    ((1, 13), "float16", True, 9, 9),
    ((2, 2, 2, 2, 2, 2), "float32", True, 130, 64),
    ((3, 32, 32), "float32", True, 5, 1),
]


class Clock:
    """A clock for leases that only sleeping moves: monotonic() is the sum of all sleeps."""

    time = staticmethod(time.time)

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def pairs_of(k, layout):
    """Make the pairs of shard k: x0, x1 of the stored dtype, labels or None."""
    ids = k * layout.shard_size + np.arange(layout.shard_size)
    x0 = noise.normal(0, ids, layout.shape, noise.PAIR_NOISE).astype(layout.dtype)
    return x0, np.tanh(x0) + x0.dtype.type(0.5), noise.labels(0, ids, 10) if layout.labels else None


def blocks_of(k, layout):
    x0, x1, y = pairs_of(k, layout)
    for a in range(0, layout.shard_size, layout.block):
        part = slice(a, a + layout.block)
        yield x0[part], x1[part], None if y is None else y[part]


def write(folder, k, layout, blocks=None, environment=None):
    blocks = blocks_of(k, layout) if blocks is None else blocks
    return shards.write_shard(folder, k, layout, blocks, PRINT, environment or {}, CARD)


def finish(folder, layout, number):
    """Write and seal a folder of pairs; return all its x0, x1, y."""
    for k in range(number):
        write(folder, k, layout)
    seal(folder, layout, number)
    x0, x1, y = zip(*(pairs_of(k, layout) for k in range(number)), strict=True)
    return np.concatenate(x0), np.concatenate(x1), np.concatenate(y) if layout.labels else None


def seal(folder, layout, number):
    facts = {"layout": layout.entries(), "shards": number, "count": number * layout.shard_size}
    sides = [shards.sidecar(folder, k) or {"sha256": ""} for k in range(number)]
    outputs = {shards.tar_name(k): side["sha256"] for k, side in enumerate(sides)}
    rest = {"config": {}, "inputs": {}, "outputs": outputs, "round": 0}
    manifest.seal(folder, stage="generate_pairs", **rest, **facts)


def work(folder, rank, world, number, ttl, delay, how="claim"):
    """Make shards as a stage does; race: without leases, every worker everything."""

    def slowly(k):
        for block in blocks_of(k, WORKED):
            time.sleep(delay)
            yield block

    every, made = range(number), []
    if how == "race":
        for k in every:
            made.append(k)
            write(folder, k, WORKED, slowly(k), {"rank": rank})
    else:
        own = every[rank::world]
        with closing(leases.claim(folder, own, every, PRINT, ttl)) as todo:
            for k in todo:
                print("makes", k, flush=True)
                write(folder, k, WORKED, slowly(k), {"rank": rank})
                made.append(k)
    assert not shards.missing(folder, every, PRINT)
    print("made", *made, flush=True)


if __name__ == "__main__":
    folder, rank, world, number, ttl, delay, *how = sys.argv[1:]
    work(folder, int(rank), int(world), int(number), float(ttl), float(delay), *how)
