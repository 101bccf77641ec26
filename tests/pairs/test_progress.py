"""One line for the whole set: what all workers committed, and what it costs to know."""

import os

import pytest

from flowmatch.pairs import shards
from flowmatch.pairs.progress import ShardProgress
from tests.store import PRINT, WORKED, write


def progress(folder, number=8, **options):
    return ShardProgress(folder, range(number), PRINT, WORKED.shard_size, **options)


def test_the_rate_is_that_of_the_whole_set_while_we_watch(tmp_path):
    seen = progress(tmp_path)
    seen.update(5.0)
    assert seen.line() == "0 of 8 shards, 0 of 80 pairs"
    for k in (0, 1):
        write(tmp_path, k, WORKED)
    seen = progress(tmp_path)
    seen.update(100.0)  # what was there before we came is no work of ours to time
    assert seen.line() == "2 of 8 shards, 20 of 80 pairs"
    for k in (7, 3, 4):  # by whomever
        write(tmp_path, k, WORKED)
    seen.update(160.0)
    seen.update(400.0)  # nothing new: neither the rate nor the time left is guessed
    assert seen.line() == "5 of 8 shards, 50 of 80 pairs, 0.5 pairs/s, 0:01:00 left"
    for k in (2, 5, 6):
        write(tmp_path, k, WORKED)
    seen.update(160.25)
    assert seen.line() == "8 of 8 shards, 80 of 80 pairs, 1 pairs/s"


def test_a_look_reads_only_what_is_new(tmp_path, monkeypatch):
    for k in range(5):
        write(tmp_path, k, WORKED)
    read = []

    def counted(folder, numbers, inner=shards.sidecars):
        read.extend(numbers)
        return inner(folder, numbers)

    monkeypatch.setattr(shards, "sidecars", counted)
    seen = progress(tmp_path, 10_000)
    for now in range(10):
        seen.update(now)
    assert read == [0, 1, 2, 3, 4]
    write(tmp_path, 9_999, WORKED)
    read.clear()
    seen.update(11)
    assert read == [9_999]


def test_half_a_commit_does_not_count(tmp_path):
    for k in range(3):
        write(tmp_path, k, WORKED)
    (tmp_path / "pairs-000001.tar").unlink()
    os.truncate(tmp_path / ".meta/pairs-000002.json", 20)
    (tmp_path / ".meta/000004.lease").write_text("x")
    seen = progress(tmp_path)
    seen.update(0)
    assert seen.line().startswith("1 of 8 shards")


def test_a_log_gets_a_line_now_and_then_and_a_last_one(tmp_path, capsys):
    with progress(tmp_path, 2, interval=0.02):
        write(tmp_path, 0, WORKED)
        told = ""
        while "1 of 2 shards" not in told:
            told += capsys.readouterr().err
        write(tmp_path, 1, WORKED)
    told += capsys.readouterr().err
    lines = told.splitlines()
    assert all(line.startswith("generate_pairs: ") and "pairs" in line for line in lines)
    assert lines[-1].startswith("generate_pairs: 2 of 2 shards, 20 of 20 pairs, ")
    with progress(tmp_path, 2, shown=False, interval=0.01):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("failing", [KeyboardInterrupt, ValueError])
def test_the_watch_ends_with_its_stage(tmp_path, failing):
    seen = progress(tmp_path, interval=0.01)
    with pytest.raises(failing), seen:
        raise failing
    assert not seen.thread.is_alive()


def test_on_a_terminal_it_is_a_bar(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    write(tmp_path, 0, WORKED)
    with progress(tmp_path, 2):
        pass
    err = capsys.readouterr().err
    assert "50%|" in err
    assert "1 of 2 shards, 10 of 20 pairs" in err
