"""Samples and held-out loss while a network trains: what they show, and that they change no byte."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from flowmatch.config import UserError
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.flow import grids, noise, path, solvers
from flowmatch.models import networks
from flowmatch.models.velocity import Velocity
from flowmatch.pairs.dataset import PairData
from flowmatch.training import pictures, preview
from flowmatch.training.config import FitConfig
from flowmatch.training.loop import check
from pipelines import generate_pairs, reflow, train_flow
from tests import forked
from tests.stages import UNET, run

NET = json.dumps({"name": "UNet2DModel", **UNET, "dropout": 0.3})
WORDS = ["data.source=digits", "data.labels=true", f"net={NET}", "fit.batch_size=8", "device=cpu"]
WORDS += ["fit.steps=6", "fit.save_every=3", "fit.log_every=2", "fit.label_drop=0.3"]
SEEN = ["fit.sample_every=2", "reference={source: digits, labels: true}"]


def contents(folder):
    kept = [*folder.glob("net/*"), *folder.glob("checkpoints/*/*"), folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def losses(folder):
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    return {line["step"]: line["held_out_loss"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A flow of digits with labels, with and without a preview."""
    root = tmp_path_factory.mktemp("preview")
    for name, words in (("plain", []), ("flow", SEEN)):
        done = forked.run(["flowmatch", "flow", f"run_dir={root}/{name}", *WORDS, *words])
        assert done.returncode == 0, done.stdout + done.stderr
    assert "samples of the averaged network in 8, 32 steps; the loss on 256 held-out" in done.stdout
    return root


def test_no_byte_changes(root):
    before, after = contents(root / "plain"), contents(root / "flow")
    assert len(before) > 8
    assert before == after
    assert not (root / "plain/samples").exists()


