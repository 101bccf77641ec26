"""Stage one on several real processes: they end together, and compute the same as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowmatch import nets
from tests import ranks

ROOT = Path(__file__).parent.parent
RING = [
    *("configs/ring/flow.yaml", "data.samples=500", "net.hidden=32", "fit.batch_size=64"),
    *("fit.log_every=10", "fit.save_every=20"),
]
DIGITS = [
    *("configs/digits/flow.yaml", "fit.steps=20", "fit.batch_size=16", "fit.warmup=5"),
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


def train(folder, world, *words, codes=None, **environment):
    """Run the watched stage on some ranks, to its end; return what they said."""
    log = Path(f"{folder}.log")
    log.unlink(missing_ok=True)
    started = ranks.start(world, [*words, "device=cpu", f"run_dir={folder}"], log, **environment)
    for rank in started:
        rank.join(120)
    said = log.read_text()
    assert [rank.exitcode for rank in started] == (codes or [0] * world), said
    return said


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(folder):
    return nets.load(folder / "net", "net").state_dict()


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
    rank = fault.split(":")[1]
    assert f"rank      : {rank} " in done.stderr.split("Root Cause")[1]
    assert [p.name for p in (tmp_path / "flow/checkpoints").iterdir()] == ["step_00000020"]


@pytest.mark.slow
def test_ranks_let_go_of_their_wrappers_before_the_group_ends(tmp_path):
    done = launch(tmp_path / "flow", "fit.steps=20")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flow/manifest.json").exists()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A U-Net trained by two ranks that each hold all of it."""
    folder = tmp_path_factory.mktemp("plain") / "flow"
    train(folder, 2, *DIGITS, *UNET)
    return folder


@pytest.mark.slow
def test_sharded_training_is_killed_resumed_and_agrees_with_unsharded(plain, tmp_path):
    words = [*DIGITS, *UNET, "fit.shard=true"]
    train(tmp_path / "whole", 2, *words)
    train(tmp_path / "cut", 2, *words, codes=[-9, 1], FAULT="save:0:10")
    found = sorted(path.name for path in (tmp_path / "cut/checkpoints").iterdir())
    assert found == ["step_00000005", "step_00000010.tmp"]
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
    from flowmatch.fit import check
    from flowmatch.state import FitConfig

    config = FitConfig(steps=1, batch_size=2, shard=True)
    with pytest.raises(UserError, match="shares out over processes, and there is one"):
        check(config, "cpu", 1)
    with pytest.raises(UserError, match="does not scale gradients as fp16 needs"):
        check(config.model_copy(update={"precision": "fp16"}), "cuda", 2)
    check(config, "cpu", 2)
