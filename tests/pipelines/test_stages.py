"""The stages as people run them: real processes, killed, repeated, one or two at a time."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from flowmatch.models import teachers
from flowmatch.runs import manifest
from tests import forked

SMALL = {
    "train_flow": [
        *("configs/ring.yaml", "data.samples=500", "net.hidden=32", "fit.steps=300"),
        *("fit.batch_size=64", "fit.log_every=10", "fit.save_every=20"),
    ],
    "generate_pairs": [
        *("configs/ring.yaml", "shards=3", "shard_size=500", "block=64", "compute_batch=20"),
        *("solver.steps=40", "dtype=float16"),
    ],
    "reflow": [
        *("configs/ring.yaml", "fit.steps=300", "fit.batch_size=64", "fit.log_every=10"),
        "fit.save_every=20",
    ],
    "evaluate": [
        *("configs/ring.yaml", "data.samples=600", "samples=600", "steps=[1,4]"),
        *("converged_steps=8", "compute_batch=128"),
    ],
    "export": ["configs/ring.yaml"],
}
FOLDER = dict(zip(SMALL, ("flow", "pairs", "reflow", "evaluate", "export"), strict=True))


def words(stage, root, *more):
    """The command line of a stage of the small chain below a folder."""
    inputs = {
        "train_flow": [],
        "generate_pairs": [f"teacher={root}/flow"],
        "reflow": [f"start={root}/flow", f"pairs=[{{path: {root}/pairs}}]"],
        "evaluate": [f"teacher={root}/flow", f"student={root}/reflow"],
        "export": [f"student={root}/reflow", f"evaluation={root}/evaluate"],
    }[stage]
    place = f"run_dir={root}/{FOLDER[stage]}"
    return [f"pipelines.{stage}", *SMALL[stage], place, "device=cpu", *inputs, *more]


def call(stage, root, *more, processes=1):
    """Run a stage in real processes; return the first one's result."""
    return forked.run_ranks(processes, words(stage, root, *more))[0]


