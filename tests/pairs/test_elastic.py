"""Any number of workers, stopped and started at any time, on any disk: always the same bytes."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flowmatch.config import NotReady, UserError
from flowmatch.pairs import leases, shards
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import manifest
from flowmatch.runs.files import Folder
from pipelines import verify_pairs
from tests import forked, pairset
from tests.pairs.test_leases import finish, hashes, kill, leftovers, start
from tests.pairset import contents, copy, generate, words
from tests.store import PRINT, WORKED, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A set made by one worker at once, beside its teacher."""
    root = tmp_path_factory.mktemp("whole")
    pairset.make_teacher(root / "flow")
    generate(*words(root))
    return root


def stage(*argv, **environment):
    """Start stage two as a process of its own."""
    return forked.Popen(
        ["pipelines.generate_pairs", *argv],
        env=os.environ | environment,
        stdout=forked.PIPE,
        stderr=forked.PIPE,
    )


def wait(workers):
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, out + err


@pytest.mark.parametrize("number", [1, 3])
def test_workers_started_by_hand_share_the_work(whole, tmp_path, number):
    """In as many shells, told nothing of one another: no rank, no port, no coordinator."""
    argv = [word for word in words(tmp_path) if "teacher=" not in word]
    wait([stage(*argv, f"teacher={whole / 'flow'}") for _ in range(number)])
    assert contents(tmp_path / "pairs") == contents(whole / "pairs")
    assert leftovers(tmp_path / "pairs") == ["config.yaml"]


def test_an_array_lacks_a_member(whole, tmp_path):
    """The line of the guide for SLURM, members 0 and 2 of 3: nobody waits for member 1."""
    line = next(
        line
        for line in (ROOT / "docs/guides/pairs.md").read_text().splitlines()
        if "SLURM_ARRAY_TASK_ID" in line
    )
    argv = [word for word in words(tmp_path) if "teacher=" not in word]
    members = []
    for rank in ("0", "2"):
        slurm = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": rank}
        ((own, world, *_),) = pairset.words_in_shell(line, tmp_path, **slurm)
        assert (own, world) == (f"RANK={rank}", "WORLD_SIZE=3")
        members.append(stage(*argv, f"teacher={whole / 'flow'}", RANK=rank, WORLD_SIZE="3"))
    wait(members)
    assert contents(tmp_path / "pairs") == contents(whole / "pairs")


@pytest.mark.slow
def test_twenty_kills_and_as_many_numbers_of_workers(tmp_path):
    """SIGKILL to all workers at 20 random moments; each time another number of them goes on."""
    folder, number, rng = tmp_path / "pairs", 300, np.random.default_rng(20)
    half = 0
    for _ in range(20):
        world = int(rng.integers(1, 4))
        workers = [start(folder, rank, world, number, 60, 0.01) for rank in range(world)]
        for worker in workers:
            assert worker.stdout.readline().startswith("makes")
        for _ in range(rng.integers(1, 4)):
            assert workers[-1].stdout.readline().startswith("makes")
        time.sleep(rng.uniform(0, 0.05))  # the time that a shard takes
        kill(workers)
        half += bool(list(folder.glob("*.tmp.*")))
    assert half > 10  # most of them in the middle of a tar
    assert 0 < len(shards.missing(folder, range(number), PRINT)) < number - 20
    finish([start(folder, rank, 2, number, 60, 0) for rank in range(2)])
    for k in range(number):
        write(tmp_path / "reference", k, WORKED)
    assert hashes(folder) == hashes(tmp_path / "reference")
    assert leftovers(folder) == []


@pytest.mark.slow
def test_leases_that_hold_nothing_cost_no_byte(tmp_path):
    """Every worker breaks every lease at once: shards are made several times, all alike."""
    finish([start(tmp_path / "pairs", rank, 3, 6, 0.001, 0.01) for rank in range(3)])
    for k in range(6):
        write(tmp_path / "reference", k, WORKED)
    assert hashes(tmp_path / "pairs") == hashes(tmp_path / "reference")
    assert leftovers(tmp_path / "pairs") == []


