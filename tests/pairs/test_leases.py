"""Who makes which shard: races, leases, dead workers."""

import os
import signal
import socket
import time
from contextlib import closing, suppress

import pytest

from flowmatch.config import UserError
from flowmatch.pairs import leases, shards
from flowmatch.pairs.leases import FileHold, Lease, claim
from flowmatch.runs import files, storage
from tests import forked, store
from tests.store import PRINT, WORKED, write

HERE = shards.worker().rpartition(".")[0]
DEAD = 2**22 + 1  # above Linux's largest process id


@pytest.fixture
def clock(monkeypatch):
    clock = store.Clock()
    monkeypatch.setattr(leases, "time", clock)
    return clock


def start(folder, *arguments):
    return forked.Popen(["tests.store", folder, *arguments], stdout=forked.PIPE)


def finish(workers):
    """Wait for workers; return the shards that each made."""
    printed = [worker.communicate(timeout=300)[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    return [[int(k) for k in lines[-1].split()[1:]] for lines in printed]


def kill(workers):
    for worker in workers:
        assert worker.poll() is None, "it was done before it was killed"
        worker.send_signal(signal.SIGKILL)
    for worker in workers:
        worker.wait()
        worker.stdout.close()


def hashes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def leftovers(folder):
    names = [path.name for place in (folder, folder / ".meta") for path in place.iterdir()]
    return [name for name in names if not name.endswith((".tar", ".json", ".md", ".meta"))]


@pytest.fixture
def reference(tmp_path):
    for k in range(6):
        write(tmp_path / "reference", k, WORKED)
    return hashes(tmp_path / "reference")


def make(folder, own, every, ttl=60.0, limit=None):
    made = []
    with closing(claim(folder, own, every, PRINT, ttl)) as todo:
        for k in todo:
            made.append(k)
            write(folder, k, WORKED)
            if len(made) == limit:
                break
    return made


def lease(folder, k, holder):
    (folder / ".meta").mkdir(parents=True, exist_ok=True)
    path = folder / ".meta" / f"{k:06d}.lease"
    path.write_text(holder)
    return path


def test_own_shards_first_then_the_rest_from_the_end(tmp_path):
    assert make(tmp_path, [1, 3], range(6)) == [1, 3, 5, 4, 2, 0]
    assert leftovers(tmp_path) == []
    assert make(tmp_path, [1, 3], range(6)) == []
    (tmp_path / "pairs-000002.tar").unlink()
    assert make(tmp_path, [0], range(7)) == [6, 2]


def test_a_lease_is_held_while_its_shard_is_made_and_no_longer(tmp_path):
    todo = claim(tmp_path, [0, 1], range(2), PRINT)
    assert next(todo) == 0
    assert leftovers(tmp_path) == ["000000.lease"]
    assert (tmp_path / ".meta/000000.lease").read_text() == shards.worker()
    write(tmp_path, 0, WORKED)
    assert next(todo) == 1
    assert leftovers(tmp_path) == ["000001.lease"]
    todo.close()
    assert leftovers(tmp_path) == []


def test_a_failing_worker_gives_its_lease_back(tmp_path):
    def fail():
        with closing(claim(tmp_path, [0], [0], PRINT)) as todo:
            for _ in todo:
                raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert leftovers(tmp_path) == []


def test_shards_of_another_fingerprint_stop_the_worker_before_it_works(tmp_path):
    write(tmp_path, 4, WORKED)
    with pytest.raises(UserError, match=r"pairs-000004\.tar was made with another config"):
        next(claim(tmp_path, [0], range(5), "b" * 64))


def test_a_shard_that_is_claimed_and_not_written_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="shard 0"):
        list(claim(tmp_path, [0], range(3), PRINT))


def test_a_lease_of_a_dead_process_here_is_broken_at_once(tmp_path, clock):
    for k, number in enumerate((DEAD, os.getpid())):
        lease(tmp_path, k, f"{HERE}.{number}")
    assert make(tmp_path, [0, 1], range(2), ttl=60) == [0, 1]
    assert clock.now == 0  # nobody waited
    assert leftovers(tmp_path) == []


def test_a_lease_that_stands_still_is_broken_after_ttl(tmp_path, clock):
    """For any time that the host wrote: its clock may be wrong."""
    for k, age in enumerate((-(10**6), 10**6)):
        path = lease(tmp_path, k, "elsewhere.7")
        os.utime(path, (time.time() + age, time.time() + age))
    assert make(tmp_path, [0, 1, 2], range(3), ttl=1) == [2, 0, 1]
    assert clock.now == pytest.approx(1, abs=0.11)  # ttl, in rounds of a tenth of it
    assert leftovers(tmp_path) == []


def test_a_shard_in_living_hands_is_waited_for(tmp_path, clock):
    """A refreshed lease outlives many ttl; when the shard is done, the waiting one stops."""
    path, rounds = lease(tmp_path, 0, "elsewhere.7"), []

    def sleep(seconds):
        """Do what the holder does meanwhile: refresh the lease, and after 30 rounds commit."""
        clock.now += seconds
        rounds.append(clock.now)
        os.utime(path, ns=(0, len(rounds)))
        if len(rounds) == 30:
            write(tmp_path, 0, WORKED)
            path.unlink()

    clock.sleep = sleep
    assert make(tmp_path, [0, 1], range(2), ttl=1) == [1]
    assert len(rounds) == 30  # three times ttl
    assert leftovers(tmp_path) == []


def test_a_held_lease_is_refreshed(tmp_path):
    path = tmp_path / "000000.lease"
    held = Lease(FileHold(path), 0.03)
    os.utime(path, (0, 0))
    while path.stat().st_mtime == 0:
        assert held.thread.is_alive()
        time.sleep(0.001)
    held.release()
    assert not held.thread.is_alive()
    assert not path.exists()


def test_a_lease_that_was_broken_is_not_taken_from_its_new_holder(tmp_path):
    path = tmp_path / "000000.lease"
    first = Lease(FileHold(path), 60)
    path.rename(tmp_path / "broken")
    second = Lease(FileHold(path), 60)
    first.release()
    assert path.is_file()
    second.release()
    assert not path.exists()


def test_a_container_of_the_same_name_is_another_host(tmp_path, monkeypatch):
    """Its processes have numbers of their own, which may be free, or ours, here."""
    host = socket.gethostname()
    for k, number in enumerate((DEAD, os.getpid())):
        lease(tmp_path, k, f"{host}-7.{number}")
    kept = [f"pairs-000007.tar.tmp.{host}-7.{DEAD}", "000000.lease", "000001.lease"]
    (tmp_path / kept[0]).write_text("half")
    leases.sweep(tmp_path)
    assert sorted(leftovers(tmp_path)) == sorted(kept)
    monkeypatch.setattr(files, "HOST_SPACE", 1)
    space = os.stat("/proc/self/ns/pid").st_ino
    boot = files.BOOT.read_text()[:8]
    assert files.worker() == f"{host}-{boot}-{space}.{os.getpid()}"


def test_only_temporary_files_of_the_dead_are_swept(tmp_path):
    kept = [f"pairs-000000.tar.tmp.{HERE}.1", f"pairs-000001.tar.tmp.elsewhere.{DEAD}"]
    kept += ["pairs-000003.tar.tmp.odd"]
    swept = [f"pairs-000002.tar.tmp.{HERE}.{DEAD}", f".meta/pairs-000002.json.tmp.{HERE}.{DEAD}"]
    old = "pairs-000004.tar.tmp.elsewhere.7"
    (tmp_path / ".meta").mkdir()
    for name in [*kept, *swept, old]:
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / old, (0, time.time() - 90_000))
    assert make(tmp_path, [], []) == []
    assert sorted(leftovers(tmp_path)) == sorted(kept)


