"""Pairs in an object store: a real server of the S3 protocol, real processes, killed and repeated."""

import json
import random
import tempfile
import threading
import time
from contextlib import closing

import pytest

from flowmatch.config import UserError
from flowmatch.pairs import leases, shards
from flowmatch.runs import manifest, storage
from flowmatch.runs.command import execute, load
from flowmatch.runs.config import StageConfig
from flowmatch.runs.folder import Plan, begin
from pipelines import inspect_pairs, reflow, verify_pairs
from tests import forked, pairset
from tests.pairs.test_faults import commands, mend
from tests.pairs.test_leases import finish, hashes, kill, start
from tests.pairset import SHARDS, generate
from tests.store import PRINT, WORKED, Clock, blocks_of, write


def objects(place, ending=".tar"):
    """Give what lies under a URL: name -> bytes."""
    store = storage.at(place)
    return {name: store.read(name) for name in store.names() if name.endswith(ending)}


@pytest.fixture
def reference(tmp_path):
    for k in range(6):
        write(tmp_path / "reference", k, WORKED)
    return hashes(tmp_path / "reference")


class Watch:
    """List a prefix again and again; keep the size of every tar that was ever seen."""

    def __init__(self, place):
        self.store, self.seen, self.stop = storage.at(place), set(), threading.Event()
        self.thread = threading.Thread(target=self._look)

    def _look(self):
        while not self.stop.wait(0.03):
            tars = [name for name in self.store.names() if ".tar" in name]
            self.seen |= set(zip(tars, self.store.sizes(tars), strict=True)) if tars else set()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()