@pytest.mark.slow
def test_a_frozen_worker_is_overtaken_and_may_come_back(tmp_path):
    """SIGSTOP in the middle of a shard: the others make it; awake again, it finds all done."""
    folder = tmp_path / "pairs"
    frozen = start(folder, 0, 3, 6, 1.0, 0.2)
    assert frozen.stdout.readline() == "makes 0\n"
    while not list(folder.glob("*.tmp.*")):
        time.sleep(0.01)
    frozen.send_signal(signal.SIGSTOP)
    try:
        made = finish([start(folder, rank, 3, 6, 1.0, 0.01) for rank in (1, 2)])
        # both may break the lease at once, and make that shard twice
        assert {k for shards_made in made for k in shards_made} == set(range(6))
        before = {path: path.stat().st_ino for path in folder.glob("*.tar")}
    finally:
        frozen.send_signal(signal.SIGCONT)
    finish([frozen])
    assert {path: path.stat().st_ino for path in folder.glob("*.tar")} == before
    for k in range(6):
        write(tmp_path / "reference", k, WORKED)
    assert hashes(folder) == hashes(tmp_path / "reference")
    assert leftovers(folder) == []


def test_more_ranks_than_shards_is_no_fault(whole, tmp_path, monkeypatch):
    copy(whole, tmp_path)
    for rank in (7, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "8")
        generate(*words(tmp_path, folder=f"pairs_{rank}"))
        assert contents(tmp_path / f"pairs_{rank}") == contents(whole / "pairs")


def test_zero_shards_are_refused(tmp_path):
    with pytest.raises(UserError, match="shards=0"):
        generate(*words(tmp_path, "shards=0"))


def test_a_set_grows_even_when_growth_is_cut_short(whole, tmp_path, monkeypatch, capsys):
    """3 shards and 3 more are 6 at once; unsealed in between, and no old tar is written again."""
    folder, wide = copy(whole, tmp_path), words(tmp_path, "shards=6")
    generate(*wide, f"run_dir={tmp_path / 'at_once'}")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    made = []

    def stop(*arguments, inner=shards.write_shard, **options):
        if made:
            raise KeyboardInterrupt
        made.append(arguments[1])
        return inner(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(*wide)
    assert made == [3]
    with pytest.raises(NotReady, match="has not finished"):
        PairData(folder)
    capsys.readouterr()
    assert verify_pairs.main([str(folder)]) == 2
    assert "is not finished: shards 4 to 5 are not made yet" in capsys.readouterr().err
    generate(*wide)
    assert contents(folder) == contents(tmp_path / "at_once")
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert len(PairData(folder)) == 60


def test_a_set_never_shrinks(whole, tmp_path):
    """Nor one that is not sealed: its tars would be read by whoever reads all tars of a folder."""
    folder = copy(whole, tmp_path)
    before = contents(folder)
    refusal = r"shards=2: run_dir=\S+ has 3 already, and a set never shrinks; set shards=3 or more"
    with pytest.raises(UserError, match=refusal):
        generate(*words(tmp_path, "shards=2"))
    shutil.rmtree(folder / ".meta")  # hidden, and so forgotten by some copies
    with pytest.raises(UserError, match=refusal):
        generate(*words(tmp_path, "shards=2"))
    generate(*words(tmp_path))
    assert contents(folder) == before
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=refusal):
        generate(*words(tmp_path, "shards=2"), "--dry-run")


def test_a_worker_does_not_seal_what_others_made_grow(whole, tmp_path, monkeypatch):
    """It was told of 3 shards; while it worked, others came, told of 4, and sealed those."""

    def claim(*words, inner=leases.claim, **options):
        yield from inner(*words, **options)
        with monkeypatch.context() as patch:
            patch.setattr(leases, "claim", inner)
            generate(*pairset.words(tmp_path, "shards=4"))

    folder = copy(whole, tmp_path)
    for name in ("manifest.json", ".meta/pairs-000002.json"):
        (folder / name).unlink()
    monkeypatch.setattr(leases, "claim", claim)
    with pytest.raises(UserError, match="shards=3: run_dir=.* has 4 already"):
        generate(*words(tmp_path))
    assert manifest.read(folder, "pairs")["facts"]["shards"] == 4


