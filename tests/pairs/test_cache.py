"""Reading a set that lies in a store: equal bytes, a bounded cache, every fault named."""

import errno
import fcntl
import itertools
import json
import os
import pickle
import shlex
import threading
import time

import numpy as np
import pytest
import torch

from flowmatch import config as configs
from flowmatch.config import UserError
from flowmatch.pairs import cache as caching
from flowmatch.pairs import dataset
from flowmatch.pairs.cache import Cache, room
from flowmatch.pairs.config import PairsEntry
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import Layout
from flowmatch.pairs.mixture import Mixture
from flowmatch.pairs.shards import sidecar, tar_name
from flowmatch.runs import storage
from flowmatch.runs.storage import Bucket
from tests.store import finish, write

LAYOUT = Layout((2, 3), "float16", True, 10, 4)
SHARDS, SIZE = 7, LAYOUT.tar_bytes
PLACES = (f"memory://some sets/{number}" for number in itertools.count())


@pytest.fixture
def place(tmp_path):
    """A set in memory, and the same beside it in a folder."""
    url = next(PLACES)
    for folder in (url, tmp_path / "local"):
        finish(folder, LAYOUT, SHARDS)
    return url


def gb(shards):
    return (shards + 0.5) * SIZE / 1e9


def remote(place, tmp_path, group, shards):
    return PairData(place, "pairs.0.path", group, tmp_path / "cache", gb(shards))


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.tar"))


@pytest.fixture
def fetched(monkeypatch):
    """The tars that were fetched, in order."""
    names, fetch = [], Bucket.fetch

    def count(self, name, target):
        names.append(name)
        fetch(self, name, target)

    monkeypatch.setattr(Bucket, "fetch", count)
    return names


def walk(data, steps, batch=6, start=0):
    stream = Mixture([(data, 1.0)], batch, 3)
    for step in range(start, start + steps):
        yield stream(step * batch + np.arange(batch))


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in ("x0", "x1", "label"))


@pytest.mark.parametrize("group", [1, 2, 3])
def test_a_cache_smaller_than_the_set_gives_the_bytes_of_the_folder(
    tmp_path, place, fetched, group
):
    """Three epochs of training: the same batches, no more tars than allowed, each once an epoch."""
    data, local = (
        remote(place, tmp_path, group, 2 * group),
        PairData(tmp_path / "local", "l", group),
    )
    most = 0
    for ours, theirs in zip(walk(data, 35), walk(local, 35), strict=True):
        assert same(ours, theirs)
        most = max(most, len(cached(tmp_path)))
        assert len(data._maps) <= 2 * group
    assert most <= 2 * group < SHARDS
    assert len(fetched) <= 3 * SHARDS + group  # one group is fetched ahead


def test_all_shards_at_once_need_room_for_all(tmp_path, place, fetched):
    data = remote(place, tmp_path, 0, SHARDS)
    for ours, theirs in zip(walk(data, 24), walk(PairData(tmp_path / "local"), 24), strict=True):
        assert same(ours, theirs)
    assert sorted(fetched) == sorted(map(tar_name, range(SHARDS)))
    again = remote(place, tmp_path, 0, SHARDS)
    list(walk(again, 2))
    assert len(fetched) == SHARDS  # what is there is used


@pytest.mark.parametrize(("group", "shards", "batch"), [(0, 6, 6), (2, 3, 6), (1, 3, 32)])
def test_a_cache_that_cannot_hold_a_step_is_refused_before_any_work(
    tmp_path, place, fetched, group, shards, batch
):
    with pytest.raises(
        UserError, match=r"pairs\.0\.path=memory.* needs \d+ of them in the cache"
    ) as error:
        list(walk(remote(place, tmp_path, group, shards), 1, batch))
    assert "use pairs.0.cache_gb=" in str(error.value)
    assert not fetched
    assert not (tmp_path / "cache").exists()


def test_any_step_can_be_the_first(tmp_path, place):
    straight = list(walk(remote(place, tmp_path, 2, 4), 30))
    (later,) = walk(remote(place, tmp_path, 2, 4), 1, start=29)
    assert same(later, straight[29])


def test_the_next_group_is_fetched_while_this_one_is_trained_on(tmp_path, place, fetched):
    stream = walk(remote(place, tmp_path, 2, 4), 10)
    next(stream)
    while len(cached(tmp_path)) < 4:  # nobody asks for them
        time.sleep(0.01)
    assert len(fetched) == 4
    next(stream)
    assert len(fetched) == 4


