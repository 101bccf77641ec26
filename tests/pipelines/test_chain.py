"""The command `flowmatch` as people run it: whole experiments in an empty folder, real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flowmatch
from flowmatch import cli
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import chain, children, manifest, stopping
from tests import forked, toy

ROOT = Path(__file__).parents[2]
SMALL = [
    *("flow.data.samples=200", "flow.net.hidden=8", "flow.fit.steps=4", "flow.fit.warmup=2"),
    *("pairs.shards=1", "pairs.shard_size=40", "pairs.block=40", "pairs.compute_batch=40"),
    *("pairs.solver.steps=2", "reflow.fit.steps=4", "reflow.fit.warmup=2", "evaluate.samples=60"),
    *("evaluate.data.samples=60", "evaluate.converged_steps=2", "evaluate.steps=[1]"),
    *("flow.fit.batch_size=64", "reflow.fit.batch_size=64", "device=cpu"),
]


def call(folder, *words, **environment):
    """Run the command from a folder outside the checkout."""
    known = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return forked.run(["flowmatch", *words], cwd=folder, env=known)


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    """A small ring in two rounds, each stage in two processes that the command forks."""
    folder = tmp_path_factory.mktemp("two rounds")
    few = "pairs_2.solver={name: ab2, grid: shift, shift: 9, steps: 2}"
    words = ["run", "ring", *SMALL, few, "reflow_2.fit.steps=3", "pairs.seed=5"]
    return folder, words, call(folder, *words)


@pytest.mark.slow
def test_a_second_round_follows_the_student_of_the_first(two_rounds):
    """Other noise, and the round stands everywhere; it ends with the table and the seconds."""
    folder, _, done = two_rounds
    assert done.returncode == 0, done.stdout + done.stderr
    runs = folder / "runs/ring"
    seals = {p.parent.name: manifest.read(p.parent, "x") for p in runs.glob("*/manifest.json")}
    rounds = {name: seal["facts"].get("round") for name, seal in seals.items()}
    assert rounds == {
        **{"flow": 0, "pairs": 0, "reflow": 1, "pairs_2": 1, "reflow_2": 2},
        **{"evaluate_2": None, "export_2": 2},
    }
    student = seals["reflow"]["facts"]["net"]
    assert seals["pairs_2"]["inputs"]["teacher"] == seals["reflow_2"]["inputs"]["start"] == student
    assert seals["reflow_2"]["inputs"]["pairs.0"] == manifest.digest(runs / "pairs_2")
    assert seals["evaluate_2"]["inputs"]["student"] == seals["reflow_2"]["facts"]["net"]
    assert [seals[name]["config"]["seed"] for name in ("pairs", "pairs_2")] == [5, 6]
    assert [seals[name]["facts"]["evaluations"] for name in ("pairs", "pairs_2")] == [4, 2]
    assert [seals[name]["config"]["fit"]["steps"] for name in ("reflow", "reflow_2")] == [4, 3]
    noises = [PairData(runs / name).batch(np.arange(40))["x0"] for name in ("pairs", "pairs_2")]
    assert not (noises[0][:, None] == noises[1]).all(2).any()
    sections = ("flow", "pairs", "reflow", "pairs_2", "reflow_2", "evaluate_2", "export_2")
    took = ", ".join(rf"{section} \d+" for section in sections)
    *_, table, seconds = done.stdout.strip().split("\n\n")
    assert re.fullmatch(f"seconds: {took}", seconds)
    assert (runs / "evaluate_2/table.md").read_text().strip().endswith(table)


@pytest.mark.slow
def test_a_finished_chain_is_skipped_without_torch(two_rounds):
    folder, words, _ = two_rounds
    code = "import sys; from flowmatch import cli; cli.main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    again = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(" is finished\n") == 7
    assert "seconds" not in again.stdout
    assert "| converged (heun) |" in again.stdout
    assert again.stdout.splitlines()[-1] == "False"
    out = call(folder, "sample", "runs/ring/export_2", "--steps", "2", "--count", "3", "--out", "s")
    assert out.stdout == "wrote s/samples.npy: [3, 2]\n", out.stderr
    assert np.isfinite(np.load(folder / "s/samples.npy")).all()
    (folder / "runs/ring/pairs/pairs-000000.tar").write_bytes(b"cut")
    assert call(folder, "verify", "runs/ring/pairs").returncode == 2
    done = call(folder, *words, "--only", "pairs,reflow")
    assert done.returncode == 0, done.stderr
    assert "pairs (1 of 1)" in done.stdout  # made again, and reflow still knows it
    assert call(folder, "verify", "runs/ring/pairs").returncode == 0
    assert "transport cost" in call(folder, "inspect", "runs/ring/pairs").stdout


def test_a_new_experiment_of_images_is_planned_from_one_file(tmp_path):
    """A folder of RGB pictures, and nothing else but the two paths in the file."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 20)):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    made = call(tmp_path, "new", "mine")
    assert made.returncode == 0, made.stderr
    assert "flowmatch run mine.yaml --dry-run" in made.stdout
    assert call(tmp_path, "new", "mine").returncode == 2  # nothing is overwritten
    file = tmp_path / "mine.yaml"
    text = file.read_text()
    assert "\nname: mine\n" in text
    assert "ablation" not in text
    idx = "source: idx\n  path: /usr/share/datasets/fashion-mnist"
    images = "source: images\n  path: {}\n  size: 16"
    text = text.replace(f"{idx}\n  split: test", images.format("test"), 1)
    text = text.replace(idx, images.format("train"), 1)
    file.write_text(text)
    words = ["run", "mine.yaml", "--dry-run", "--only", "flow,pairs,reflow,evaluate"]
    loss = ["reflow.loss={name: normalised, power: 1.0}", "evaluate.features=values", "device=cpu"]
    loss += ["flow.run_dir=./runs/mine/flow/"]  # the same folder, however it is written
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = call(tmp_path, *words, *loss, "reflow.fit.precision=fp32", **cache)
    assert done.returncode == 0, done.stderr
    assert "flow: 40 samples of [3, 16, 16], no labels" in done.stdout
    assert "run_dir:" not in done.stdout  # the plan alone: a stage's own dry run prints its config
    assert "pairs: later: teacher=runs/mine/flow does not exist" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run", "nothing"],
            "nothing: no such config file; expected a YAML file or one of cifar10",
        ),
        (["run", "ring", "flw.fit.steps=3"], "flw.fit.steps=3: did you mean flow?"),
        (
            ["run", "ring", "classifier.steps=3"],
            "expected SECTION.key=value; sections: flow, pairs",
        ),
        (["run", "ring", "reflow.fit.stepz=3", "pairs.shards=x"], "did you mean steps?"),
        (["run", "ring", "--only", "flow,paris"], "--only paris: did you mean pairs?"),
        (["run", "ring", "--flow.fit.steps=3"], "keys have no dashes: flow.fit.steps=3"),
        (["run", "ring", "--dryrun"], "--dryrun: unknown flag; did you mean --dry-run?"),
        (
            ["run", "ring", "--list", "fit.steps=3"],
            "fit.steps=3 reaches no section; those that have their own: flow, reflow",
        ),
        (
            ["run", "ring", "--list", "--only", "flow", "solver.steps=3"],
            "solver.steps=3 reaches no section; those that have their own: pairs: write pairs.solver",
        ),
        (["run", "ring", "--list", "name="], "name='': expected letters"),
        (["run", "ring", "--list", "name=a/b"], "name='a/b': expected letters"),
        (["digits"], "digits: unknown command; did you mean flowmatch run digits?"),
        (["run", "ring", "--rounds", "0"], "--rounds 0: expected 1 or more"),
        (["reflw", "digits"], "reflw: unknown command; did you mean reflow?"),
        (["distil", "ring"], "distil: unknown command"),
        (["completion", "cmd"], "expected one of bash, zsh, fish"),
        (["new", "digits"], "a shipped experiment has that name"),
        (["sample", "."], ".: not an export: it has no model_index.json"),
        (["reflow", "digits", "--fit.lr=1"], "keys have no dashes: fit.lr=1"),
        (["reflow"], "expected a config; usage: flowmatch reflow CONFIG"),
        (["sample"], "usage: flowmatch sample"),
        (["verify"], "usage: flowmatch verify"),
        (["inspect"], "usage: flowmatch inspect"),
        (["new"], "usage: flowmatch new"),
        (["run"], "usage: flowmatch run"),
        (["flow", "digits", "data={source:digits}"], "a blank is missing after the colon"),
    ],
)
def test_what_the_command_does_not_know_is_named(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_fault_of_several_sections_is_told_once():
    detail = "  (input) student: 'a' -> 'b'"
    faults = ["pairs: no", "evaluate: x was made", f"evaluate: {detail}", "reflow: no"]
    assert chain._gathered([*faults, "export: y was made", f"export: {detail}"]) == [
        *("pairs, reflow: no", "evaluate: x was made", f"evaluate: {detail}"),
        *("export: y was made", f"export: {detail}"),
    ]


def test_all_faults_of_a_chain_are_listed_with_their_sections(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["run", "ring", "reflow.fit.stepz=3", "pairs.shards=x", "flow.loss.name=feature"])
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("run: reflow.fit.stepz: unknown key") for line in lines)
    assert any(line.startswith("run: pairs.shards='x': ") for line in lines)
    assert any(line.startswith("run: flow.loss.features=None: ") for line in lines)