def test_a_seal_that_another_worker_takes_away_is_no_fault(whole, tmp_path, monkeypatch):
    """Two begin to make a set grow: one unseals it when the other is about to read the seal."""

    def read(self, name, inner=Folder.read):
        if name == manifest.NAME and self.path == folder:
            (folder / name).unlink(missing_ok=True)
        return inner(self, name)

    folder = copy(whole, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", read)
        generate(*words(tmp_path, "shards=4"))
    assert manifest.read(folder, "pairs")["facts"]["shards"] == 4


def test_a_refusal_leaves_the_seal(whole, tmp_path):
    folder = copy(whole, tmp_path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("seed: 0", "seed: 9"))
    with pytest.raises(UserError, match="seed: 9 -> 0"):
        generate(*words(tmp_path, "shards=4"))
    assert (folder / "manifest.json").is_file()


def test_a_worker_that_is_told_to_stop_leaves_no_half_shard(whole, tmp_path):
    """SIGTERM in the midst of a shard, while another is being written: exit 75, and then go on."""
    more = ["shards=200", f"teacher={whole}/flow"]
    worker = stage(*words(tmp_path), *more)
    folder = tmp_path / "pairs"
    while len(hashes(folder)) < 3:
        assert worker.poll() is None
        time.sleep(0.01)
    worker.send_signal(signal.SIGTERM)
    out, err = worker.communicate()
    assert worker.returncode == 75, out + err
    assert leftovers(folder) == ["config.yaml"]
    kept = len(hashes(folder))
    assert f"generate_pairs: {kept} of 200 shards" in err.splitlines()[-1]
    assert kept < 200


@contextmanager
def disk(folder, kilobytes):
    """Mount a small disk; yields a function that mounts it again with other options."""
    folder.mkdir()
    options = f"size={kilobytes}k"
    mount = ["mount", "-t", "tmpfs", "-o", options, "pairs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_rest_is_made_when_there_is_room(whole, tmp_path):
    with disk(tmp_path / "disk", 48) as again:
        argv = [f"run_dir={tmp_path}/disk/pairs", f"teacher={whole}/flow"]
        done = stage(*words(tmp_path), *argv)
        _, err = done.communicate()
        assert done.returncode == 2, err
        refusal = [line for line in err.splitlines() if "the disk refuses" in line]
        assert len(refusal) == 1
        assert "No space left on device; free space there" in refusal[0]
        folder = tmp_path / "disk" / "pairs"
        kept = hashes(folder)
        assert 1 <= len(kept) < 3
        assert not list(folder.glob("*.tmp.*")) + list(folder.glob(".meta/*.lease"))
        again("size=1m")
        generate(*words(tmp_path), *argv)
        assert contents(folder) == contents(whole / "pairs")
        assert hashes(folder).items() >= kept.items()


def test_a_file_that_may_not_grow_is_named(whole, tmp_path):
    """Where no disk can be mounted: a limit of 8 KB on files, over the card's 4, under a tar's 10."""
    command = ["tests.limited", 8192, "pipelines.generate_pairs", *words(tmp_path)]
    done = forked.run([*command, f"teacher={whole}/flow"])
    assert done.returncode == 2, done.stderr
    assert "the disk refuses: [Errno 27] File too large" in done.stderr
    assert sorted(os.listdir(tmp_path / "pairs")) == [".meta", "README.md", "config.yaml"]
    generate(*words(tmp_path), f"teacher={whole}/flow")
    assert contents(tmp_path / "pairs") == contents(whole / "pairs")


def test_a_folder_that_may_only_be_read_is_read(whole, tmp_path, capsys):
    from pipelines import inspect_pairs

    with disk(tmp_path / "disk", 1024) as again:
        folder = copy(whole, tmp_path / "disk")
        (folder / "pairs-000002.tar").unlink()
        again("ro")
        done = stage(*words(tmp_path), f"run_dir={folder}", f"teacher={whole}/flow")
        _, err = done.communicate()
        assert done.returncode == 2, err
        assert "the disk refuses: [Errno 30] Read-only file system" in err
        assert verify_pairs.main([str(folder)]) == 2
        again("rw")
        generate(*words(tmp_path), f"run_dir={folder}", f"teacher={whole}/flow")
        again("ro")
        assert verify_pairs.main([str(folder), "--full"]) == 0
        assert len(PairData(folder).batch(range(30))["x0"]) == 30
        generate(*words(tmp_path), f"run_dir={folder}", f"teacher={whole}/flow")  # sealed
        capsys.readouterr()
        assert inspect_pairs.main([str(folder)]) == 2
        assert "inspect_pairs: the disk refuses: [Errno" in capsys.readouterr().err
        assert inspect_pairs.main([str(folder), "--out", str(tmp_path / "look")]) == 0