@pytest.mark.slow
def test_a_killed_worker_is_repeated_and_no_half_object_is_ever_seen(
    tmp_path, monkeypatch, bucket, reference
):
    """SIGKILL at random moments, and the same command again: the bytes of an undisturbed local run."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    place, rng, kills = f"{bucket}/set", random.Random(0), 0
    with Watch(place) as watch:
        while shards.missing(place, range(6), PRINT) and kills < 5:
            worker = start(place, 0, 1, 6, 60, 0.04)
            assert worker.stdout.readline().startswith("makes")
            time.sleep(rng.uniform(0, 0.3))  # a shard takes 0.2 s
            kill([worker])
            kills += 1
        assert kills > 1
        finish([start(place, 0, 1, 6, 60, 0.01)])
    assert objects(place) == reference
    assert watch.seen == {(name, WORKED.tar_bytes) for name in reference}
    assert storage.at(place).names(".meta") == [f"pairs-{k:06d}.json" for k in range(6)]
    assert not list(tmp_path.rglob("*.tmp.*"))


def test_two_workers_share_a_bucket(bucket, reference):
    """Neither makes what the other holds: leases are objects that are created exclusively."""
    made = finish([start(f"{bucket}/set", 0, 1, 6, 60, 0.05) for _ in range(2)])
    assert sorted(made[0] + made[1]) == list(range(6))
    assert objects(f"{bucket}/set") == reference


@pytest.mark.slow
def test_workers_race_without_leases(bucket, reference):
    workers = [start(f"{bucket}/set", rank, 2, 6, 60, 0.01, "race") for rank in range(2)]
    finish(workers)
    assert objects(f"{bucket}/set") == reference


def test_a_lease_that_stands_still_is_broken_and_one_that_moves_is_not(bucket, monkeypatch):
    store, name, seen = storage.at(f"{bucket}/set"), ".meta/000000.lease", {}
    monkeypatch.setattr(leases, "time", clock := Clock())
    store.write(name, "elsewhere.7 0")
    assert leases.acquire(store, name, 0.3, seen) is None
    clock.now += 0.2
    store.write(name, "elsewhere.7 1")  # refreshed
    assert leases.acquire(store, name, 0.3, seen) is None
    clock.now += 0.2
    assert leases.acquire(store, name, 0.3, seen) is None
    clock.now += 0.15
    lease = leases.acquire(store, name, 0.3, seen)
    assert lease is not None
    first = store.read(name)
    while store.read(name) == first:  # its holder refreshes it
        assert lease.thread.is_alive()
    lease.release()
    assert store.names(".meta") == []


def test_stage_two_writes_into_a_bucket_what_it_writes_into_a_folder(tmp_path, bucket):
    """Config, card, tars and seal; repeated it does nothing, extended it makes what is more."""
    pairset.make_teacher(tmp_path / "flow", pairset.CLASSES)
    generate(*pairset.words(tmp_path))
    place = f"{bucket}/deep/pairs"
    generate(*pairset.words(tmp_path, f"run_dir={place}"))
    store = storage.at(place)
    assert objects(place) == hashes(tmp_path / "pairs")
    for name in ("manifest.json", "README.md"):
        assert store.read(name) == (tmp_path / "pairs" / name).read_bytes()
    assert store.read("config.yaml").startswith(f"run_dir: {place}\n".encode())
    before = store.read("manifest.json")
    generate(*pairset.words(tmp_path, f"run_dir={place}"))
    assert store.read("manifest.json") == before
    with pytest.raises(UserError, match=r"s3://.* was made with other settings"):
        generate(*pairset.words(tmp_path, f"run_dir={place}", "seed=1"))
    generate(*pairset.words(tmp_path, f"run_dir={place}", f"shards={SHARDS + 1}"))
    assert manifest.read(place, "pairs")["facts"]["shards"] == SHARDS + 1


@pytest.mark.parametrize("kind", ["s3://no-such-bucket/pairs", "gs://bucket/pairs", "s3://"])
def test_a_store_that_cannot_be_reached_is_named(tmp_path, kind, s3):
    pairset.make_teacher(tmp_path / "flow", pairset.CLASSES)
    with pytest.raises(UserError, match=kind) as error:
        generate(*pairset.words(tmp_path, f"run_dir={kind}"))
    if kind.startswith("gs"):
        assert "install gcsfs" in str(error.value)


def test_other_stages_stay_local():
    config = StageConfig(run_dir="memory://somewhere/flow")
    with pytest.raises(
        UserError, match="run_dir=memory://somewhere/flow: only pairs go into a store"
    ):
        begin("train_flow", Plan(config, {}, []), False)


def test_a_shard_whose_making_fails_leaves_nothing(tmp_path, monkeypatch, bucket):
    """A client that streams would commit the half that is there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def broken():
        yield next(blocks_of(0, WORKED))
        raise OSError("the teacher is gone")

    with pytest.raises(OSError, match="gone"):
        write(f"{bucket}/set", 0, WORKED, broken())
    assert not storage.at(f"{bucket}/set").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_store_without_exclusive_creation_has_no_leases(monkeypatch):
    """Then two workers may make the same shard: the same bytes."""
    monkeypatch.setattr(storage, "EXCLUSIVE", set())
    place = "memory://no/leases"
    storage._bucket.cache_clear()
    one, two = (leases.claim(place, [0], range(2), PRINT) for _ in range(2))
    with closing(one), closing(two):
        assert next(one) == next(two) == 0
        write(place, 0, WORKED)
        write(place, 0, WORKED)
        assert next(one) == next(two) == 1
        write(place, 1, WORKED)
        assert list(one) == list(two) == []
    storage._bucket.cache_clear()
    assert storage.at(place).names(".meta") == ["pairs-000000.json", "pairs-000001.json"]


def test_a_lease_that_another_is_just_taking_is_not_ours(monkeypatch):
    """S3 answers 409 where two conditional writes, or one and a removal, meet."""
    botocore = pytest.importorskip("botocore.exceptions")
    s3fs = pytest.importorskip("s3fs.errors")
    store = storage.at("memory://conflict/set")
    answer = {"Error": {"Code": "ConditionalRequestConflict", "Message": "in conflict"}}

    def conflict(*words, **options):
        raise s3fs.translate_boto_error(botocore.ClientError(answer, "PutObject"))

    with monkeypatch.context() as patch:
        patch.setattr(type(store.fs), "pipe_file", conflict)
        assert leases.acquire(store, ".meta/000000.lease", 60, {}) is None
    leases.acquire(store, ".meta/000000.lease", 60, {}).release()