def test_version_help_and_completion(capsys, monkeypatch):
    cli.main(["--version"])
    cli.main(["reflow", "--version"])
    assert capsys.readouterr().out == f"flowmatch {flowmatch.__version__}\n" * 2
    cli.main(["pairs", "--help"])
    assert "usage: flowmatch generate_pairs CONFIG" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([])
    assert "usage:" in capsys.readouterr().err
    cli.main(["completion", "bash"])
    assert "complete -o default -C 'flowmatch --complete' flowmatch" in capsys.readouterr().out

    def complete(line):
        monkeypatch.setenv("COMP_LINE", line)
        cli.main(["--complete"])
        return capsys.readouterr().out.split()

    assert complete("flowmatch ref") == ["reflow"]
    assert complete("flowmatch reflow rin") == ["ring"]
    assert "fit.steps=" in complete("flowmatch reflow digits fit.")
    assert complete("flowmatch run digits reflow.fit.max") == ["reflow.fit.max_grad_norm="]
    assert complete("flowmatch distil digits times.ze") == ["times.zero="]


@pytest.mark.parametrize(("end", "status"), [("exit", 75), ("kill", 137), ("raise", 1)])
def test_ranks_are_forks_and_the_first_that_fails_ends_them(end, status, tmp_path, monkeypatch):
    here = {"of": "this process"}

    def stage(_, words):
        rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
        (tmp_path / rank).write_text(f"{words} {size} {here}")
        while rank == "0" or not (tmp_path / "0").exists():
            time.sleep(0.01)
        if end == "raise":
            raise OSError("the cause of it all")
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(75)

    monkeypatch.setattr(children.command, "main", stage)
    child = children.fork(partial(children.ranks, None, ["a=1"], 2))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert {(tmp_path / rank).read_text() for rank in "01"} == {f"['a=1'] 2 {here}"}


