"""Runs that grow, that end early, that start from a checkpoint; checkpoints that are models."""

import json
import math
import shutil

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.models import networks, teachers
from flowmatch.runs import manifest
from flowmatch.training.learning_rate import factor
from flowmatch.training.sealing import seal
from pipelines import export, generate_pairs, reflow, train_flow
from tests import forked
from tests.runs.test_checkpoints import flip, tiny
from tests.stages import UNET, run

NET = json.dumps({"name": "VelocityMLP", "hidden": 8, "layers": 1})
WORDS = ("data.source=ring", "data.samples=50", f"net={NET}", "fit.batch_size=8")
WORDS += ("fit.warmup=4", "fit.save_every=20", "fit.log_every=10", "device=cpu")


def train(folder, *words):
    """Run the stage as a process; return what it says."""
    done = forked.run(["flowmatch", "flow", f"run_dir={folder}", *WORDS, *words])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(folder, *words):
    done = forked.run(["flowmatch", "flow", f"run_dir={folder}", *WORDS, *words])
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def weights(folder):
    return (folder / "net/diffusion_pytorch_model.safetensors").read_bytes()


def rates(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["lr"] for line in map(json.loads, lines)}


def facts(folder):
    return manifest.read(folder, "x")["facts"]


def test_the_decay_alone_is_repeated():
    assert [factor(s, 20, 4, "cosine", 10) for s in (0, 2)] == [0, 0.5]
    assert factor(10, 20, 4, "cosine", 10) == 1
    assert factor(15, 20, 4, "cosine", 10) == pytest.approx(0.5)
    assert factor(12, 20, 4, "linear", 10) == pytest.approx(0.8)
    assert factor(20, 20, 4, "linear", 10) == 0
    assert factor(12, 20, 4, "constant", 10) == 1
    for decay in ("cosine", "linear"):  # an end within the warm-up is none
        assert factor(7, 20, 4, decay, 3) == factor(7, 20, 4, decay)


@pytest.mark.slow
def test_a_constant_run_that_grows_is_the_longer_run(tmp_path):
    train(tmp_path / "whole", "fit.decay=constant", "fit.steps=60")
    train(tmp_path / "grown", "fit.decay=constant", "fit.steps=30")
    said = train(tmp_path / "grown", "fit.decay=constant", "fit.steps=60")
    assert "grows from 30 updates to 60, and goes on at 30" in said
    assert weights(tmp_path / "grown") == weights(tmp_path / "whole")
    assert facts(tmp_path / "grown") == facts(tmp_path / "whole") | {"earlier_steps": [30]}
    assert rates(tmp_path / "grown") == rates(tmp_path / "whole")
    said = train(tmp_path / "grown", "fit.decay=constant", "fit.steps=60")
    assert "is sealed: nothing to do" in said
    said = refused(tmp_path / "grown", "fit.decay=constant", "fit.steps=30")
    assert "fit.steps may grow" in said
    assert "fit.steps: 60 -> 30" in said


def test_a_run_grows_by_epochs(tmp_path):
    words = ("fit.decay=constant", "data.samples=40")
    train(tmp_path / "flow", *words, "fit.epochs=2")
    said = train(tmp_path / "flow", *words, "fit.epochs=4")
    assert "grows from 10 updates to 20, and goes on at 10" in said
    assert facts(tmp_path / "flow")["earlier_steps"] == [10]


def test_a_run_that_has_decayed_grows_by_its_decay(tmp_path):
    flow = tmp_path / "flow"
    train(flow, "fit.steps=40")
    train(flow, "fit.steps=80")
    expected = {
        step: 1e-3 * factor(step, *((40, 4) if step < 40 else (80, 4)), "cosine", 40 * (step >= 40))
        for step in range(10, 81, 10)
    }
    expected[40] = 0  # logged before the growth
    assert rates(flow) == pytest.approx(expected)
    assert rates(flow)[60] == pytest.approx(0.5e-3)
    assert facts(flow)["earlier_steps"] == [40]
    assert manifest.read(flow, "x")["config"]["fit"]["steps"] == 80

    # killed within the growth and repeated, it is the same; going back is refused
    cut = tmp_path / "cut"
    shutil.copytree(flow, cut)
    (cut / "manifest.json").unlink()
    shutil.rmtree(cut / "net")
    shutil.rmtree(cut / "checkpoints/step_00000080")
    assert "fit.steps: 80 -> 40" in refused(cut, "fit.steps=40")
    assert "resumes at 60 of 80" in train(cut, "fit.steps=80")
    assert (cut / "manifest.json").read_bytes() == (flow / "manifest.json").read_bytes()