@pytest.mark.slow
def test_workers_that_race_without_leases_make_the_same_files(tmp_path, reference):
    folder = tmp_path / "pairs"
    finish([start(folder, rank, 3, 6, 60, 0.01, "race") for rank in range(3)])
    assert hashes(folder) == reference
    assert leftovers(folder) == []
    for k in range(6):  # whoever came last, sidecar and tar agree
        side = shards.sidecar(folder, k)
        assert side["sha256"] == shards.sidecar(tmp_path / "reference", k)["sha256"]


@pytest.mark.slow
def test_leases_share_the_work(tmp_path, reference):
    """Each shard is made once; one worker of three that is slow does not hold up the rest."""
    folder = tmp_path / "pairs"
    workers = [start(folder, rank, 3, 6, 60, 0.2 if rank == 0 else 0.01) for rank in range(3)]
    made = finish(workers)
    assert sorted(k for shards_made in made for k in shards_made) == list(range(6))
    assert len(made[0]) < 3
    assert hashes(folder) == reference
    assert leftovers(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "stands still"])
def test_a_killed_workers_shard_is_taken_over(tmp_path, reference, reaped):
    """SIGKILL in the middle of a shard: another finishes it; its half file goes at the next start.

    A process that is gone is noticed at once; one whose id still stands (here a zombie) after ttl.
    """
    folder = tmp_path / "pairs"
    victim = start(folder, 0, 2, 6, 1.0, 30)
    assert victim.stdout.readline() == "makes 0\n"
    while not list(folder.glob("*.tmp.*")):
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    if reaped:
        victim.wait()
    assert finish([start(folder, 1, 2, 6, 1.0, 0.01)]) == [[1, 3, 5, 4, 2, 0]]
    victim.wait()
    victim.stdout.close()
    finish([start(folder, 0, 2, 6, 1.0, 0.01)])
    assert hashes(folder) == reference
    assert leftovers(folder) == []


