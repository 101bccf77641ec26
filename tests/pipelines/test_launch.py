"""Launch files and job scripts: what Accelerate reads of them; a SLURM that runs its jobs at once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "scripts").glob("**/*.sh"))

# Each notes its words and what SLURM tells a job; sbatch also runs its job, an array's members in turn.
TOOLS = {
    "sbatch": """
n=$(($(grep -c '^sbatch' "$CALLS") + 100))
members=(none)
for word in "$@"; do
  case $word in
    --array=0-*) mapfile -t members < <(seq 0 "${word#--array=0-}") ;;
    --export=ALL,*) export "${word#--export=ALL,}" ;;
    --*) ;;
    *) break ;;
  esac
done
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID=$n SLURM_SUBMIT_DIR=$PWD SLURM_ARRAY_JOB_ID=$n
for member in "${members[@]}"; do
  [ "$member" = none ] || export SLURM_ARRAY_TASK_ID=$member
  bash "$@" >"$CALLS.$n.$member" 2>&1 || exit 1
done
echo "$n"
""",
    "scontrol": 'if [ "$1" = show ]; then printf "%s\\n" first second; fi',
    "srun": """
while [[ $1 == --* ]]; do shift; done
trap 'kill -KILL $(jobs -p); exit 143' TERM  # as the real one answers it
for node in 0 1; do
  SLURM_NODEID=$node "$@" &
  echo $! >>"$CALLS.steps"
  [ -n "${TOGETHER:-}" ] || wait $! || exit
done
wait
""",
    "scancel": 'kill -TERM $(cat "$CALLS.steps")',
    # a stage: its dry run succeeds, its run does what TASK says
    "python": """