def test_a_run_in_the_middle_of_its_decay_does_not_grow(tmp_path):
    flow = tmp_path / "flow"
    tiny(flow)
    before = (flow / "manifest.json").read_bytes()
    for path in (flow / "checkpoints/step_00000040", flow / "manifest.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="of a run that has reached its end") as error:
        tiny(flow, "fit.steps=50")
    assert "fit.steps: 40 -> 50" in str(error.value)
    tiny(flow)
    assert (flow / "manifest.json").read_bytes() == before
    shutil.rmtree(flow / "checkpoints")
    with pytest.raises(UserError, match="from the last checkpoint"):
        tiny(flow, "fit.steps=50")
    assert (flow / "manifest.json").read_bytes() == before


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was killed after update 20 of 40."""
    folder = tmp_path_factory.mktemp("growing") / "flow"
    tiny(folder, "fit.ema=[0.1,0.2]")
    shutil.rmtree(folder / "net")
    shutil.rmtree(folder / "net_2")
    (folder / "manifest.json").unlink()
    return folder


def test_seal_closes_a_run_as_what_it_is(stopped, tmp_path):
    flow = tmp_path / "flow"
    shutil.copytree(stopped, flow)
    flip(flow / "checkpoints/step_00000040/optimizer.safetensors")
    done = forked.run(["flowmatch", "seal", str(flow)])
    assert done.returncode == 0, done.stderr
    assert "step_00000040 is not used: optimizer.safetensors is damaged" in done.stdout
    assert "becomes what it is at update 20 of 40" in done.stdout
    assert facts(flow)["step"] == 20
    assert max(rates(flow)) == 20
    teacher, second = (teachers.load(flow / name, "teacher") for name in ("", "net_2"))
    assert teacher.digest == facts(flow)["net"] != second.digest
    assert "is sealed: nothing to do" in forked.run(["flowmatch", "seal", str(flow)]).stdout
    few = ["shards=1", "shard_size=8", "block=8", "compute_batch=8", "solver.steps=1"]
    run(generate_pairs, f"run_dir={tmp_path}/pairs", f"teacher={flow}", *few)
    (flow / "manifest.json").unlink()  # to train on after all
    tiny(flow, "fit.ema=[0.1,0.2]")
    assert "step" not in facts(flow)


def test_a_run_that_is_sealed_at_its_end_is_the_run(stopped, tmp_path):
    tiny(tmp_path / "whole", "fit.ema=[0.1,0.2]")
    shutil.copytree(stopped, tmp_path / "flow")
    seal(tmp_path / "flow")
    for name in ("manifest.json", "net/config.json", "net_2/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "flow" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_cannot_be_sealed_is_told(stopped, tmp_path):
    assert "expected one run folder" in forked.run(["flowmatch", "seal"]).stderr
    done = forked.run(["flowmatch", "seal", str(tmp_path)])
    assert done.returncode == 2
    assert "holds no checkpoint; expected a run of flow, reflow or finish" in done.stderr
    shutil.copytree(stopped, tmp_path / "flow")
    for step in (20, 40):
        flip(tmp_path / f"flow/checkpoints/step_000000{step}/net.safetensors")
    with pytest.raises(UserError, match="no checkpoint is sound"):
        seal(tmp_path / "flow")


def test_every_checkpoint_is_a_model(stopped, tmp_path):
    from diffusers import UNet2DModel

    step = stopped / "checkpoints/step_00000020"
    first, second = (teachers.load(step / name, "teacher") for name in ("", "net_2"))
    assert first.round == 0
    assert first.digest != second.digest
    few = ["shards=1", "shard_size=8", "block=8", "compute_batch=8", "solver.steps=1"]
    run(generate_pairs, f"run_dir={tmp_path}/pairs", f"teacher={step}", *few)
    place, pairs = f"run_dir={tmp_path}/reflow", f"pairs=[{tmp_path}/pairs]"
    run(reflow, place, f"start={step}/net_2", pairs, "fit.steps=2", "fit.batch_size=4")
    later = tmp_path / "reflow/checkpoints/step_00000002"
    assert teachers.load(later, "student").round == 1
    assert teachers.load(later, "student").digest == facts(tmp_path / "reflow")["net"]
    run(export, f"run_dir={tmp_path}/export", f"student={later}", "steps=[1]")

    damaged = tmp_path / "step_00000020"
    shutil.copytree(step, damaged)
    flip(damaged / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"teacher=.*model.safetensors is damaged .*another check"):
        teachers.load(damaged, "teacher")

    net = json.dumps({"name": "UNet2DModel", **UNET})
    words = ["data.source=digits", f"net={net}", "fit.steps=2", "fit.batch_size=4"]
    run(train_flow, f"run_dir={tmp_path}/unet", *words)
    mine = networks.load(tmp_path / "unet/net", "x").state_dict()
    stock = UNet2DModel.from_pretrained(tmp_path / "unet/checkpoints/step_00000002")
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, mine[name])


def test_stage_one_starts_from_weights(stopped, tmp_path):
    step = stopped / "checkpoints/step_00000040"
    data, fit = ("data.source=ring", "data.samples=70"), ("fit.batch_size=8", "fit.steps=1")
    words = (*data, *fit, f"start={step}", "fit.lr=1e-12", "device=cpu")
    done = forked.run(["flowmatch", "flow", f"run_dir={tmp_path}/tuned", *words])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"from the weights of start={step}" in done.stdout
    before, after = networks.load(step, "x"), networks.load(tmp_path / "tuned/net", "x")
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, atol=1e-8, rtol=0)
    assert manifest.read(tmp_path / "tuned", "x")["inputs"]["start"] == (
        teachers.load(step, "start").digest
    )
    words = (f"run_dir={tmp_path}/no", f"start={step}", "data.source=digits", "fresh=true", *fit)
    done = forked.run(["flowmatch", "flow", *words])
    assert done.returncode == 2
    assert "reads no prompts: leave fresh and call out" in done.stderr
    assert f"data holds [1, 8, 8]; start={step} takes [2]" in done.stderr
    assert math.isfinite(rates(stopped)[40])