def reflow_run(*words):
    config, call = load(reflow.ReflowConfig, ["configs/ring.yaml", *map(str, words)])
    execute(reflow.STAGE, config, call.dry_run)


def test_reflow_trains_from_a_bucket_as_from_a_folder(tmp_path, bucket):
    """Through a cache that holds two of the five shards: the same weights."""
    pairset.make_teacher(tmp_path / "flow", pairset.CLASSES)
    generate(*pairset.words(tmp_path, "shards=5"))
    generate(*pairset.words(tmp_path, "shards=5", f"run_dir={bucket}/pairs"))
    size, cache = pairset.LAYOUT.tar_bytes, tmp_path / "cache"
    words = [f"start={tmp_path}/flow", "device=cpu", "fit.steps=12", "fit.batch_size=6"]
    for name, place in {"near": tmp_path / "pairs", "far": f"{bucket}/pairs"}.items():
        entry = {"path": str(place), "group": 1}
        if name == "far":
            entry |= {"cache": str(cache), "cache_gb": 2.5 * size / 1e9}
        reflow_run(*words, f"run_dir={tmp_path / name}", f"pairs=[{json.dumps(entry)}]")
        assert manifest.sealed(tmp_path / name)
    assert manifest.digest(tmp_path / "near") == manifest.digest(tmp_path / "far")
    assert 0 < len(list(cache.rglob("*.tar"))) <= 2
    little = entry | {"cache_gb": 1.5 * size / 1e9}
    with pytest.raises(UserError, match=r"pairs\.0\.path=s3://.* needs .* in the cache"):
        reflow_run(*words, f"run_dir={tmp_path}/no", f"pairs=[{json.dumps(little)}]")


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_bad_object_stops_training_by_name(tmp_path, bucket, how):
    pairset.make_teacher(tmp_path / "flow", pairset.CLASSES)
    generate(*pairset.words(tmp_path, f"run_dir={bucket}/pairs"))
    store = storage.at(f"{bucket}/pairs")
    data = bytearray(store.read("pairs-000001.tar"))
    data[700] ^= 1
    store.write("pairs-000001.tar", bytes(data[:-1] if how == "truncated" else data))
    entry = json.dumps({"path": f"{bucket}/pairs", "cache": str(tmp_path / "cache")})
    words = [f"start={tmp_path}/flow", f"run_dir={tmp_path}/reflow", f"pairs=[{entry}]"]
    what = "has .* bytes, expected" if how == "truncated" else "is damaged: its bytes are not"
    with pytest.raises(UserError, match=rf"s3://.*/pairs-000001\.tar {what}"):
        reflow_run(*words, "device=cpu", "fit.steps=2", "fit.batch_size=6")


def test_a_damaged_set_in_a_bucket_is_found_set_aside_and_made_again(tmp_path, bucket, capsys):
    """By the very commands that verify_pairs prints; without --full it looks at no content."""
    pairset.make_teacher(tmp_path / "flow", pairset.CLASSES)
    place = f"{bucket}/pairs"
    generate(*pairset.words(tmp_path, "shards=4", f"run_dir={place}"))
    store, before = storage.at(place), objects(place)
    assert verify_pairs.main([place]) == verify_pairs.main([place, "--full"]) == 0
    assert "is sound: sealed, 4 shards, 40 pairs" in capsys.readouterr().out
    flipped = bytearray(before["pairs-000001.tar"])
    flipped[700] ^= 1
    store.write("pairs-000001.tar", bytes(flipped))
    store.write("pairs-000002.tar", before["pairs-000002.tar"][:-512])
    store.remove(".meta/pairs-000003.json")
    store.remove("README.md")
    assert verify_pairs.main([place]) == 2
    told = capsys.readouterr().err
    assert f"{place}/pairs-000002.tar has " in told
    assert f"{place}/pairs-000003.tar: its sidecar" in told
    assert f"{place}/README.md is missing" in told
    assert "pairs-000001" not in told
    assert verify_pairs.main([place, "--full", "--repair"]) == 2
    told = capsys.readouterr().err
    assert f"{place}/pairs-000001.tar is damaged: its bytes are not those" in told
    assert "pairs-000001.tar.bad" in store.names()
    assert len(commands(told)) == 1
    mend(told)
    assert objects(place) == before
    assert verify_pairs.main([place, "--full"]) == 0


