"""A stage as a process: exit codes, faults, and the signals that ask it to stop."""

import errno
import mmap
import os
import pty
import re
import signal
import time

import numpy as np
import pytest
import torch

from flowmatch.runs import command, group, memory, stopping
from tests import forked


def start(tmp_path, *words, **options):
    """Start the toy stage in a fork."""
    return forked.Popen(["tests.toy", f"run_dir={tmp_path / 'stage'}", *words], **options)


def outcome(tmp_path, *words, **environment):
    """Run the toy stage to its end."""
    argv = ["tests.toy", f"run_dir={tmp_path / 'stage'}", *words]
    done = forked.run(argv, env=os.environ | environment, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_user_errors_are_one_line_each_and_exit_2(tmp_path):
    assert outcome(tmp_path, "fault=plan") == (2, "", "toy: first\ntoy: second\n")
    code, _, err = outcome(tmp_path, "lr=-1", "lrr=2")
    assert code == 2
    assert err.count("\n") == 2
    array = {"RANK": "1", "WORLD_SIZE": "2"}  # a member of an array: its own log
    code, _, err = outcome(tmp_path, "fault=plan", "--dry-run", **array)
    assert (code, err) == (2, "toy: rank 1: first\ntoy: rank 1: second\n")


def test_a_disk_that_refuses_is_named_and_exits_2(tmp_path):
    code, _, err = outcome(tmp_path, "fault=ENOSPC")
    assert code == 2
    assert err.startswith("toy: the disk refuses: [Errno 28] No space left on device; free space")
    assert err.count("\n") == 1
    for fault in ("EIO", "ESTALE", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP"):
        code, _, err = outcome(tmp_path, f"fault={fault}")
        assert code == 2
        assert err.startswith("toy: the disk refuses: [Errno")
        assert err.count("\n") == 1


def test_memory_that_runs_out_is_said_with_the_keys_that_decide_its_size(tmp_path):
    asked = "toy: not enough memory: Unable to allocate 4.00 EiB for an array"
    for moment in ("plan", "run"):
        code, _, err = outcome(tmp_path, f"fault=memory-{moment}", "batch_size=300")
        assert code == 2
        assert err.startswith(asked)
        assert err.endswith("; make smaller what decides its size: batch_size=300\n")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda: np.empty(1 << 59),
        lambda: np.empty(1 << 62),
        lambda: np.empty(1 << 63),
        lambda: torch.empty(1 << 59),
        lambda: torch.empty(1 << 62),
        lambda: [0] * (1 << 60),
        lambda: mmap.mmap(-1, 1 << 60),
    ],
)
def test_errors_of_memory_are_told_from_others(ask):
    with pytest.raises((MemoryError, RuntimeError, ValueError, OSError)) as asked:
        ask()
    assert memory.runs_out(asked.value)
    assert command.refusal(asked.value).faults[0].startswith("not enough memory: ")
    for other in (RuntimeError("a bug"), ValueError("no"), OSError(errno.EIO, "broken")):
        assert not memory.runs_out(other)


def test_a_missing_input_is_a_remark_for_a_plan_and_an_error_for_a_run(tmp_path):
    assert outcome(tmp_path, "fault=input")[0] == 2
    code, out, err = outcome(tmp_path, "fault=input", "--dry-run")
    assert (code, out, err) == (0, "toy: later: teacher=x does not exist\n", "")


STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.mark.parametrize(
    ("number", "words", "begun", "where"),
    [
        *((number, [], "ready 0 1\n", r" at step \d+") for number in STOPS),
        (signal.SIGINT, ["saves=false"], "ready 0 1\n", ""),
        (signal.SIGTERM, ["sleep=60"], "plans\n", ""),  # while its inputs are loaded
    ],
)
def test_a_signal_to_stop_is_said_and_exits_75(tmp_path, number, words, begun, where):
    stage = start(tmp_path, *words, stdout=forked.PIPE, stderr=forked.PIPE)
    assert stage.stdout.readline() == begun
    stage.send_signal(number)
    out, err = stage.communicate(20)
    assert stage.returncode == 75
    line = f"toy: stopped by {number.name}{where}; repeat the command to go on\n"
    assert re.fullmatch(line, out), out
    assert err == ""


def test_a_second_ctrl_c_ends_it_at_once_and_kill_gives_the_lock_back(tmp_path):
    stage = start(tmp_path, "fault=stuck", stdout=forked.PIPE)  # it never asks whether to stop
    assert stage.stdout.readline() == "ready 0 1\n"
    stage.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert stage.poll() is None
    for number in (signal.SIGTERM, signal.SIGINT):
        stage.send_signal(number)
    assert stage.wait(20) == -signal.SIGINT
    with start(tmp_path, stdout=forked.PIPE) as stage:  # the lock is free
        assert stage.stdout.readline() == "ready 0 1\n"
        stage.kill()
        assert stage.wait(20) == -9


def test_a_rank_that_is_ended_for_the_fault_of_another_does_not_say_it_was_stopped(
    capsys, monkeypatch
):
    """A launcher sends SIGTERM to the others."""
    monkeypatch.setattr(group, "ended", lambda: 2)
    with pytest.raises(SystemExit) as left, stopping.heard("toy"), command.exit_codes("toy"):
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 2
    assert capsys.readouterr().out == ""


def test_nohup_keeps_its_meaning_and_a_closed_terminal_is_no_fault(tmp_path):
    ours, theirs = pty.openpty()
    stage = start(tmp_path, env=os.environ | {"NOHUP": "1"}, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while not said.endswith(b"\n"):
        said += os.read(ours, 100)
    assert said == b"ready 0 1\r\n"
    stage.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert stage.poll() is None
    os.close(ours)  # what it prints from now on would raise
    stage.send_signal(signal.SIGTERM)
    assert stage.wait(20) == 75
