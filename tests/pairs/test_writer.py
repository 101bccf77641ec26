"""Shards written behind the integration: what is whole is committed, what fails is told at once."""

import threading
import time
from contextlib import ExitStack, closing

import pytest

from flowmatch.pairs.leases import claim
from flowmatch.pairs.writer import WAITING, Writer
from tests.pairs.test_leases import hashes, leftovers, reference  # noqa: F401
from tests.store import PRINT, WORKED, blocks_of, write


def patiently(until):
    for _ in range(1000):
        if until():
            return
        time.sleep(0.005)
    raise AssertionError("it never came about")


def test_a_slow_writer_holds_the_maker_back_and_then_gets_it_all():
    made, taken, refused, go = [], [], [], threading.Event()

    def slowly(k, batches):
        for batch in batches:
            taken.append((k, batch))
            assert go.wait(20)

    def batches(k):
        for number in range(10):
            made.append((k, number))
            yield number

    def acquire(timeout, inner=threading.Semaphore.acquire):
        got = inner(behind.room, timeout=timeout)
        if not got:
            refused.append(timeout)
        return got

    with Writer(slowly) as behind:
        behind.room.acquire = acquire
        maker = threading.Thread(target=lambda: [behind.shard(k, batches(k)) for k in range(3)])
        maker.start()
        most = 1 + WAITING + 1  # in the writer's hand, waiting, just made
        patiently(lambda: len(made) == most)
        patiently(lambda: refused)
        assert (len(made), len(taken)) == (most, 1)
        go.set()
        maker.join()
        behind.settle()
    assert taken == made == [(k, number) for k in range(3) for number in range(10)]


def test_the_next_shard_is_begun_before_the_last_one_is_committed():
    go, done = threading.Event(), []

    def commit(k, batches):
        list(batches)
        go.wait()
        done.append(k)

    with Writer(commit) as behind:
        behind.shard(0, [1])
        behind.shard(1, [1])
        assert done == []
        go.set()
        behind.shard(2, [1])
        assert 0 in done  # no more than one is ever behind
        behind.settle()
        assert done == [0, 1, 2]


@pytest.mark.parametrize("number", [1, 2, 100])
def test_what_the_writer_raises_reaches_the_maker(number):
    """In the midst of a shard, or after its last batch."""
    made = []

    def full(k, batches):
        for _ in batches:
            raise OSError(28, "No space left on device")

    def make():
        with Writer(full) as behind:
            behind.shard(0, batches(behind))
            behind.settle()

    def batches(behind):
        for n in range(number):
            made.append(n)
            yield n
            patiently(behind.jobs[0].done)

    with pytest.raises(OSError, match="No space"):
        make()
    assert len(made) <= 2  # told with the next batch, not when no more have room


@pytest.mark.parametrize("half_written", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_maker_that_stops_leaves_what_is_whole_and_nothing_half(
    tmp_path,
    reference,  # noqa: F811
    stop,
    half_written,
):
    """Shard 3 is whole and is committed, shard 1 is not; every lease is given back."""
    folder, stopped = tmp_path / "pairs", threading.Event()

    def slowly(k, blocks):
        write(folder, k, WORKED, blocks if half_written else held(blocks))

    def held(blocks):
        """Take all blocks of shard 3, and write none of the next."""
        for number, block in enumerate(blocks, 1):
            if number == WORKED.blocks:
                assert stopped.wait(60)
            yield block

    def broken(k):
        yield from list(blocks_of(k, WORKED))[:2]
        begun = "pairs-000001.tar.tmp" if half_written else "000003.lease"
        patiently(lambda: any(begun in name for name in leftovers(folder)))
        raise stop

    def make():
        with (
            closing(claim(folder, [3, 1], range(6), PRINT)) as todo,
            Writer(slowly) as behind,
            ExitStack() as stack,
        ):
            stack.callback(stopped.set)
            behind.shard(next(todo), blocks_of(3, WORKED))
            behind.shard(next(todo), broken(1))

    with pytest.raises(stop):
        make()
    assert hashes(folder) == {"pairs-000003.tar": reference["pairs-000003.tar"]}
    assert leftovers(folder) == []


def test_leases_are_held_until_what_is_behind_is_done(tmp_path, reference):  # noqa: F811
    folder, held = tmp_path / "pairs", []

    def slowly(k, blocks):
        time.sleep(0.005)
        held.append(f"{k:06d}.lease" in leftovers(folder))
        write(folder, k, WORKED, blocks)

    behind = Writer(slowly)
    with closing(claim(folder, [0], range(6), PRINT, settle=behind.settle)) as todo, behind:
        for k in todo:
            behind.shard(k, blocks_of(k, WORKED))
    assert held == [True] * 6
    assert hashes(folder) == reference
    assert leftovers(folder) == []