def succeed(stage, root, *more, processes=1):
    done = call(stage, root, *more, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def seal(root, stage):
    return json.loads((Path(root) / FOLDER[stage] / "manifest.json").read_text())


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """The whole small chain, by one process a stage."""
    root = tmp_path_factory.mktemp("chain")
    for stage in SMALL:
        succeed(stage, root)
    return root


def test_the_chain_is_sealed_and_names_its_inputs(chain):
    seals = {stage: seal(chain, stage) for stage in SMALL}
    assert [s["facts"].get("round") for s in seals.values()][:3] == [0, 0, 1]
    net = seals["train_flow"]["facts"]["net"]
    assert seals["generate_pairs"]["inputs"] == {"teacher": net}
    pairs = manifest.digest(chain / "pairs")
    assert seals["reflow"]["inputs"] == {"start": net, "pairs.0": pairs}
    assert seals["evaluate"]["inputs"]["student"] == seals["reflow"]["facts"]["net"]
    for stage, folder in FOLDER.items():
        files = {p.name for p in (chain / folder).iterdir()}
        assert {"config.yaml", "manifest.json"} <= files
        assert ("metrics.jsonl" in files) == (stage in ("train_flow", "reflow"))
        assert str(chain) not in (chain / folder / "manifest.json").read_text()


def test_the_export_is_the_teacher_that_its_student_is(chain):
    student, exported = (teachers.load(chain / name, "teacher") for name in ("reflow", "export"))
    assert (exported.digest, exported.round) == (student.digest, 1)


def test_repeating_a_sealed_stage_does_nothing(chain):
    before = (chain / "flow" / "manifest.json").stat().st_mtime_ns
    assert "is sealed: nothing to do" in succeed("train_flow", chain)
    assert (chain / "flow" / "manifest.json").stat().st_mtime_ns == before


def test_evaluation_writes_table_pictures_and_protocol(chain):
    result = json.loads((chain / "evaluate" / "metrics.json").read_text())
    rows = result["student"]["rows"]
    assert [row["steps"] for row in rows] == [1, 4, None]
    assert [row["evaluations"] for row in rows] == [1, 4, 16]  # counted, heun twice a step
    assert result["protocol"]["distance"] == "sliced_wasserstein"
    assert result["floor"]["samples"] == 300
    assert result["teacher"]["rows"][-1]["rmse"] == 0
    page = (chain / "evaluate" / "report.html").read_text()
    assert page.count("<figure>") == 3  # the curve, the paths, the losses
    for name in ("curve.png", "grid.png"):
        assert (chain / "evaluate" / name).read_bytes()[:4] == b"\x89PNG"
    assert "| 4 | 4 |" in (chain / "evaluate" / "table.md").read_text()


def test_pairs_are_where_the_teacher_carries_the_noise(chain):
    from flowmatch.flow import grids, noise, solvers
    from flowmatch.models import networks
    from flowmatch.models.velocity import Velocity
    from flowmatch.pairs.dataset import PairData

    data = PairData(chain / "pairs")
    assert len(data) == 1500
    ids = np.array([0, 3, 499, 500, 1499])
    batch = data.batch(ids)
    x0 = noise.normal(0, ids, (2,), noise.PAIR_NOISE).astype(np.float16).astype(np.float32)
    assert np.array_equal(batch["x0"].numpy(), x0)
    v = Velocity(networks.load(chain / "flow" / "net", "teacher"))
    import torch

    with torch.no_grad():
        x1 = solvers.integrate(v, torch.from_numpy(x0), grids.uniform_grid(40), "heun")
    torch.testing.assert_close(batch["x1"], x1, atol=2e-3, rtol=1e-3)
    # to the last bit of the stored dtype, but for sums in another order: the noise was rounded first
    whole = data.batch(np.arange(1500))
    with torch.no_grad():
        x1 = solvers.integrate(v, whole["x0"], grids.uniform_grid(40), "heun")
    assert (whole["x1"] == x1.half().float()).double().mean() > 0.99


def test_pairs_of_the_adaptive_solver_depend_on_the_config_alone(chain, tmp_path):
    from flowmatch.flow import solvers
    from flowmatch.flow.config import SolverConfig
    from flowmatch.models import networks
    from flowmatch.models.velocity import Velocity
    from flowmatch.pairs.dataset import PairData

    (tmp_path / "flow").symlink_to(chain / "flow")
    values = (
        "solver.name=dopri5",
        "compute_batch=200",
        "solver.rtol=1e-6",
        "solver.atol=1e-6",
        "solver.state=float64",
    )
    plan = succeed("generate_pairs", tmp_path, *values, "dtype=float32", "shards=1", "--dry-run")
    assert "dopri5 chooses its evaluations" in plan
    succeed("generate_pairs", tmp_path, *values, "dtype=float32", "shards=1")
    batch = PairData(tmp_path / "pairs").batch(np.arange(500))
    v = Velocity(networks.load(chain / "flow" / "net", "teacher"))
    import torch

    config = SolverConfig(name="dopri5", rtol=1e-6, atol=1e-6, state="float64")
    with torch.inference_mode():  # a batch is 200 consecutive ids; the third is padded
        x1 = solvers.solve(v, batch["x0"][:200], config)
    assert torch.equal(batch["x1"][:200], x1.float())
    counted = seal(tmp_path, "generate_pairs")["facts"]["evaluations"]
    assert 20 < counted < 500
    assert "dopri5 to rtol 1e-06" in (tmp_path / "pairs" / "README.md").read_text()


def test_stage_one_matches_noise_and_data_in_blocks(tmp_path):
    values = ("coupling.name=optimal_transport", "fit.steps=20", "fit.batch_size=96")
    refused = call("train_flow", tmp_path, *values, "coupling.block=64")
    assert refused.returncode == 2
    assert "coupling.block=64: the micro-batch of a process is 96 samples" in refused.stderr
    costs = []
    for name, words in (("independent", []), ("optimal_transport", ["coupling.block=32"])):
        root = tmp_path / name
        succeed("train_flow", root, *values, f"coupling.name={name}", *words)
        lines = (root / "flow" / "metrics.jsonl").read_text().splitlines()
        costs.append(json.loads(lines[-1])["coupling_cost"])
    assert costs[1] < 0.8 * costs[0]


def test_evaluation_samples_by_name_and_refuses_what_is_not_valid(chain, tmp_path):
    for name in ("flow", "reflow"):
        (tmp_path / name).symlink_to(chain / name)
    succeed("evaluate", tmp_path, "solver.name=ddpm", "student_solver.name=anchored")
    result = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    assert result["protocol"]["solver"] == "ddpm, uniform steps; converged: heun"
    assert result["protocol"]["student_solver"] == "anchored, uniform steps"
    assert [row["evaluations"] for row in result["teacher"]["rows"]] == [1, 4, 16]
    refused = call("evaluate", tmp_path, "solver.name=sde", "student_solver.name=ddpm")
    assert refused.returncode == 2
    assert "student_solver.name=ddpm: the model is of reflow round 1" in refused.stderr
    refused = call("evaluate", tmp_path, "solver.name=anchored")
    assert "solver.name=anchored: the model is of round 0, before reflow" in refused.stderr
    plain = json.loads((chain / "evaluate" / "metrics.json").read_text())
    assert plain["protocol"]["solver"] == "euler, uniform steps; converged: heun"


def test_evaluation_converges_by_the_adaptive_solver(chain, tmp_path):
    for name in ("flow", "reflow"):
        (tmp_path / name).symlink_to(chain / name)
    values = ("converged_solver=dopri5", "solver.name=rk4", "steps=[2]", "solver.grid=sigmoid")
    succeed("evaluate", tmp_path, *values)
    result = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    first, converged = result["teacher"]["rows"]
    assert first["evaluations"] == 8
    assert 20 < converged["evaluations"] < 500
    table = (tmp_path / "evaluate" / "table.md").read_text()
    assert "converged (dopri5)" in table
    assert "rk4, sigmoid steps (kappa 10)" in table


def test_a_finished_set_of_pairs_grows_and_heals(chain, tmp_path):
    root = tmp_path
    (root / "flow").symlink_to(chain / "flow")
    succeed("generate_pairs", root, "shards=2")
    tars = {p.name: p.read_bytes() for p in (root / "pairs").glob("*.tar")}
    assert len(tars) == 2
    succeed("generate_pairs", root)
    assert seal(root, "generate_pairs") == seal(chain, "generate_pairs")
    (root / "pairs" / "pairs-000001.tar").write_bytes(b"cut")
    broken = call("reflow", root)
    assert broken.returncode == 2
    assert "pairs-000001.tar has 3 bytes" in broken.stderr
    assert "flowmatch verify" in broken.stderr
    succeed("generate_pairs", root)
    for name, content in tars.items():
        assert (root / "pairs" / name).read_bytes() == content


def test_unready_and_wrong_inputs_are_named(chain, tmp_path):
    assert "does not exist; run the stage" in call("generate_pairs", tmp_path).stderr
    (tmp_path / "flow").mkdir()
    done = call("reflow", tmp_path)
    assert done.returncode == 2
    assert "has not finished" in done.stderr
    assert "pairs.0.path=" in done.stderr  # both inputs, at once
    done = call("generate_pairs", chain, f"teacher={chain}/pairs")
    assert "holds the result of generate_pairs; expected one of train_flow or reflow" in done.stderr
    done = call("generate_pairs", chain, "seed=9", "solver.steps=5")
    assert done.returncode == 2
    assert "  seed: 0 -> 9" in done.stderr
    assert "  solver.steps: 40 -> 5" in done.stderr


def test_dry_runs_plan_and_write_nothing(tmp_path):
    out = succeed("train_flow", tmp_path, "--dry-run")
    assert "300 steps of 64: 38.4 epochs" in out
    assert "batch_size: 64" in out
    out = succeed("generate_pairs", tmp_path, "--dry-run")
    assert "later: teacher=" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_make_the_same_bytes_as_one(chain, tmp_path):
    (tmp_path / "flow").symlink_to(chain / "flow")
    succeed("generate_pairs", tmp_path, processes=2)
    assert (tmp_path / "pairs/manifest.json").read_bytes() == (
        chain / "pairs/manifest.json"
    ).read_bytes()
    for tar in (chain / "pairs").glob("*.tar"):
        assert (tmp_path / "pairs" / tar.name).read_bytes() == tar.read_bytes()


@pytest.mark.slow
def test_two_processes_train_the_same_curve_as_one(chain, tmp_path):
    succeed("train_flow", tmp_path, processes=2)
    curves = [
        [json.loads(x) for x in (root / "flow/metrics.jsonl").read_text().splitlines()]
        for root in (chain, tmp_path)
    ]
    for one, two in zip(*curves, strict=True):
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_evaluate_the_same_as_one(chain, tmp_path):
    for name in ("flow", "reflow"):
        (tmp_path / name).symlink_to(chain / name)
    said = succeed("evaluate", tmp_path, processes=2)
    assert said.count("sampled; measured at the end\n") == said.count(": distance ") == 6
    assert (tmp_path / "evaluate/metrics.json").read_bytes() == (
        chain / "evaluate/metrics.json"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(SMALL))
def test_a_stage_killed_anywhere_and_repeated_ends_with_the_same_manifest(chain, tmp_path, stage):
    for folder in FOLDER.values():
        if folder != FOLDER[stage]:
            (tmp_path / folder).symlink_to(chain / folder)
    mine, kills = tmp_path / FOLDER[stage], 0
    for delay in np.geomspace(0.01, 1.5, 8):  # a fast machine ends a stage in a part of a second
        process = forked.Popen(words(stage, tmp_path), stdout=forked.DEVNULL, stderr=forked.DEVNULL)
        while process.poll() is None and not (mine / "config.yaml").exists():
            time.sleep(0.01)  # until the work begins
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
            kills += 1
        process.wait()
    assert kills >= 2
    succeed(stage, tmp_path)
    assert (mine / "manifest.json").read_bytes() == (
        chain / FOLDER[stage] / "manifest.json"
    ).read_bytes()