def spoil(place, name, how):
    store = storage.at(place)
    data = bytearray(store.read(name))
    if how == "missing":
        store.remove(name)
    elif how == "truncated":
        store.write(name, bytes(data[:-512]))
    else:
        data[1000] ^= 1
        store.write(name, bytes(data))


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("missing", r"000003\.tar is missing"),
        ("truncated", rf"000003\.tar has {SIZE - 512} bytes, expected {SIZE}"),
        ("flipped", r"000003\.tar is damaged: its bytes are not those that were sealed"),
    ],
)
def test_a_bad_object_is_named_when_it_is_trained_on(tmp_path, place, how, what):
    """Spoilt after the start, so a thread finds it; mended, the same reader goes on."""
    seal = storage.at(place)
    manifest = json.loads(seal.read("manifest.json"))
    manifest["outputs"] = {tar_name(k): sidecar(place, k)["sha256"] for k in range(SHARDS)}
    seal.write("manifest.json", json.dumps(manifest))
    data = remote(place, tmp_path, 2, 4)
    spoil(place, tar_name(3), how)
    with pytest.raises(
        UserError, match=f"{place}/pairs-{what}.*flowmatch verify {shlex.quote(place)} --full"
    ):
        list(walk(data, 12))
    assert tar_name(3) not in cached(tmp_path)
    assert not list((tmp_path / "cache").rglob("pairs-000003.tar.part"))
    seal.remove(".meta/pairs-000003.json")
    write(place, 3, LAYOUT)
    assert len(list(walk(data, 12))) == 12
    spoil(place, tar_name(3), "missing")
    with pytest.raises(
        UserError, match=rf"000003\.tar is missing; flowmatch verify {shlex.quote(place)} "
    ):
        remote(place, tmp_path, 2, 4)


def test_a_client_that_fails_is_named_and_nothing_hangs(tmp_path, place, monkeypatch):
    data = remote(place, tmp_path, 2, 4)

    def fail(path, target, **more):
        raise ConnectionResetError("no route")

    monkeypatch.setattr(data.folder.fs, "get_file", fail)
    with pytest.raises(UserError, match=r"pairs-\d{6}\.tar: the store refuses .*no route"):
        next(walk(data, 1))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_not_the_stores_fault(tmp_path, place, monkeypatch, number):
    data = remote(place, tmp_path, 2, 4)

    def fail(path, target, **more):
        raise OSError(number, os.strerror(number), target)

    monkeypatch.setattr(data.folder.fs, "get_file", fail)
    with pytest.raises(
        UserError, match=r"tar cannot be stored in .*cache.*; free space there, set"
    ):
        next(walk(data, 1))


def test_a_cache_of_a_local_folder_is_refused(tmp_path, place):
    for more in ({"cache": tmp_path / "cache"}, {"cache_gb": 1.0}):
        with pytest.raises(
            UserError, match=r"p=.*local: cache.*has no effect, because a local folder"
        ) as error:
            PairData(tmp_path / "local", "p", **more)
        assert len(error.value.faults) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UserError, match=r"pairs-\d{6}\.tar cannot be stored in .*cache"):
        next(walk(remote(place, tmp_path, 2, 4), 1))


