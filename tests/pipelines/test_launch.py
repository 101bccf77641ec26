"""Launch files and job scripts: what Accelerate reads of them; a SLURM that runs its jobs at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOW = ["ring", "name=no_such_run", "--only", "flow"]
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
  [ -z "${QUEUE_ONLY:-}" ] || break
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
status=0
for step in $(jobs -p); do wait "$step" || status=$?; done
exit "$status"
""",
    "scancel": 'kill -TERM $(cat "$CALLS.steps")',
    # the command is the real one; a stage does what TASK says
    "python": """
if [ "$1 $2" = "-m flowmatch" ]; then exec "$REAL" "$@"; fi
echo "python $*" >>"$CALLS"
eval "${TASK:-true}"
""",
}


@pytest.fixture
def slurm(tmp_path):
    """An environment whose SLURM notes its calls; `python` is a stand-in, too."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in TOOLS.items():
        note = "" if name == "python" else f'echo "{name} $*" >>"$CALLS"'
        (folder / name).write_text(f"#!/usr/bin/env bash\n{note}\n{body}")
        (folder / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    path = f"{folder}:{os.environ['PATH']}"
    clean |= {"PATH": path, "CALLS": str(calls), "REAL": sys.executable}
    return clean | {"PYTHON": str(folder / "python")}


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


def test_the_chain_is_queued_stage_behind_stage(slurm, tmp_path):
    """With a second round; each job does its own section, and nothing is queued after a mistake."""
    environment = slurm | {"WORKERS": "3", "TRAIN": "--nodes=1 --gpus-per-node=8"}
    environment["QUEUE_ONLY"] = "1"
    keys = [f"name={tmp_path.name}", "--rounds", "2", "flow.fit.steps=20", "pairs_2.shards=2"]
    done = call(environment, "scripts/slurm/chain.sh", "ring", *keys, "reflow.fit.stepz=20")
    assert done.returncode == 2
    assert "reflow.fit.stepz: unknown key" in done.stderr
    assert not calls(slurm, "sbatch")
    done = call(environment, "scripts/slurm/chain.sh", "ring", *keys)
    assert done.returncode == 0, done.stderr
    queued = calls(slurm, "sbatch")
    names = [line.split("--job-name=ring-")[1].split()[0] for line in queued]
    order = ["flow", "pairs", "reflow", "pairs_2", "reflow_2", "evaluate_2", "export_2"]
    assert names == order
    words = " ".join(["scripts/slurm/job.sh ring", *keys, "--only"])
    assert all(line.endswith(f"{words} {name}") for line, name in zip(queued, names, strict=True))
    assert "--dependency" not in queued[0]
    for number, line in enumerate(queued[1:]):
        assert f"--dependency=afterok:{101 + number} " in line
    arrays = ["--array=0-2" in line for line in queued]
    assert arrays == [name.startswith("pairs") for name in order]
    trained = ["--gpus-per-node=8" in line for line in queued]
    assert trained == [name in ("flow", "reflow", "reflow_2") for name in order]


def test_a_failed_stage_ends_the_job_with_its_cause(slurm):
    environment = slurm | {"SLURM_JOB_ID": "7", "TASK": "echo the cause >&2; exit 3"}
    done = call(environment, "scripts/slurm/job.sh", *FLOW)
    assert done.returncode == 3
    assert "the cause" in done.stderr
    assert len(calls(slurm, "python")) == 1  # no stage after it
    assert not calls(slurm, "scontrol")


@pytest.mark.parametrize(
    ("member", "status"),
    [
        (None, 75),
        pytest.param("2", 75, marks=pytest.mark.slow),
        pytest.param(None, 1, marks=pytest.mark.slow),
    ],
    ids=["stage", "array", "launcher"],
)
def test_a_preempted_job_saves_and_is_queued_again(slurm, tmp_path, member, status):
    saved, started = tmp_path / "saved", tmp_path / "started"
    task = f"trap 'sleep 1; touch {saved}; exit {status}' TERM; touch {started}; "
    task += "for i in {1..300}; do sleep 0.1; done"
    environment = slurm | {"SLURM_JOB_ID": "9", "TASK": task}
    if member:
        environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": member}
    job = subprocess.Popen(
        ["scripts/slurm/job.sh", *FLOW], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
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
    environment = slurm | {"SLURM_JOB_ID": "9", "TASK": task, "TOGETHER": "1"}
    environment |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    environment |= {"SLURM_JOB_NODELIST": "nodes[1-2]"}
    job = subprocess.Popen(
        ["scripts/slurm/job.sh", *FLOW], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
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
    environment |= {"SLURM_JOB_NODELIST": "nodes[1-2]"}
    done = call(environment, "scripts/slurm/job.sh", *FLOW)
    assert done.returncode == 0, done.stderr
    one, two = calls(slurm, "python")
    flags = "--config_file configs/accelerate/two_nodes.yaml --num_processes 8 --num_machines 2"
    assert f"{flags} --machine_rank 0 --main_process_ip first -m pipelines.train_flow" in one
    assert f"{flags} --machine_rank 1 --main_process_ip first -m pipelines.train_flow" in two


@pytest.mark.slow
def test_the_queued_chain_runs_to_its_export(slurm, tmp_path):
    task = '"$REAL" "$@"'
    environment = slurm | {"TASK": task, "WORKERS": "2"}
    folder = {
        stage: f"{tmp_path}/{stage}" for stage in ("flow", "pairs", "reflow", "evaluate", "export")
    }
    keys = [f"{stage}.run_dir={place}" for stage, place in folder.items()]
    keys += ["flow.fit.steps=50", "flow.data.samples=500", "device=cpu", "reflow.fit.steps=50"]
    keys += ["pairs.shards=2", "pairs.shard_size=200", "evaluate.data.samples=500"]
    keys += ["evaluate.samples=200", "evaluate.steps=[1]", "evaluate.converged_steps=4"]
    done = call(environment, "scripts/slurm/chain.sh", "ring", *keys)
    logs = {p.name: p.read_text() for p in tmp_path.glob("calls.*")}
    assert done.returncode == 0, (done.stderr, logs)
    for place in folder.values():
        assert json.loads(Path(place, "manifest.json").read_text())["stage"]
    assert len(logs) == 6  # two workers made the pairs
    again = call(environment, "scripts/slurm/job.sh", "ring", *keys)
    assert again.stdout.count(" is finished") == 5
