"""Stage one on several real processes: they end together, and compute the same as one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flowmatch.models import networks
from tests import forked, pairset, ranks

ROOT = Path(__file__).parents[2]
RING = [
    *("configs/ring.yaml", "data.samples=500", "net.hidden=32", "fit.batch_size=64"),
    *("fit.log_every=10", "fit.save_every=20", "fit.keep=100", "fit.steps=200"),
]
DIGITS = [
    *("configs/digits.yaml", "fit.steps=20", "fit.batch_size=16", "fit.warmup=5"),
    *("fit.log_every=5", "fit.save_every=5"),
]
UNET = [
    *("net.block_out_channels=[8]", "net.norm_num_groups=4"),
    *("net.down_block_types=[DownBlock2D]", "net.up_block_types=[UpBlock2D]"),
]
DIT = {
    "name": "DiTTransformer2DModel",
    **{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2},
    **{"patch_size": 2, "norm_num_groups": 4},
}


def launch(folder, *more, processes=2, **environment):
    """Run the watched stage under `accelerate launch`, to its end."""
    words = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2.yaml"]
    words += ["--num_processes", str(processes), "--main_process_port", "0", "-m", "tests.ranks"]
    return subprocess.run(
        [sys.executable, *words, *RING, "device=cpu", f"run_dir={folder}", *more],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def train(folder, world, *words, codes=None, name="train_flow", **environment):
    """Run the watched stage on some ranks, to its end; return what they said."""
    log = Path(f"{folder}.log")
    log.unlink(missing_ok=True)
    argv = [*words, "device=cpu", f"run_dir={folder}"]
    started = ranks.start(world, argv, log, name, **environment)
    for rank in started:
        rank.join(120)
    said = log.read_text()
    assert [rank.exitcode for rank in started] == (codes or [0] * world), said
    return said


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(folder):
    return networks.load(folder / "net", "net").state_dict()


def difference(one, other):
    """Largest difference of two runs' weights."""
    a, b = weights(one), weights(other)
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "cause"),
    [("kill:1:30", "Signal 9 (SIGKILL) received by PID"), ("raise:0:30", "the cause of it all")],
)
def test_a_rank_that_dies_ends_the_job_with_the_cause(tmp_path, fault, cause):
    done = launch(tmp_path / "flow", "fit.steps=1000", FAULT=fault)
    assert done.returncode == 1
    assert cause in done.stderr
    kind, rank, _ = fault.split(":")
    if kind != "raise":  # the launcher may see first a rank that the failing one has ended
        assert f"rank      : {rank} " in done.stderr.split("Root Cause")[1]
    assert [p.name for p in (tmp_path / "flow/checkpoints").iterdir()] == ["step_00000020"]


@pytest.mark.slow
def test_ranks_let_go_of_their_wrappers_before_the_group_ends(tmp_path):
    done = launch(tmp_path / "flow", "fit.steps=20")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flow/manifest.json").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The ring, trained undisturbed by one, two and four ranks: number -> folder."""
    root = tmp_path_factory.mktemp("whole")
    for world in (1, 2, 4):
        train(root / str(world), world, *RING)
    return {world: root / str(world) for world in (1, 2, 4)}


@pytest.mark.slow
def test_one_two_and_four_ranks_see_the_same_global_batches(whole):
    curves = {world: losses(folder) for world, folder in whole.items()}
    assert len(curves[1]) == 20
    for world in (2, 4):
        assert curves[world] == pytest.approx(curves[1], rel=1e-6)
        assert difference(whole[world], whole[1]) < 1e-5


def disturb(folder, world, after, number, wait, first=0):
    """Train until a checkpoint is there, wait, signal the ranks from `first` on; give all exit codes."""
    argv = [*RING, "device=cpu", f"run_dir={folder}"]
    started = ranks.start(world, argv, f"{folder}.log")
    while not (folder / f"checkpoints/step_{after:08d}").exists():
        assert all(rank.is_alive() for rank in started), Path(f"{folder}.log").read_text()
        time.sleep(0.002)
    time.sleep(wait)
    for rank in started[first:]:
        os.kill(rank.pid, number)
    for rank in started:
        rank.join(60)
    assert not (folder / "manifest.json").exists(), "it was done before it was disturbed"
    return [rank.exitcode for rank in started]