def test_a_set_in_a_bucket_is_inspected(tmp_path, bucket, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    pairset.make_teacher(tmp_path / "flow", pairset.CLASSES)
    costs = []
    for where in (f"{bucket}/pairs", f"{tmp_path}/pairs"):
        generate(*pairset.words(tmp_path, f"run_dir={where}"))
        capsys.readouterr()
        assert inspect_pairs.main([where, "--out", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert f"{where}: 30 pairs of [2] in 3 shards" in out
        assert f"{tmp_path}/flow: train_flow, round 0" in out
        costs.append(json.loads((tmp_path / "out/summary.json").read_text())["cost"])
    assert costs[0] == costs[1]


@pytest.mark.slow
def test_the_stage_is_killed_and_repeated(tmp_path, monkeypatch, bucket):
    """Stage two itself, SIGKILLed with some shards committed: the bytes and the seal of a folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    pairset.make_teacher(tmp_path / "flow", pairset.CLASSES)
    more = ["shards=12", "shard_size=100", "block=10"]
    generate(*pairset.words(tmp_path, *more))
    place = f"{bucket}/pairs"
    store, words = storage.at(place), pairset.words(tmp_path, *more, f"run_dir={place}")
    command = ["pipelines.generate_pairs", *words]
    with Watch(place) as watch:
        for enough in (2, 5):
            worker = forked.Popen(command, stdout=forked.DEVNULL, stderr=forked.DEVNULL)
            while len([name for name in store.names() if name.endswith(".tar")]) < enough:
                assert worker.poll() is None
                time.sleep(0.01)
            worker.kill()
            worker.wait()
        assert not manifest.sealed(place)
        forked.run(command, check=True)
    assert objects(place) == hashes(tmp_path / "pairs")
    assert len({size for _, size in watch.seen}) == 1
    assert manifest.digest(place) == manifest.digest(tmp_path / "pairs")
    assert not list(tmp_path.rglob("*.tmp.*"))


@pytest.mark.slow
def test_two_ranks_train_from_a_bucket_through_one_cache(tmp_path, bucket):
    """As from the folder: the same weights, though each rank asks for the tars of both."""
    pairset.make_teacher(tmp_path / "flow", pairset.CLASSES)
    generate(*pairset.words(tmp_path, "shards=5"))
    generate(*pairset.words(tmp_path, "shards=5", f"run_dir={bucket}/pairs"))
    limit = {"cache": str(tmp_path / "cache"), "cache_gb": 2.5 * pairset.LAYOUT.tar_bytes / 1e9}
    words = [f"start={tmp_path}/flow", "device=cpu", "fit.steps=12", "fit.batch_size=6"]
    for name, entry in {
        "near": {"path": str(tmp_path / "pairs"), "group": 1},
        "far": {"path": f"{bucket}/pairs", "group": 1, **limit},
    }.items():
        more = [f"run_dir={tmp_path / name}", f"pairs=[{json.dumps(entry)}]"]
        command = ["pipelines.reflow", "configs/ring.yaml", *words, *more]
        forked.run_ranks(2, command, check=True)
    assert manifest.digest(tmp_path / "near") == manifest.digest(tmp_path / "far")