def test_a_fork_that_is_stopped_says_so_itself(tmp_path, capfd):
    """The chain it was forked from listens to signals, too."""
    with stopping.heard("run"):
        words = [f"run_dir={tmp_path / 'stage'}"]
        child = children.fork(partial(children.ranks, toy.STAGE, words, 1))
        while not (tmp_path / "stage/config.yaml").exists():
            time.sleep(0.01)
        os.killpg(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert capfd.readouterr().out.count("toy: stopped by SIGTERM") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_chain_that_is_stopped_saves_and_goes_on(tmp_path, number):
    """A signal to the command alone: the stage saves, exit 75; the same command resumes."""
    words = [
        "run",
        "ring",
        "--only",
        "flow",
        *SMALL,
        "flow.fit.steps=3000",
        "flow.fit.save_every=20",
    ]
    command = [sys.executable, "-m", "flowmatch", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    log = open(tmp_path / "log", "w+")  # noqa: SIM115
    started = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    folder = tmp_path / "runs/ring/flow"
    while not list(folder.glob("checkpoints/step_*")):
        assert started.poll() is None
        time.sleep(0.1)
    started.send_signal(number)
    assert started.wait(90) == (75 if number != signal.SIGKILL else -9)
    end = time.monotonic() + 60
    while "stopped by SIGTERM" not in Path(log.name).read_text():  # killed, it does not wait for it
        assert time.monotonic() < end, Path(log.name).read_text()
        time.sleep(0.1)
    saved = max(int(p.name[5:]) for p in folder.glob("checkpoints/step_*"))
    assert 0 < saved < 3000
    line = f"train_flow: stopped by SIGTERM at step {saved:,} of 3,000, which is saved; repeat the"
    assert line in Path(log.name).read_text()
    words[-2] = f"flow.fit.steps={3000}"
    done = call(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert f"train_flow: resumes at {saved:,} of 3,000, from " in done.stdout
    steps = [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps))
    assert steps[-1] == 3000


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["--accelerate", str(ROOT / "configs/accelerate/cpu_2.yaml")]])
def test_a_stage_that_fails_ends_the_chain_with_its_own_exit_code(way, tmp_path):
    """Two processes, forked or by `accelerate launch`: 2, not the launcher's 1; no later stage."""
    words = ["run", "ring", *SMALL, "flow.fit.lr=1e30", "flow.fit.steps=50", "flow.fit.log_every=5"]
    done = call(tmp_path, *words, *way)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "not finite" in done.stderr
    assert "pairs (2 of" not in done.stdout
