"""Two processes train on stored pairs, are killed in mid-epoch, and go on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import pairset
from tests.pairset import generate

ROOT = Path(__file__).parents[2]
TWO = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--config_file", "configs/accelerate/cpu_2.yaml", "-m", "tests.recorded"),
]
PAIRS, BATCH, STEPS, SAVE = 150, 16, 120, 10  # 9.4 steps an epoch
KILLS = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    pairset.make_teacher(root / "flow")
    generate(*pairset.words(root, "shard_size=50"))
    return root


def launch(root, name, record):
    """Start both ranks as a group of their own."""
    record.mkdir(exist_ok=True)
    words = [f"run_dir={root / name}", f"start={root}/flow", f"pairs=[{{path: {root}/pairs}}]"]
    words += [f"fit.batch_size={BATCH}", f"fit.steps={STEPS}", f"fit.save_every={SAVE}"]
    return subprocess.Popen(
        [*TWO, *words, "fit.log_every=5", "device=cpu"],
        cwd=ROOT,
        env=os.environ | {"RECORD": str(record)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read(record):
    """What each rank read, step by step: two lists of [BATCH / 2] ids."""
    lines = [(record / f"{rank}.jsonl").read_text().splitlines(True) for rank in (0, 1)]
    return [[json.loads(line) for line in each if line.endswith("\n")] for each in lines]


@pytest.mark.slow
def test_two_killed_ranks_see_the_same_pairs_as_undisturbed_ones(root):
    whole = launch(root, "whole", root / "record")
    out, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0, out
    undisturbed = read(root / "record")
    ahead = len(undisturbed[0]) - STEPS
    assert ahead in (0, 1)  # a batch may be fetched ahead of the last step
    steps = np.array(undisturbed).transpose(1, 0, 2).reshape(-1)  # rank 0's half, rank 1's half
    for epoch in range(STEPS * BATCH // PAIRS):
        part = steps[epoch * PAIRS : (epoch + 1) * PAIRS]
        assert np.array_equal(np.sort(part), np.arange(PAIRS))  # each pair once, on one rank
    assert not np.array_equal(steps[:PAIRS], steps[PAIRS : 2 * PAIRS])

    starts, rng = [], np.random.default_rng(7)
    for attempt in range(KILLS + 1):
        record = root / f"record_{attempt}"
        process, goal = launch(root, "killed", record), 12 + int(rng.integers(0, 15))
        if attempt < KILLS:
            path = record / "1.jsonl"
            while not path.exists() or len(path.read_text().splitlines()) < goal:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.002)
            for rank in (0, 1):  # each rank is a session of its own: not the launcher's group
                os.kill(int((record / f"{rank}.pid").read_text()), signal.SIGKILL)
            process.kill()
            process.communicate()
        else:
            out, _ = process.communicate(timeout=200)
            assert process.returncode == 0, out
        again = read(record)
        start = next((s for s in range(0, STEPS, SAVE) if undisturbed[0][s] == again[0][0]), None)
        assert start is not None, "its first batch is none that follows a checkpoint"
        for rank in (0, 1):
            assert again[rank] == undisturbed[rank][start : start + len(again[rank])]
        starts.append(start)
    assert starts[0] == 0
    assert starts == sorted(set(starts)), "each run began later than the one before"
    assert all(start * BATCH % PAIRS for start in starts[1:])  # in the middle of an epoch
    assert start + len(again[0]) == STEPS + ahead
    for name in ("manifest.json", "net/diffusion_pytorch_model.safetensors"):
        assert (root / "killed" / name).read_bytes() == (root / "whole" / name).read_bytes()