if [[ " $* " == *" --dry-run "* ]]; then echo "${PLAN:-plan of $2}"; exit 0; fi
eval "${TASK:-true}"
""",
}


@pytest.fixture
def slurm(tmp_path):
    """An environment whose SLURM notes its calls; `python` is a stand-in, too."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in TOOLS.items():
        note = f'[ "{name}" = python ] && [[ " $* " == *" --dry-run "* ]] || echo "{name} $*" >>"$CALLS"'
        (folder / name).write_text(f"#!/usr/bin/env bash\n{note}\n{body}")
        (folder / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    path = f"{folder}:{os.environ['PATH']}"
    return clean | {"PATH": path, "CALLS": str(calls), "PYTHON": str(folder / "python")}


def calls(environment, *names):
    lines = Path(environment["CALLS"]).read_text().splitlines()
    return [line for line in lines if line.split()[0] in names]


def call(environment, *words):
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_every_launch_file(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    words = ["--config_file", str(path), "-m", "pipelines.train_flow", "CONFIG.yaml"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.num_processes == config.num_processes
    assert args.mixed_precision == "no"  # fit.precision is the only key for it
    assert args.multi_gpu == (config.num_processes > 1)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_sound_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK), f"{path.name} is not executable"
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert not found.returncode, found.stdout


def test_the_chain_is_queued_stage_behind_stage(slurm):
    environment = slurm | {"WORKERS": "3", "TRAIN": "--nodes=1 --gpus-per-node=8"}
    done = call(
        environment, "scripts/slurm/chain.sh", "ring", "flow.fit.steps=20", "pairs.shards=2"
    )
    assert done.returncode == 0, done.stderr
    queued = calls(slurm, "sbatch")
    names = [line.split("--job-name=")[1].split()[0] for line in queued]
    assert names == [f"ring-{s}" for s in ("flow", "pairs", "reflow", "evaluate", "export")]
    assert "--dependency" not in queued[0]
    for number, line in enumerate(queued[1:]):
        assert f"--dependency=afterok:{101 + number} " in line
    assert ["--array=0-2" in line for line in queued] == [False, True, False, False, False]
    assert ["--gpus-per-node=8" in line for line in queued] == [True, False, True, False, False]
    runs = [line.split(" -m ")[-1] for line in calls(slurm, "python")]
    pairs = "pipelines.generate_pairs configs/ring/pairs.yaml shards=2"
    assert runs == [
        "pipelines.train_flow configs/ring/flow.yaml fit.steps=20",
        *(pairs, pairs, pairs),
        *(f"pipelines.{s} configs/ring/{s}.yaml" for s in ("reflow", "evaluate", "export")),
    ]


def test_later_rounds_are_queued_too(slurm):
    environment = slurm | {"WORKERS": "2", "ROUNDS": "2"}
    done = call(environment, "scripts/slurm/chain.sh", "ring", "pairs_2.shards=2")
    assert done.returncode == 0, done.stderr
    names = [line.split("--job-name=ring-")[1].split()[0] for line in calls(slurm, "sbatch")]
    assert names == ["flow", "pairs", "reflow", "pairs_2", "reflow_2", "evaluate", "export"]
    runs = [line.split(" -m ")[-1] for line in calls(slurm, "python")]
    assert [run.split()[1] for run in runs] == [
        f"configs/ring/{stage}.yaml"
        for stage in (
            "flow",
            *["pairs"] * 2,
            "reflow",
            *["pairs"] * 2,
            "reflow",
            "evaluate",
            "export",
        )
    ]
    assert "run_dir=runs/ring/pairs_2 teacher=runs/ring/reflow" in runs[4]
    assert runs[4].endswith("shards=2")
    assert "student=runs/ring/reflow_2" in runs[7]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("digits", "flow pairs features reflow evaluate export"),
        ("fashion_mnist", "flow pairs features reflow classifier evaluate export"),
    ],
)
def test_classifiers_are_trained_where_there_is_a_config_for_them(slurm, name, stages):
    done = call(slurm | {"WORKERS": "1"}, "scripts/slurm/chain.sh", name)
    assert done.returncode == 0, done.stderr
    names = [line.split(f"--job-name={name}-")[1].split()[0] for line in calls(slurm, "sbatch")]
    assert names == stages.split()
    runs = [line.split(" -m ")[-1].split() for line in calls(slurm, "python")]
    assert [run[1] for run in runs] == [f"configs/{name}/{stage}.yaml" for stage in names]
    assert runs[2][0] == "pipelines.train_classifier"

    Path(slurm["CALLS"]).write_text("")
    done = call(slurm | {"ROUNDS": "2"}, "scripts/reflow.sh", name)
    assert done.returncode == 0, done.stderr
    at = names.index("reflow") + 1
    every = [*names[:at], "pairs", "reflow", *names[at:]]
    runs = [line.split(" -m ")[-1].split() for line in calls(slurm, "python")]
    assert [run[1] for run in runs] == [f"configs/{name}/{stage}.yaml" for stage in every]


def test_a_chain_with_a_mistake_in_any_config_is_not_queued(slurm):
    environment = slurm | {"PYTHON": sys.executable}
    done = call(environment, "scripts/slurm/chain.sh", "ring", "reflow.fit.stepz=20")
    assert done.returncode == 2
    assert "fit.stepz" in done.stderr
    assert not calls(slurm, "sbatch")


def test_a_classifier_that_no_stage_makes_is_missed_before_any_work(slurm):
    for stage in ("features", "classifier"):
        line = f"x: later: key=runs/ring/{stage} does not exist; run the stage that makes it first"
        done = call(slurm | {"PLAN": line}, "scripts/reflow.sh", "ring")
        assert done.returncode == 2
        assert f"{line}\nreflow.sh: configs/ring/{stage}.yaml does not exist" in done.stderr
        assert not calls(slurm, "python")
    line = line.replace("ring", "fashion_mnist")
    assert call(slurm | {"PLAN": line}, "scripts/reflow.sh", "fashion_mnist").returncode == 0


def test_a_failed_stage_ends_the_job_with_its_cause(slurm):
    environment = slurm | {"SLURM_JOB_ID": "7", "TASK": "echo the cause >&2; exit 3"}
    done = call(environment, "scripts/slurm/job.sh", "ring")
    assert done.returncode == 3
    assert "the cause" in done.stderr
    assert len(calls(slurm, "python")) == 1  # no stage after it
    assert not calls(slurm, "scontrol")