def test_what_is_drawn_and_measured_is_of_the_averaged_network_and_fixed_noises(root):
    names = [p.name for p in sorted((root / "flow/samples").iterdir())]
    assert names == [f"step_0000000{step}.png" for step in (2, 4, 6)]
    v = Velocity(networks.load(root / "flow/net", "x"))
    x0 = torch.from_numpy(noise.normal(0, range(10), (1, 8, 8), noise.EVALUATION))
    cond = {"label": torch.arange(10)}
    sheet = np.asarray(Image.open(root / "flow/samples/step_00000006.png").convert("RGB"))
    tile = 7 * 8 + pictures.GAP  # eight pixels, seven times as large
    for row, steps in enumerate((8, 32)):
        with torch.no_grad():
            x = solvers.integrate(lambda x, t: v(x, t, cond), x0, grids.uniform_grid(steps))
        wanted = ((x / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
        for i in range(10):
            left, top = pictures.LABEL + i * tile, row * tile
            shown = sheet[top + 3 : top + 56 : 7, left + 3 : left + 56 : 7, 0]
            assert np.abs(shown - wanted[i, 0]).max() <= 1

    found = losses(root / "flow")
    assert list(found) == [2, 4, 6]
    real = dataset.load(DataConfig(source="digits", labels=True))
    batch = real.batch(np.linspace(0, len(real) - 1, 256).astype(int))
    x0 = torch.from_numpy(noise.normal(0, range(2**32, 2**32 + 256), (1, 8, 8), noise.EVALUATION))
    with torch.no_grad():
        errors = [
            v(path.interpolate(x0, batch["x1"], k / 8), k / 8, {"label": batch["label"]})
            - (batch["x1"] - x0)
            for k in range(8)
        ]
    assert found[6] == pytest.approx(float(torch.stack(errors).square().mean()), rel=1e-4)


def test_a_resumed_run_draws_the_same_again(root, tmp_path):
    flow = tmp_path / "flow"
    shutil.copytree(root / "flow", flow)
    (flow / "manifest.json").unlink()
    shutil.rmtree(flow / "net")
    shutil.rmtree(flow / "checkpoints/step_00000006")
    (flow / "samples/step_00000006.png").write_bytes(b"of a damaged attempt")
    with open(flow / "held_out.jsonl", "a") as file:
        file.write('{"step": 6, "held_out_loss": 9.0}\n')
    run(train_flow, f"run_dir={flow}", *WORDS, *SEEN)
    assert contents(flow) == contents(root / "flow")
    assert (flow / "held_out.jsonl").read_bytes() == (root / "flow/held_out.jsonl").read_bytes()
    for file in sorted((root / "flow/samples").iterdir()):
        assert (flow / "samples" / file.name).read_bytes() == file.read_bytes()


def test_the_reference_is_of_the_data(root, tmp_path):
    words = [f"run_dir={tmp_path}/no", *WORDS, "fit.sample_every=2"]
    with pytest.raises(UserError, match=r"reference holds \[2\] .* data holds \[1, 8, 8\] with 10"):
        run(train_flow, *words, "reference={source: ring, samples: 20}")


def test_one_process_that_draws_keeps_no_other_from_the_same_bytes(tmp_path):
    net = json.dumps({"name": "VelocityMLP", "hidden": 8, "layers": 1})
    words = ["data.source=ring", "data.samples=50", f"net={net}", "fit.batch_size=8"]
    words += ["fit.steps=4", "fit.log_every=2", "device=cpu"]
    for name, more in (("plain", []), ("seen", ["fit.sample_every=1"])):
        place = f"run_dir={tmp_path}/{name}"
        done = forked.run_ranks(2, ["pipelines.train_flow", place, *words, *more])
        assert all(each.returncode == 0 for each in done), done[0].stderr
    assert contents(tmp_path / "plain") == contents(tmp_path / "seen")
    assert len(list((tmp_path / "seen/samples").iterdir())) == 4
    assert "no held-out loss" in done[0].stdout
    assert not (tmp_path / "seen/held_out.jsonl").exists()


def test_stage_three_shows_the_teachers_ends_and_measures_pairs_that_it_holds_out(root, tmp_path):
    few = ["shards=2", "shard_size=16", "block=8", "compute_batch=16", "solver.steps=1"]
    run(generate_pairs, f"run_dir={tmp_path}/pairs", f"teacher={root}/flow", *few)
    pairs = f"pairs=[{{path: {tmp_path}/pairs, held_out: 12}}]"
    fit = ["fit.steps=4", "fit.batch_size=5", "fit.sample_every=2", "fit.trackers=[tensorboard]"]
    words = [f"start={root}/flow", pairs, *fit, "fit.log_every=4"]
    run(reflow, f"run_dir={tmp_path}/reflow", *words)
    sheet = Image.open(tmp_path / "reflow/samples/step_00000004.png")
    tile = 7 * 8 + pictures.GAP
    assert sheet.size == (pictures.LABEL + 10 * tile, 4 * tile)
    data = PairData(tmp_path / "pairs")
    alone = preview.of_pairs(data, [], [torch.tensor([0.0, 1.0])])
    assert (alone.steps, alone.times, alone.held) == ([1], [0.0], None)
    assert torch.equal(alone.ends, data.batch(np.arange(10))["x1"])
    held = data.batch(np.arange(20, 32))
    wanted = ((held["x1"][0, 0] / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    shown = np.asarray(sheet.convert("RGB"))[3 * tile + 3 :: 7, pictures.LABEL + 3 :: 7, 0]
    assert np.abs(shown[:8, :8] - wanted).max() <= 1
    v = Velocity(networks.load(tmp_path / "reflow/net", "x"))
    cond = {"label": held["label"]}
    with torch.no_grad():
        errors = [
            v(path.interpolate(held["x0"], held["x1"], k / 8), k / 8, cond)
            - (held["x1"] - held["x0"])
            for k in range(8)
        ]
    assert losses(tmp_path / "reflow")[4] == pytest.approx(
        float(torch.stack(errors).square().mean()), rel=1e-4
    )

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "reflow/tensorboard"))
    events.Reload()
    assert [e.step for e in events.Images("samples")] == [2, 4]
    assert [e.step for e in events.Scalars("held_out_loss")] == [2, 4]

    drawn = reflow.plan(stage_config(tmp_path, *words)).stream(np.arange(200))  # of 20 pairs
    ends = {x.numpy().tobytes() for x in drawn["x1"]}
    assert len(ends) == 20
    assert not ends & {x.numpy().tobytes() for x in held["x1"]}
    with pytest.raises(UserError, match="held_out=32: the set has 32 pairs"):
        run(
            reflow,
            f"run_dir={tmp_path}/no",
            *words[:1],
            pairs.replace("held_out: 12", "held_out: 32"),
            *fit,
        )


def stage_config(tmp_path, *words):
    from flowmatch.runs import command

    return command.load(reflow.STAGE.config, [f"run_dir={tmp_path}/other", *words])[0]


def test_points_latents_and_other_shapes_are_drawn_or_told():
    points = pictures.draw({"1 step": np.zeros((3, 2)), "2 steps": np.ones((3, 2))})
    assert points.size == (2 * (pictures.PANEL + 4 * pictures.GAP), pictures.PANEL + 25)
    latents = pictures.visible(np.full((2, 4, 8, 8), 1.5))
    assert latents.shape == (2, 3, 8, 8)
    assert latents[0, 0, 0, 0] == 0.75
    wide = pictures.draw({"1 step": np.zeros((2, 1, 20, 1000))})
    assert wide.size[0] <= pictures.LABEL + 2 * (pictures.LARGEST + pictures.GAP)
    assert pictures.draw({"1 step": np.zeros((2, 3, 4, 8, 8))}) is None
    made = preview.of_noise((2, 16), None, 0)
    assert preview.lines(made, 5) == [
        "every 5 updates: no pictures (none are drawn of [2, 16]); no held-out loss"
    ]


def test_sharded_weights_are_on_no_process():
    config = FitConfig(steps=1, batch_size=2, shard=True, sample_every=1)
    with pytest.raises(UserError, match="fit.sample_every: one process draws"):
        check(config, "cpu", 2)
