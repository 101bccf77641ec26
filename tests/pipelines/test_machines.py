"""Two machines, each with its launcher: training and pairs; one loses power, the other goes on."""

import json
import shutil

import pytest

from flowmatch.models import networks
from tests import pairset
from tests.machines import Machines, wait_for
from tests.ranks import free_port

RING = [
    *("-m", "pipelines.train_flow", "configs/ring.yaml", "data.samples=500", "net.hidden=32"),
    *("fit.batch_size=64", "fit.log_every=10", "fit.save_every=20", "fit.keep=100"),
    *("device=cpu", "fit.stall_seconds=10"),
]


@pytest.fixture
def machines():
    with Machines() as machines:
        yield machines


@pytest.mark.slow
def test_training_on_two_machines_of_which_one_loses_power(machines, tmp_path):
    """The other ends within 60 seconds, naming the lost process; alone it goes on to the same model."""

    def both(folder, steps):
        port, words = free_port(), [*RING, f"fit.steps={steps}", f"run_dir={tmp_path}/{folder}"]
        logs = [tmp_path / f"{folder}{number}.log" for number in (0, 1)]
        jobs = [machines.launch(n, 2, port, words, logs[n]) for n in (0, 1)]
        return jobs, logs

    jobs, logs = both("cut", 100_000)
    folder = tmp_path / "cut/checkpoints"
    wait_for(lambda: (folder / "step_00000040").exists(), 120, jobs[0])
    machines.kill(jobs[1])
    took = wait_for(lambda: jobs[0].poll() is not None, 60)
    said = logs[0].read_text()
    assert jobs[0].returncode == 1, said
    assert "rank 1" in said, said
    assert took < 60
    for path in folder.iterdir():  # so that it can end soon: a run of 60 updates
        if path.name > "step_00000040":
            shutil.rmtree(path)
    assert folder.is_dir()


@pytest.mark.slow
def test_one_machine_goes_on_with_the_run_of_two(machines, tmp_path):
    words = [*RING, "fit.steps=60"]
    port, logs = free_port(), [tmp_path / f"{n}.log" for n in (0, 1)]
    jobs = [
        machines.launch(n, 2, port, [*words, f"run_dir={tmp_path}/whole"], logs[n]) for n in (0, 1)
    ]
    for job, log in zip(jobs, logs, strict=True):
        assert job.wait(120) == 0, log.read_text()
    first = "checkpoints/step_00000020"
    shutil.copytree(tmp_path / "whole" / first, tmp_path / "cut" / first)
    alone = machines.launch(0, 1, free_port(), [*words, f"run_dir={tmp_path}/cut"], logs[0])
    assert alone.wait(120) == 0, logs[0].read_text()
    assert "resumes at 20 of 60" in logs[0].read_text()
    one, two = (networks.load(tmp_path / n / "net", "net").state_dict() for n in ("whole", "cut"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5


@pytest.mark.slow
def test_pairs_on_two_machines_of_which_one_loses_power(machines, tmp_path):
    """Its shard is taken over; the bytes are those of one worker."""
    pairset.make_teacher(tmp_path / "flow")
    sizes = ["shards=40", "solver.steps=200", "lease_seconds=3"]
    argv = [w for w in pairset.words(tmp_path, *sizes) if not w.startswith(("run_dir", "lease"))]
    argv = ["-m", "pipelines.generate_pairs", *argv, "lease_seconds=3"]
    logs = [tmp_path / f"{n}.log" for n in (0, 1)]
    jobs = [machines.start(n, [*argv, f"run_dir={tmp_path}/pairs"], logs[n]) for n in (0, 1)]
    wait_for(lambda: len(list((tmp_path / "pairs").glob("*.tar"))) > 2, 120, jobs[0])
    machines.kill(jobs[1])
    assert jobs[0].wait(120) == 0, logs[0].read_text()
    assert json.loads((tmp_path / "pairs/manifest.json").read_text())["facts"]["shards"] == 40
    alone = machines.start(0, [*argv, f"run_dir={tmp_path}/alone"], logs[0])
    assert alone.wait(120) == 0, logs[0].read_text()
    assert pairset.contents(tmp_path / "pairs") == pairset.contents(tmp_path / "alone")
