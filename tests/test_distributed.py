"""Stage one on several real processes: they end together, and compute the same as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = [
    *("configs/ring/flow.yaml", "data.samples=500", "net.hidden=32", "fit.batch_size=64"),
    *("fit.log_every=10", "fit.save_every=20", "device=cpu"),
]


def launch(folder, *more, processes=2, **environment):
    """Run the watched stage under `accelerate launch`, to its end."""
    words = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2.yaml"]
    words += ["--num_processes", str(processes), "--main_process_port", "0", "-m", "tests.ranks"]
    return subprocess.run(
        [sys.executable, *words, *WORDS, f"run_dir={folder}", *more],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "cause"),
    [("kill:1:30", "Signal 9 (SIGKILL) received by PID"), ("raise:0:30", "the cause of it all")],
)
def test_a_rank_that_dies_ends_the_job_with_the_cause(tmp_path, fault, cause):
    done = launch(tmp_path / "flow", "fit.steps=1000", FAULT=fault)
    assert done.returncode == 1
    assert cause in done.stderr
    rank = fault.split(":")[1]
    assert f"rank      : {rank} " in done.stderr.split("Root Cause")[1]
    assert [p.name for p in (tmp_path / "flow/checkpoints").iterdir()] == ["step_00000020"]


@pytest.mark.slow
def test_ranks_let_go_of_their_wrappers_before_the_group_ends(tmp_path):
    done = launch(tmp_path / "flow", "fit.steps=20")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flow/manifest.json").exists()
