"""The benchmark runs on tiny loads and says what it measured; no test looks at a time."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "train": ["training step", "waiting for pairs"],
    "pairs": ["pair generation", "writing pairs"],
    "read": ["reading 24 KB pairs", "reading 24 KB pairs, webdataset", "reading 500 KB pairs"],
    "processes": ["2 processes"],
    "start": ["import flowmatch.training.loop", "--help"],
    "memory": ["memory"],
    "large": [
        *("text transformer, all weights", "text transformer, an adapter", "plan of training"),
        *("adapter, memory", "split over 2 processes", "split, memory of a process"),
        *("split, checkpoint in memory", "split, checkpoint"),
    ],
    "own_run": ["pairs through a pipeline"],
    "convert": [
        f"convert to {to}, {clock}"
        for to in ("npy", "fastgen", "self-forcing", "fastvideo")
        for clock in ("time", "CPU time", "CPU time of the writing thread")
    ],
}


@pytest.mark.parametrize(
    "names",
    [
        ["train", "pairs", "read", "convert"],
        pytest.param(["processes", "own_run", "start", "memory", "large"], marks=pytest.mark.slow),
    ],
    ids=["here", "processes"],
)
def test_the_benchmark_measures_what_it_is_asked_for(tmp_path, names):
    words = ["-m", "scripts.bench", "--quick", "--out", str(tmp_path), "--only", *names]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    assert list(result["figures"]) == [row for name in names for row in EXPECTED[name]]
    for row in result["figures"].values():
        numbers = [row[key] for key in ("low", "median", "high")]
        assert all(map(math.isfinite, numbers))
        assert numbers == sorted(numbers)
        assert row["what"]
    if "train" in names:  # the wait for pairs was looked at, and is a share
        assert 0 < result["figures"]["waiting for pairs"]["median"] < 1
    assert {"date", "processor", "cores", "threads", "torch"} <= result["hardware"].keys()
    table = (tmp_path / "bench.md").read_text()
    assert table.strip() in done.stdout
    assert all(f"| {name} | " in table for name in result["figures"])
    assert "mean nothing" in table