@pytest.mark.slow
def test_a_killed_run_is_finished_by_a_run_of_another_size(tmp_path, reference):
    folder = tmp_path / "pairs"
    workers = [start(folder, rank, 3, 6, 60, 0.1) for rank in range(3)]
    for worker in workers:
        assert worker.stdout.readline().startswith("makes")
    kill(workers)
    assert leftovers(folder)
    finish([start(folder, rank, 2, 6, 60, 0.01) for rank in range(2)])
    assert hashes(folder) == reference
    assert leftovers(folder) == []


def test_the_lease_of_a_worker_killed_after_its_commit_is_swept(tmp_path):
    write(tmp_path, 0, WORKED)
    (tmp_path / ".meta/000000.lease").write_text(f"{HERE}.{DEAD}")
    (tmp_path / ".meta/000001.lease").write_text("elsewhere.1")
    make(tmp_path, [0], [0])
    assert leftovers(tmp_path) == ["000001.lease"]


@pytest.mark.parametrize("place", ["folder", "store"])
def test_a_half_tar_that_another_worker_removed_is_made_again(tmp_path, monkeypatch, place):
    """Its clock is a day ahead: what was written a moment ago is a day old."""
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    folder = storage.at(tmp_path / "set" if place == "folder" else "memory://ahead/set")
    made, put, ahead = [], type(folder).put, time.time() + 90_000

    def swept(self, built, name):
        if len(made) == 2:  # the first shard's second try is left alone
            with monkeypatch.context() as patch:
                patch.setattr(files.socket, "gethostname", lambda: "elsewhere")
                patch.setattr(leases.time, "time", lambda: ahead)
                leases.sweep(folder)
        put(self, built, name)

    monkeypatch.setattr(type(folder), "put", swept)
    with closing(leases.claim(folder, [0, 1], [0, 1], PRINT)) as todo:
        for k in todo:
            made.append(k)
            with suppress(shards.Vanished):
                write(folder, k, WORKED)
    assert made == [0, 1, 1]
    assert not shards.missing(folder, [0, 1], PRINT)