@pytest.mark.parametrize(
    ("member", "status"),
    [(None, 75), ("2", 75), (None, 1)],
    ids=["stage", "array", "launcher"],
)
def test_a_preempted_job_saves_and_is_queued_again(slurm, tmp_path, member, status):
    saved, started = tmp_path / "saved", tmp_path / "started"
    task = f"trap 'sleep 1; touch {saved}; exit {status}' TERM; touch {started}; "
    task += "for i in {1..300}; do sleep 0.1; done"
    environment = slurm | {"SLURM_JOB_ID": "9", "TASK": task, "STAGES": "flow"}
    if member:
        environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": member}
    job = subprocess.Popen(
        ["scripts/slurm/job.sh", "ring"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    while not started.exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: does
    assert job.wait() == 75
    assert saved.exists()  # it waited for the stage, not for the script between them
    assert calls(slurm, "scontrol") == [f"scontrol requeue {'7_2' if member else '9'}"]


def test_preempted_nodes_save_before_their_srun_ends(slurm, tmp_path):
    """SIGTERM to srun would be SIGKILL to every rank: the steps are signalled themselves."""
    task = f"trap 'sleep 1; touch {tmp_path}/saved.$$; exit 1' TERM; touch {tmp_path}/started.$$; "
    task += "for i in {1..300}; do sleep 0.1; done"
    environment = slurm | {"SLURM_JOB_ID": "9", "TASK": task, "STAGES": "flow", "TOGETHER": "1"}
    environment |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    environment |= {"SLURM_JOB_NODELIST": "nodes[1-2]"}
    job = subprocess.Popen(
        ["scripts/slurm/job.sh", "ring"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    while len(list(tmp_path.glob("started.*"))) < 2:
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    assert len(list(tmp_path.glob("saved.*"))) == 2
    assert calls(slurm, "scancel") == ["scancel --signal=TERM 9"]
    assert "scontrol requeue 9" in calls(slurm, "scontrol")


def test_two_nodes_get_a_launcher_each(slurm):
    environment = slurm | {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    environment |= {"SLURM_JOB_NODELIST": "nodes[1-2]", "STAGES": "flow"}
    done = call(environment, "scripts/slurm/job.sh", "ring")
    assert done.returncode == 0, done.stderr
    one, two = calls(slurm, "python")
    flags = "--config_file configs/accelerate/two_nodes.yaml --num_processes 8 --num_machines 2"
    assert f"{flags} --machine_rank 0 --main_process_ip first -m pipelines.train_flow" in one
    assert f"{flags} --machine_rank 1 --main_process_ip first -m pipelines.train_flow" in two


def test_an_unknown_stage_is_refused(slurm):
    done = call(slurm | {"STAGES": "flow paris"}, "scripts/reflow.sh", "ring")
    assert done.returncode == 2
    assert "there is no stage paris" in done.stderr
    done = call(slurm | {"STAGES": "features classifier"}, "scripts/reflow.sh", "ring")
    assert done.returncode == 2
    assert "features classifier: configs/ring/features.yaml does not exist" in done.stderr
    done = call(slurm | {"STAGES": "flow classifier"}, "scripts/reflow.sh", "digits")
    assert done.returncode == 2
    assert "STAGES=flow classifier: configs/digits/classifier.yaml does not exist" in done.stderr
    done = call(slurm, "scripts/reflow.sh", "digits", "classifier.steps=3")
    assert done.returncode == 2
    assert "classifier.steps=3: configs/digits/classifier.yaml does not exist" in done.stderr
    assert not calls(slurm, "python")


def test_later_rounds_follow_the_folders_of_earlier_ones(slurm):
    keys = ["pairs.run_dir=a", "reflow.pairs=[{path: a}]", "reflow.run_dir=b", "pairs_2.run_dir=c"]
    keys += ["reflow_3.run_dir=d", "evaluate.run_dir=e", "pairs.seed=5"]
    done = call(slurm | {"ROUNDS": "3"}, "scripts/reflow.sh", "ring", *keys)
    assert done.returncode == 0, done.stderr
    runs = [line.split(" -m pipelines.")[-1] for line in calls(slurm, "python")]
    last = [dict(re.findall(r"(\w+)=(\[.*?\]|\S+)", run)) for run in runs]  # a later word wins
    names = ["flow", "pairs", "reflow", "pairs_2", "reflow_2", "pairs_3", "reflow_3"]
    found = dict(zip(names, last, strict=False))
    root = "runs/ring"
    assert found["pairs"] == {"run_dir": "a", "seed": "5"}
    assert found["reflow"] == {"pairs": "[{path: a}]", "run_dir": "b"}
    assert found["pairs_2"] == {"run_dir": "c", "teacher": "b", "seed": "6"}
    second, pairs = f"{root}/reflow_2", f"{root}/pairs_3"
    assert found["reflow_2"] == {"run_dir": second, "start": "b", "pairs": "[{path: c}]"}
    assert found["pairs_3"] == {"run_dir": pairs, "teacher": second, "seed": "7"}
    assert found["reflow_3"] == {"run_dir": "d", "start": second, "pairs": f"[{{path: {pairs}}}]"}
    assert last[-2] == {"run_dir": "e", "student": "d"}
    assert last[-1] == {"run_dir": f"{root}/export_3", "student": "d", "evaluation": "e"}


def test_a_plan_counts_the_processes_that_the_launcher_starts(slurm, tmp_path):
    environment = slurm | {"PYTHON": sys.executable, "STAGES": "flow"}
    environment |= {"ACCELERATE_CONFIG": "configs/accelerate/cpu_2.yaml"}
    command = ["scripts/reflow.sh", "--dry-run", "ring", "flow.device=cpu"]
    odd = [*command, f"flow.run_dir={tmp_path}/none", "flow.fit.batch_size=127"]
    done = call(environment, *odd)
    assert done.returncode == 2
    assert "batch_size=127" in done.stderr
    assert call(environment | {"LAUNCHER": "x", "PROCESSES": ""}, *odd).returncode == 0
    assert call(environment | {"LAUNCHER": "x", "PROCESSES": "2"}, *odd).returncode == 2
    sharded = [*command, f"flow.run_dir={tmp_path}/none", "flow.fit.shard=true"]
    done = call(environment, *sharded)
    assert done.returncode == 0, done.stderr
    done = call(environment | {"ACCELERATE_CONFIG": "configs/accelerate/none.yaml"}, *command)
    assert "ACCELERATE_CONFIG=configs/accelerate/none.yaml does not exist" in done.stderr


@pytest.mark.slow
def test_the_queued_chain_runs_to_its_export(slurm, tmp_path):
    environment = slurm | {"PYTHON": sys.executable, "WORKERS": "2"}
    folder = {
        stage: f"{tmp_path}/{stage}" for stage in ("flow", "pairs", "reflow", "evaluate", "export")
    }
    keys = [f"{stage}.run_dir={place}" for stage, place in folder.items()]
    keys += ["flow.fit.steps=50", "flow.data.samples=500", "flow.device=cpu", "reflow.fit.steps=50"]
    keys += [f"pairs.teacher={folder['flow']}", "pairs.shards=2", "pairs.shard_size=200"]
    keys += [f"reflow.start={folder['flow']}", f"reflow.pairs=[{{path: {folder['pairs']}}}]"]
    keys += [f"evaluate.teacher={folder['flow']}", f"evaluate.student={folder['reflow']}"]
    keys += ["evaluate.samples=200", "evaluate.steps=[1]", "evaluate.converged_steps=4"]
    keys += [f"export.student={folder['reflow']}", f"export.evaluation={folder['evaluate']}"]
    done = call(environment, "scripts/slurm/chain.sh", "ring", *keys)
    logs = {p.name: p.read_text() for p in tmp_path.glob("calls.*")}
    assert done.returncode == 0, (done.stderr, logs)
    for place in folder.values():
        assert json.loads(Path(place, "manifest.json").read_text())["stage"]
    assert len(logs) == 6  # two workers made the pairs
    again = call(environment, "scripts/slurm/job.sh", "ring", *keys)
    assert again.stdout.count("is sealed: nothing to do") == 5
