"""Noise is a function of (seed, i, stream) alone, today and after the next numpy."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from flowmatch.flow import noise

NOISE = "8be5a2c7af73b615072c430135470202a2a1804de1fccba9a0a88ae513544305"
LABELS = "297d17f03719718e9c996bcdae9f8c56934de70d85bed2a2baa72c247ca89876"
EVALUATION = "1231b7e2150f30db34c398584c88f48d013364ae0d3512919b4031ba5b5701f5"
GROUPED = "096586fabde58bef8582b5900cd8a29e70142c06e5f8915b2e17642a708189a0"


def sha256(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


def test_golden_values():
    """A change of these hashes changes every pair set: stored noise no longer regenerates."""
    drawn = noise.normal(5, [0, 1, 12345678901], (3, 32, 32), noise.PAIR_NOISE)
    assert drawn.dtype == np.float32
    assert sha256(drawn) == NOISE
    assert sha256(noise.labels(5, range(1000), 10)) == LABELS
    assert sha256(noise.normal(5, range(4), (17,), noise.EVALUATION)) == EVALUATION


def test_golden_values_without_vector_instructions():
    code = (
        "import hashlib; from flowmatch.flow import noise;"
        "x = noise.normal(5, [0, 1, 12345678901], (3, 32, 32), noise.PAIR_NOISE);"
        "print(hashlib.sha256(x.tobytes()).hexdigest())"
    )
    off = "AVX2 FMA3 AVX512F AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL X86_V3 X86_V4"
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": off}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == NOISE


def test_a_sample_does_not_depend_on_its_batch():
    together = noise.normal(1, range(100), (2, 5), noise.PAIR_NOISE)
    backwards = noise.normal(1, np.arange(99, -1, -1), (2, 5), noise.PAIR_NOISE)
    alone = noise.normal(1, [42], (2, 5), noise.PAIR_NOISE)
    assert np.array_equal(together, backwards[::-1])
    assert np.array_equal(together[42], alone[0])
    assert np.array_equal(noise.normal(1, [42], (10,), noise.PAIR_NOISE).reshape(2, 5), alone[0])
    assert np.array_equal(noise.labels(1, range(100), 7)[42:43], noise.labels(1, [42], 7))


def test_seeds_samples_and_streams_differ():
    """No two of 3 seeds x 50 samples x all streams, 32-bit neighbours included, share noise."""
    streams = [value for name, value in vars(noise).items() if name.isupper()]
    assert len(streams) == 16
    ids = [*range(48), 2**32, 2**63 + 1]
    rows = [noise.normal(seed, ids, (8,), stream) for seed in (0, 1, 2**32) for stream in streams]
    values = np.concatenate(rows).ravel()
    assert len(np.unique(np.concatenate(rows), axis=0)) == 3 * 50 * 16
    assert abs(values.mean()) < 5 / len(values) ** 0.5
    assert abs(values.var() - 1) < 5 * (2 / len(values)) ** 0.5


def test_streams_do_not_overlap_however_long():
    """Streams differ in the counter's highest word: one does not run into the next."""
    first = noise.generator(0, 0, 0).standard_normal(100_000, dtype=np.float32)
    second = noise.generator(0, 0, 1).standard_normal(100_000, dtype=np.float32)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 100_000**0.5
    assert not np.isin(second[:50], first).all()


def test_labels_are_uniform_and_independent_of_the_noise():
    drawn = noise.labels(3, range(10_000), 10)
    assert drawn.dtype == np.int64
    counts = np.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert ((counts - 1000) ** 2 / 1000).sum() < 33  # chi-square, 9 degrees: 33 is one in 10**4
    first = noise.normal(3, range(10_000), (1,), noise.PAIR_NOISE)[:, 0]
    assert abs(np.corrcoef(drawn, first)[0, 1]) < 0.05


@pytest.mark.parametrize(("seed", "i"), [(-1, 0), (0, -1), (2**64, 0)])
def test_seeds_outside_64_bits_are_refused(seed, i):
    with pytest.raises(OverflowError):
        noise.generator(seed, i, 0)


@pytest.mark.parametrize(("shards", "size", "group"), [(7, 5, 2), (6, 4, 3), (3, 10, 1), (5, 3, 9)])
def test_a_grouped_order_touches_each_shard_once_an_epoch(shards, size, group):
    """Every pair once; the shards of a group together, shuffled, and no shard twice."""
    order, n = noise.GroupedOrder(shards, size, group, 3), shards * size
    walked = order(np.arange(3 * n))
    for epoch in walked.reshape(3, n):
        assert sorted(epoch) == list(range(n))
        for start in range(0, n, min(group, shards) * size):
            part = epoch[start : start + min(group, shards) * size]
            assert len(part) == size * len(set((part // size).tolist()))
            assert (np.diff(part) < 0).any()  # shuffled
    assert not np.array_equal(walked[:n], walked[n : 2 * n])
    assert not np.array_equal(noise.GroupedOrder(shards, size, group, 4)(np.arange(n)), walked[:n])


def test_a_grouped_order_is_a_function_of_the_counter_alone():
    """Whatever came before, in whatever pieces: so a run resumes anywhere, on any number of ranks."""
    walked = noise.GroupedOrder(7, 5, 2, 3)(np.arange(105))
    for counters in (np.array([104, 3, 40, 39]), np.arange(33, 72, 2), np.array([7])):
        assert np.array_equal(noise.GroupedOrder(7, 5, 2, 3)(counters), walked[counters])
    assert sha256(walked) == GROUPED


def test_a_grouped_order_says_what_a_batch_touches():
    order = noise.GroupedOrder(7, 5, 2, 3)  # groups of 10, 10, 10, 5 pairs
    for counters in (np.arange(8), np.arange(8, 13), np.arange(28, 37), np.arange(30, 75)):
        groups = order.span(counters)
        touched = {k for number in groups for k in order.members(number).tolist()}
        assert set((order(counters) // 5).tolist()) <= touched
    assert order.span(np.arange(28, 37)) == range(2, 5)


def test_the_order_of_some_ids_is_that_of_their_places():
    kept = np.flatnonzero(np.arange(1000) % 3)
    counters = np.arange(2 * len(kept))
    places = noise.Order(len(kept), 5)(counters)
    assert np.array_equal(noise.Order(kept, 5)(counters), kept[places])
    assert np.array_equal(kept, np.flatnonzero(np.arange(1000) % 3))  # the caller's, as it was