def test_processes_share_a_cache(tmp_path, place, monkeypatch):
    """One fetches, the other waits for it; a half file that was left is made anew."""
    begun, asked, fetch = [], [], Bucket.fetch

    def flock(file, operation, inner=fcntl.flock):
        if operation == fcntl.LOCK_EX:
            asked.append(file)
        inner(file, operation)

    def last(self, name, target):
        """Fetch when the others wait for the lock."""
        begun.append(name)
        while len(asked) < 3:
            time.sleep(0.001)
        fetch(self, name, target)

    monkeypatch.setattr(caching.fcntl, "flock", flock)
    monkeypatch.setattr(Bucket, "fetch", last)
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "pairs-000000.tar.part").write_bytes(b"left by a killed process")
    store = storage.at(place)
    caches = [Cache(store, folder, 4, SIZE, {}) for _ in range(3)]
    threads = [threading.Thread(target=lambda c=c: os.close(c.open(tar_name(0)))) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun == [tar_name(0)]
    assert [path.name for path in folder.iterdir()] == [tar_name(0)]
    assert (folder / tar_name(0)).read_bytes() == store.read(tar_name(0))


def test_a_tar_that_is_whole_this_moment_takes_its_place(tmp_path, place, monkeypatch):
    """While one thread makes room, another gives its half file its name."""
    for k, ending in enumerate(["", "", ".part", ".part"]):
        (tmp_path / (tar_name(k) + ending)).write_bytes(b"")
        os.utime(tmp_path / (tar_name(k) + ending), (k, k))

    def then_whole(folder, tars=caching._tars):
        yield from list(tars(folder))
        (folder / "pairs-000003.tar.part").rename(folder / tar_name(3))

    monkeypatch.setattr(caching, "_tars", then_whole)
    Cache(storage.at(place), tmp_path, 3, SIZE, {})._evict()
    assert not (tmp_path / tar_name(0)).exists()
    assert (tmp_path / tar_name(1)).exists()


def test_a_tar_that_another_process_evicts_stays_readable(tmp_path, place):
    data = remote(place, tmp_path, 2, 4)
    stream = walk(data, 2)
    first = next(stream)
    for path in (tmp_path / "cache").rglob("*.tar"):
        path.unlink()
    next(stream)
    assert same(first, next(walk(PairData(tmp_path / "local", "l", 2), 1)))


def test_a_tar_that_another_process_evicts_this_moment_is_no_fault(tmp_path, place):
    """It is listed, and gone when it is looked at: as a link that leads nowhere."""
    data = remote(place, tmp_path, 2, 4)
    data.cache.folder.mkdir(parents=True)
    (data.cache.folder / "pairs-000099.tar").symlink_to("nowhere")
    assert room(data.cache.folder) > 0
    assert same(next(walk(data, 1)), next(walk(PairData(tmp_path / "local", "l", 2), 1)))


def test_sets_share_what_is_free(tmp_path, place, monkeypatch):
    """Each may take nine tenths of the disk by default, and two of them no more together."""
    monkeypatch.setattr(dataset, "room", lambda folder: 8 * SIZE)
    one, two = (PairData(place, f"{n}", 1, tmp_path / n) for n in ("one", "two"))
    given = PairData(place, "given", 1, tmp_path / "given", gb(5))
    Mixture([(one, 1), (two, 1), (given, 1)], 6, 0)
    assert [data.cache.capacity for data in (one, two, given)] == [4, 4, 5]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_draws_the_same_mixture(tmp_path, place, world):
    """Of a set group by group through one cache, and of one all at once; in micro-batches of 2."""
    step, steps = 12, 15  # more than an epoch of the first set
    near = tmp_path / "local"
    alone = Mixture([(PairData(near, "a", 2), 2.0), (PairData(near, "b"), 1.0)], step, 3)
    ranks = [
        Mixture([(remote(place, tmp_path, 2, 4), 2.0), (PairData(near, "b"), 1.0)], step, 3)
        for _ in range(world)
    ]
    for number in range(steps):
        counters = number * step + np.arange(step)
        micros = counters.reshape(-1, world, 2)  # [accumulation, rank, micro-batch]
        parts = [stream(row[r]) for row in micros for r, stream in enumerate(ranks)]
        drawn = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert same(drawn, alone(counters))
    assert len(cached(tmp_path)) <= 4


def test_where_tars_are_kept_is_no_content():
    entry = PairsEntry(path="s3://bucket/pairs", cache="/scratch", cache_gb=2)
    content = {"weight": 1.0, "group": 0, "truncate": 0.0, "held_out": 0}
    assert configs.content(entry) == content


def test_the_reader_reaches_another_process(tmp_path, place):
    """By pickling, without its threads; by fork, with new ones."""
    data = remote(place, tmp_path, 0, SHARDS)
    (first,) = walk(data, 1)
    copy = pickle.loads(pickle.dumps(data))
    assert same(next(walk(copy, 1)), first)
    child = os.fork()
    if not child:
        try:
            data._maps.clear()
            for path in (tmp_path / "cache").rglob("*.tar"):
                path.unlink()
            os._exit(0 if same(data.batch(range(5)), copy.batch(range(5))) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_tar_that_is_damaged_in_the_cache_is_fetched_again(tmp_path, place, fetched, capsys):
    """Two bits of a value, at the next start; what this process has hashed is not hashed again."""
    first = list(walk(remote(place, tmp_path, 0, SHARDS), 12))
    (path,) = (tmp_path / "cache").rglob(tar_name(3))
    raw, fetches = bytearray(path.read_bytes()), len(fetched)
    raw[int(LAYOUT.offsets(5)["x1"]) + 1] ^= 96
    path.write_bytes(raw)
    again = remote(place, tmp_path, 0, SHARDS)
    assert all(same(*pair) for pair in zip(walk(again, 12), first, strict=True))
    assert fetched[fetches:] == [tar_name(3)]
    assert (
        capsys.readouterr().out.count("pairs-000003.tar is damaged (sha256 differs): fetched") == 1
    )
    assert again.cache.sound == {tar_name(k) for k in range(SHARDS)}