@pytest.mark.slow
def test_three_ranks_resume_bit_for_bit(tmp_path):
    """A sum of three is rounded by its order, and DDP's buckets decide on that."""
    words = [*DIGITS, *UNET, "fit.batch_size=24", "fit.keep=9"]
    train(tmp_path / "whole", 3, *words)
    shutil.copytree(
        tmp_path / "whole/checkpoints/step_00000010", tmp_path / "cut/checkpoints/step_00000010"
    )
    said = train(tmp_path / "cut", 3, *words)
    assert "train_flow: resumes at 10 of 20, from " in said
    assert "/cut/checkpoints/step_00000010\n" in said
    for name in ("manifest.json", "net/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_machines_that_see_different_folders_are_told_so(tmp_path):
    """Only rank 0 writes, so local disks show at a resume first."""
    train(tmp_path / "flow", 1, *RING)
    first = "checkpoints/step_00000020"
    shutil.copytree(tmp_path / "flow" / first, tmp_path / "one" / first)
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_PORT": str(ranks.free_port()),
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "pipelines.train_flow", *RING, "device=cpu"),
                f"run_dir={tmp_path}/{name}",
            ],
            cwd=ROOT,
            env=environment
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(("one", "two"))
    ]
    said = [process.communicate(timeout=100)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert (
        "".join(said).count("process 0 resumes at step 20, process 1 at step 0; use a folder") == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize(("worlds", "apart"), [((2, 2, 2), 0), ((4, 1, 2), 1e-5)])
def test_killed_at_random_moments_and_repeated(whole, tmp_path, worlds, apart):
    rng = np.random.default_rng(5)
    *killed, last = worlds
    for world, after in zip(killed, (40, 120), strict=True):
        codes = disturb(tmp_path / "cut", world, after, signal.SIGKILL, rng.uniform(0, 0.05))
        assert codes == [-9] * world
    train(tmp_path / "cut", last, *RING)
    assert difference(tmp_path / "cut", whole[last]) <= apart
    assert losses(tmp_path / "cut") == pytest.approx(losses(whole[last]), rel=1e-6 if apart else 0)


@pytest.mark.slow
def test_sigterm_to_one_rank_saves_where_all_stopped(whole, tmp_path):
    assert disturb(tmp_path / "cut", 2, 60, signal.SIGTERM, 0.05, first=1) == [75, 75]
    newest = max((tmp_path / "cut/checkpoints").iterdir()).name
    assert int(newest.removeprefix("step_")) == 10 * len(losses(tmp_path / "cut"))
    train(tmp_path / "cut", 2, *RING)
    assert difference(tmp_path / "cut", whole[2]) == 0


@pytest.mark.slow
def test_two_runs_that_meet_by_mistake_do_not_train_one_model(tmp_path):
    """By hand, with one port, a learning rate and a folder of their own."""
    own = [[f"run_dir={tmp_path}/0"], [f"run_dir={tmp_path}/1", "fit.lr=0.1"]]
    argv = ["pipelines.train_flow", *RING, "device=cpu"]
    started = [
        forked.Popen([*argv, *words], env=variables, stdout=forked.DEVNULL, stderr=forked.PIPE)
        for words, variables in zip(own, forked.environments(2), strict=True)
    ]
    said = "".join(job.communicate(60)[1] for job in started)
    assert [job.returncode for job in started] == [2, 2]
    assert "train_flow: rank 1: differs from rank 0" in said
    assert said.count("train_flow: rank 1:   fit.lr: 0.003 -> 0.1\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_input_that_is_missing_is_said_once_under_the_launcher(tmp_path):
    """Before, the rank that found it first ended the others, and said nothing."""
    words = ["data.source=npz", "data.path=gone.npz", "data.samples=50000"]
    done = launch(tmp_path / "flow", *words)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "gone.npz" in line]
    assert re.match(r"train_flow: rank [01]: data.path=gone.npz", line)
    assert done.stderr.index("gone.npz") < done.stderr.index("Traceback")  # the launcher's own


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path, processes):
    words = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2.yaml"]
    words += ["--num_processes", str(processes), "--main_process_port", "0", "-m", "tests.ranks"]
    if processes == 1:
        words = ["-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "tests.ranks"]
    more = ["fit.steps=1000000", "fit.save_every=1000000", "device=cpu"]
    with open(tmp_path / "log", "w+") as log:
        launcher = subprocess.Popen(
            [sys.executable, *words, *RING, *more, f"run_dir={tmp_path / 'flow'}"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        while not (tmp_path / "flow/metrics.jsonl").exists():
            assert launcher.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(children) == processes
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "they train on"
            time.sleep(0.05)
    said = (tmp_path / "log").read_text()
    assert f"train_flow: the launcher, process {launcher.pid}, has ended" in said
    (saved,) = (tmp_path / "flow/checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert f"train_flow: stopped by SIGTERM at step {step:,} of 1,000,000, which is saved;" in said


def alive(group):
    """Tell whether a process group has a member left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_sigterm_to_a_group_of_one_rank_leaves_no_orphan(tmp_path):
    words = ["-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "tests.ranks", *RING]
    more = ["fit.steps=1000000", "fit.save_every=1000000"]
    job = subprocess.Popen(
        [sys.executable, *words, *more, "device=cpu", f"run_dir={tmp_path / 'flow'}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not (tmp_path / "flow/metrics.jsonl").exists():
            assert job.poll() is None
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGTERM)
        job.wait(60)
        deadline = time.monotonic() + 60
        while alive(job.pid):
            assert time.monotonic() < deadline, "the stage runs on"
            time.sleep(0.05)
    finally:
        if alive(job.pid):
            os.killpg(job.pid, signal.SIGKILL)
    (saved,) = (tmp_path / "flow/checkpoints").iterdir()
    assert int(saved.name.removeprefix("step_")) >= 10 * len(losses(tmp_path / "flow"))


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_by_every_rank_and_said_once(tmp_path):
    said = train(tmp_path / "flow", 3, *RING, codes=[2, 2, 2])
    line = r"train_flow: rank \d: fit.batch_size=64 is not a multiple of 3 processes; use 63\n"
    assert re.fullmatch(line, said), said
    assert not (tmp_path / "flow").exists()


@pytest.mark.slow
def test_fewer_shards_than_ranks(tmp_path):
    pairset.make_teacher(tmp_path / "flow")
    words = [word for word in pairset.words(tmp_path, "shards=1") if "run_dir" not in word]
    train(tmp_path / "pairs", 3, *words, name="generate_pairs")
    train(tmp_path / "one", 1, *words, name="generate_pairs")
    assert pairset.contents(tmp_path / "pairs") == pairset.contents(tmp_path / "one")
    words = [f"start={tmp_path}/flow", f"pairs=[{{path: {tmp_path}/pairs}}]"]
    words += ["fit.steps=20", "fit.batch_size=8", "fit.log_every=5"]
    for world in (1, 2):
        train(tmp_path / f"reflow{world}", world, *words, name="reflow")
    one, two = (losses(tmp_path / f"reflow{world}") for world in (1, 2))
    assert one == pytest.approx(two, rel=1e-6)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A U-Net trained by two ranks that each hold all of it."""
    folder = tmp_path_factory.mktemp("plain") / "flow"
    train(folder, 2, *DIGITS, *UNET)
    return folder


@pytest.mark.slow
def test_sharded_training_is_killed_resumed_and_agrees_with_unsharded(plain, tmp_path):
    words = [*DIGITS, *UNET, "fit.shard=true", "fit.micro_batch=4", "fit.checkpointing=true"]
    train(tmp_path / "whole", 2, *words)
    train(tmp_path / "cut", 2, *words, codes=[-9, 1], FAULT="save:0:10")
    found = sorted(path.name for path in (tmp_path / "cut/checkpoints").iterdir())
    assert found == ["step_00000005"]
    train(tmp_path / "cut", 2, *words, codes=[1, -9], FAULT="kill:1:8")
    train(tmp_path / "cut", 2, *words)
    assert difference(tmp_path / "whole", tmp_path / "cut") == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert losses(tmp_path / "whole") == pytest.approx(losses(plain), rel=1e-6)
    assert difference(tmp_path / "whole", plain) < 1e-6
    for name in ("net/config.json", "config.yaml"):
        ours = (tmp_path / "whole" / name).read_text()
        theirs = (plain / name).read_text()
        assert (ours == theirs) == (name == "net/config.json")


@pytest.mark.slow
def test_a_sharded_dit_goes_on_unsharded_with_another_number_of_ranks(tmp_path):
    net = [f"net={json.dumps(DIT)}", "data.labels=true"]
    config = tmp_path / "flow.yaml"
    config.write_text((ROOT / DIGITS[0]).read_text().split("net:")[0] + "fit: {}\n")
    words = [str(config), *DIGITS[1:], *net]
    train(tmp_path / "whole", 1, *words)
    train(tmp_path / "cut", 2, *words, "fit.shard=true", codes=[-9, 1], FAULT="kill:0:12")
    train(tmp_path / "cut", 1, *words)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "cut"), rel=1e-6)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_masks_every_share(tmp_path):
    words = [*DIGITS, *UNET, "fit.shard=true"]
    said = train(tmp_path / "flow", 2, *words, codes=[2, 2], FAULT="nan:1:7")
    assert "not finite at step 8;" in said
    assert [path.name for path in (tmp_path / "flow/checkpoints").iterdir()] == ["step_00000005"]


def test_sharding_is_refused_where_it_means_nothing(tmp_path):
    from flowmatch.config import UserError
    from flowmatch.training.config import FitConfig
    from flowmatch.training.loop import check

    config = FitConfig(steps=1, batch_size=2, shard=True)
    with pytest.raises(UserError, match="needs more than one process"):
        check(config, "cpu", 1)
    with pytest.raises(UserError, match="cannot be combined with fit.precision='fp16'"):
        check(config.model_copy(update={"precision": "fp16"}), "cuda", 2)
    check(config, "cpu", 2)


@pytest.mark.slow
def test_each_machine_holds_the_weights_and_goes_on_without_the_other(plain, tmp_path):
    """Two machines of two processes; the parts of the first alone are written; then two processes."""
    words = [*DIGITS, *UNET, "fit.shard=machine"]
    machine = {"LOCAL_WORLD_SIZE": "2"}
    train(tmp_path / "cut", 4, *words, codes=[1, -9, 1, 1], FAULT="kill:1:12", **machine)
    parts = sorted(path.name for path in (tmp_path / "cut/checkpoints/step_00000010").iterdir())
    assert [name for name in parts if name.startswith("optimizer")] == [
        f"optimizer.part-0000{rank}.safetensors" for rank in range(4)
    ]
    from safetensors import safe_open

    sizes = [
        len(list(safe_open(tmp_path / f"cut/checkpoints/step_00000010/{name}", "pt").keys()))
        for name in parts
        if name.startswith("optimizer")
    ]
    assert sizes[0] >= sizes[1] > 0 == sizes[2] == sizes[3]
    train(tmp_path / "cut", 2, *DIGITS, *UNET, "fit.shard=true")
    assert losses(tmp_path / "cut") == pytest.approx(losses(plain), rel=1e-6)
    assert difference(tmp_path / "cut", plain) < 1e-6


def test_machines_of_one_process_each_share_nothing(monkeypatch):
    from flowmatch.config import UserError
    from flowmatch.training import sharding

    monkeypatch.setenv("WORLD_SIZE", "4")
    for local, share in (("2", 2), ("4", 4)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert sharding.processes_of("machine") == share
        assert sharding.processes_of(True) == 4
    for local in ("1", "3"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        with pytest.raises(UserError, match="fit.shard=machine: 4 processes"):
            sharding.processes_of("machine")
