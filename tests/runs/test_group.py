"""Processes of one job: they agree before they work, and end together, with the rank of the cause."""

import os
import signal
import socket
import time

import pytest

from tests import forked


class Ranks:
    """Two toys of one job; what they print goes to files."""

    def __init__(self, folder, *words, each=((), ())):
        names = [folder / f"{r}.{kind}" for r in (0, 1) for kind in ("out", "err")]
        self.files = [open(name, "w+") for name in names]  # noqa: SIM115 (until `end`)
        environments = forked.environments(2)
        self.ranks = [
            forked.Popen(
                ["tests.toy", f"run_dir={folder / 'stage'}", *words, *more],
                env=environments[r],
                stdout=self.files[2 * r],
                stderr=self.files[2 * r + 1],
            )
            for r, more in enumerate(each)
        ]

    def read(self, kind):
        """What the ranks have printed on stdout (0) or stderr (1)."""
        texts = []
        for file in self.files[kind::2]:
            file.seek(0)
            texts.append(file.read())
        return texts

    def ready(self):
        """Wait until both work."""
        end = time.monotonic() + 60
        while not all("ready" in text for text in self.read(0)):
            assert time.monotonic() < end, self.read(1)
            time.sleep(0.02)

    def end(self):
        """Wait for both; return their exit codes and the lines of both on stderr."""
        codes = [rank.wait(60) for rank in self.ranks]
        errors = "".join(self.read(1))
        for file in self.files:
            file.close()
        return codes, [line for line in errors.splitlines() if line]


def test_ranks_that_differ_stop_before_they_work_with_rank_and_keys(tmp_path):
    """Also in a run field that decides when they meet, but not in where they see the folder."""
    own = [(), ("lr=0.3", "fit.save_every=7", f"run_dir={tmp_path}/own")]
    job = Ranks(tmp_path, each=own)
    assert job.end() == (
        [2, 2],
        [
            "toy: rank 1: differs from rank 0, and would train the same model on other terms:",
            "toy: rank 1:   fit.save_every: 5 -> 7",
            "toy: rank 1:   lr: 0.1 -> 0.3",
        ],
    )
    assert not list(tmp_path.glob("*/*"))
    job = Ranks(tmp_path, "steps=1", each=[(), (f"run_dir={tmp_path}/own",)])
    assert job.end() == ([0, 0], [])


@pytest.mark.parametrize("moment", ["plan", "run"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_one_rank_is_said_with_its_rank_and_ends_the_others(tmp_path, moment, rank):
    job = Ranks(tmp_path, f"fault={moment}:{rank}")
    assert job.end() == ([2, 2], [f"toy: rank {rank}: first", f"toy: rank {rank}: second"])


def test_a_fault_of_all_ranks_is_said_once(tmp_path):
    codes, lines = Ranks(tmp_path, "lr=-1", "lrr=2").end()
    assert codes == [2, 2]
    assert len(lines) == 2
    assert "lr=-1.0" in lines[0] or "lr=-1" in lines[0]
    assert len({line.split(": ")[1] for line in lines}) == 1  # of one rank


def test_a_bug_on_one_rank_ends_the_others(tmp_path):
    codes, lines = Ranks(tmp_path, "fault=bug:1").end()
    assert codes == [1, 1]
    assert "RuntimeError: a bug" in lines
    assert lines.count("toy: rank 1 has failed: RuntimeError: a bug") == 1


def test_a_rank_that_is_stopped_while_the_others_plan_stops_them(tmp_path):
    job = Ranks(tmp_path, each=[("sleep=60",), ("sleep=60",)])
    while not all("plans" in text for text in job.read(0)):
        time.sleep(0.02)
    job.ranks[1].send_signal(signal.SIGTERM)
    codes, lines = job.end()
    assert codes == [75, 75]
    assert lines == ["toy: rank 1 was stopped; repeat the command to go on"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_ends_the_job_with_its_name(tmp_path, rank):
    """SIGSTOP; rank 0 has the store, so the other one hears nothing from it at all."""
    job = Ranks(tmp_path, "fit.stall_seconds=3")
    job.ready()
    pid = job.ranks[rank].pid
    os.kill(pid, signal.SIGSTOP)
    codes, lines = job.end()  # the one that stood still is woken, and ends as well
    assert codes == [1, 1]
    (line,) = lines
    assert line.startswith(f"toy: rank {rank} (process {pid} on ")
    assert "has shown no sign of life for 3 seconds" in line


@pytest.mark.slow
def test_a_slow_step_is_no_silence(tmp_path):
    job = Ranks(tmp_path, "fit.stall_seconds=3", "fault=slow", "steps=1")
    assert job.end() == ([0, 0], [])


def test_two_processes_of_one_rank_are_told_so(tmp_path):
    environments = [env | {"WORLD_SIZE": "3"} for env in forked.environments(2)]
    argv = ["tests.toy", f"run_dir={tmp_path / 'stage'}"]
    jobs = [
        forked.Popen(argv, env=environments[r], stdout=forked.DEVNULL, stderr=forked.PIPE)
        for r in (0, 1, 1)
    ]
    said = "".join(job.communicate(60)[1] for job in jobs)
    assert [job.returncode for job in jobs] == [2, 2, 2]
    assert said == "toy: rank 1: RANK=1 is that of another process of the job, too\n"


def test_a_rank_that_is_killed_ends_the_job(tmp_path):
    job = Ranks(tmp_path, "fit.stall_seconds=3")
    job.ready()
    job.ranks[1].kill()
    codes, lines = job.end()
    assert codes == [1, -9]
    assert lines[0].startswith("toy: rank 1 (process ")


def test_a_rank_without_the_others_says_its_fault_alone(tmp_path):
    """And a port that another program has is named."""
    environments = forked.environments(2)
    argv = ["tests.toy", f"run_dir={tmp_path / 'stage'}"]
    alone = forked.run([*argv, "fault=plan"], env=environments[1], timeout=60)
    assert (alone.returncode, alone.stderr) == (2, "toy: rank 1: first\ntoy: rank 1: second\n")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = {"MASTER_PORT": str(taken.getsockname()[1])}
        found = forked.run(argv, env=environments[0] | port, timeout=60)
    assert found.returncode == 2
    assert found.stderr.startswith("toy: rank 0: the processes cannot meet at 127.0.0.1:")
    assert found.stderr.count("\n") == 1


def test_a_broken_connection_names_the_process_that_is_gone(monkeypatch):
    """A zombie is gone, too; other errors, and living processes, name nobody."""
    import subprocess

    from flowmatch.runs import group
    from flowmatch.runs.files import worker

    dead = subprocess.Popen(["true"])
    while group.lives(dead.pid):
        pass
    host, _, own = worker().rpartition(".")
    assert group.lives(int(own))

    class Meeting:
        world = 2

        def ended(self):
            return None

    class Heartbeat:
        stall = 0.0

    job = object.__new__(group.Job)
    job.meeting, job.heartbeat = Meeting(), Heartbeat()
    job.places = {0: worker(), 1: f"{host}.{dead.pid}"}
    monkeypatch.setattr(group, "_job", job)
    broken = RuntimeError("[pair.cc:537] Read error [10.0.0.2]:41646: Connection reset by peer")
    assert group.lost(broken) == f"rank 1 (process {dead.pid} on {host}) is gone"
    assert group.lost(RuntimeError("shapes do not match")) == ""
    job.places[1] = worker()
    assert group.lost(broken) == ""
    dead.wait()
