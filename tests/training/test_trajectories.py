"""Objectives on trajectories in the stages: pairs with states to an export, resumed, on two ranks."""

import json
from pathlib import Path

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.flow import path
from flowmatch.models import networks, teachers
from flowmatch.models.velocity import Velocity
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import manifest
from flowmatch.training import loop
from pipelines import evaluate, export, generate_pairs, reflow
from tests import ranks, stages
from tests.pairset import make_teacher
from tests.stages import run

UNET = {"name": "UNet2DModel", **stages.UNET}
SMALL = ["fit.steps=6", "fit.batch_size=16", "fit.log_every=2", "fit.save_every=3", "fit.warmup=2"]
BOTH = pytest.mark.parametrize("name", ["segments", "cmt"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A flow on 8x8 images; pairs of it without states, with two windows, and with odd ones."""
    root = tmp_path_factory.mktemp("trajectories")
    make_teacher(root / "flow", None, (1, 8, 8), **UNET)
    few = ["shards=2", "shard_size=32", "block=16", "compute_batch=32", "solver.name=euler"]
    sets = {"plain": "[]", "pairs": "[0.5]", "odd": "[0.25]"}
    for name, states in sets.items():
        words = [f"run_dir={root}/{name}", f"teacher={root}/flow", f"states={states}"]
        run(generate_pairs, *words, *few, "solver.steps=4")
    return root


def words(base, folder, name, *more, pairs="pairs"):
    place = [f"run_dir={folder}", f"start={base}/flow", f"pairs=[{{path: {base}/{pairs}}}]"]
    return [*place, *SMALL, f"objective.name={name}", *more]


def weights(folder):
    return networks.load(Path(folder) / "net", "net").state_dict()


@BOTH
def test_the_loss_is_that_of_the_lines_and_a_resumed_run_is_the_same(
    base, tmp_path, name, monkeypatch
):
    seen = []

    def watched(*values, inner=loop.draw, **more):
        seen.append((values[-1], inner(*values, **more)))
        return seen[-1][1]

    monkeypatch.setattr(loop, "draw", watched)
    run(reflow, *words(base, tmp_path / "whole", name, "loss={name: mse}", "fit.log_every=1"))
    counters, first = seen[0]
    assert counters.tolist() == list(range(16))
    # the first batch again, from the set itself: which pairs they are is told by x1 of their lines
    batch = PairData(base / "pairs", states=True).batch(range(64))
    points = torch.stack([batch["x0"], batch["xt"][:, 0], batch["x1"]], 1)
    net = Velocity(networks.load(base / "flow/net", "x"))
    with torch.no_grad():
        error = net(path.interpolate(first.x0, first.x1, first.t), first.t) - (first.x1 - first.x0)
    logged = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert logged == pytest.approx(float(error.square().mean()), rel=1e-4)
    for i, t in enumerate(first.t.tolist()):
        k = int(t >= 0.5)
        x = points[:, k] + (t - 0.5 * k) / 0.5 * (points[:, k + 1] - points[:, k])
        v = (points[:, k + 1] - points[:, k]) / 0.5
        if name == "cmt" and t < 1:
            v = (points[:, 2] - x) / (1 - t)
        apart = (x + (1 - t) * v - first.x1[i]).flatten(1).abs().amax(1)
        pair = int(apart.argmin())
        assert apart[pair] < 1e-4
        assert (x[pair] - t * v[pair] - first.x0[i]).abs().max() < 1e-4

    monkeypatch.setattr(loop, "draw", loop.draw)
    stop = words(base, tmp_path / "again", name, "loss={name: mse}", "fit.log_every=1")
    with pytest.MonkeyPatch.context() as patch:
        update = loop.State.update

        def fail(self, *values):
            if self.step == 4:
                raise KeyboardInterrupt
            return update(self, *values)

        patch.setattr(loop.State, "update", fail)
        with pytest.raises(KeyboardInterrupt):
            run(reflow, *stop)
    run(reflow, *stop)
    for file in ("manifest.json", "net/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow
@BOTH
def test_two_ranks_and_bf16_train_the_network_of_one(base, tmp_path, name):
    def train(world, folder, *more):
        argv = [*words(base, tmp_path / folder, name, "fit.micro_batch=8", *more), "device=cpu"]
        started = ranks.start(world, argv, tmp_path / "log", "reflow")
        for rank in started:
            rank.join(120)
        assert [rank.exitcode for rank in started] == [0] * world, (tmp_path / "log").read_text()
        return weights(tmp_path / folder)

    start, one, two = weights(base / "flow"), train(1, "one"), train(2, "two")
    half = train(1, "half", "fit.precision=bf16")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(half[key], value, atol=1e-2, rtol=0)
    assert max((one[k] - start[k]).abs().max() for k in start) > 1e-3


def test_segments_are_known_by_their_steps_up_to_the_card(base, tmp_path, capsys):
    run(reflow, *words(base, tmp_path / "student", "segments"))
    assert "straight between states at t = 0, 0.5, 1: for 2 steps" in capsys.readouterr().out
    assert manifest.read(tmp_path / "student", "x")["facts"]["windows"] == 2
    assert teachers.load(tmp_path / "student", "x").windows == 2

    models = [f"teacher={base}/flow", f"student={tmp_path}/student", "data={source: digits}"]
    scored = ["samples=16", "converged_steps=1", "features=values", "steps=[1,2]"]
    run(evaluate, f"run_dir={tmp_path}/evaluate", *models, *scored)
    for file in ("table.md", "report.html"):
        said = (tmp_path / "evaluate" / file).read_text()
        assert "trained for 2 equal steps; rows with no multiple of them are not meaningful" in said

    place = [f"run_dir={tmp_path}/export", f"student={tmp_path}/student"]
    with pytest.raises(UserError, match=r"straight in each of 2 windows .* use steps=\[2\]"):
        run(export, *place, "steps=[1,2]")
    run(export, *place)
    card = (tmp_path / "export/README.md").read_text()
    assert "in 2 equal Euler steps, or a multiple" in card
    assert "num_inference_steps=2" in card
    assert 'subfolder="scheduler_2"' in card
    for wrong in ("num_inference_steps=1)", "any number of steps", "scheduler_1", "in one step"):
        assert wrong not in card
    assert teachers.load(tmp_path / "export", "x").windows == 2


def test_the_held_out_loss_is_that_of_the_lines(base, tmp_path):
    """Not of the lines from noise to data: a network that fits these is no better at its own."""
    more = ["fit.sample_every=6", "loss={name: mse}"]
    argv = [
        w for w in words(base, tmp_path / "student", "segments", *more) if not w.startswith("pairs")
    ]
    run(reflow, *argv, f"pairs=[{{path: {base}/pairs, held_out: 12}}]")
    line = json.loads((tmp_path / "student/held_out.jsonl").read_text().splitlines()[-1])
    held = PairData(base / "pairs", states=True).batch(range(52, 64))
    v = Velocity(networks.load(tmp_path / "student/net", "x"))
    points, total = torch.stack([held["x0"], held["xt"][:, 0], held["x1"]], 1), 0.0
    for t in (i / 8 for i in range(8)):
        k = int(t >= 0.5)
        slope = (points[:, k + 1] - points[:, k]) / 0.5
        with torch.no_grad():
            total += float((v(points[:, k] + (t - 0.5 * k) * slope, t) - slope).square().mean()) / 8
    assert line["held_out_loss"] == pytest.approx(total, rel=1e-4)


def test_what_does_not_fit_is_refused_in_a_line(base, tmp_path):
    with pytest.raises(UserError, match="has no states of the paths; make it with states="):
        run(reflow, *words(base, tmp_path / "no", "cmt", pairs="plain"))
    with pytest.raises(UserError, match=r"is for 2 equal steps .* make pairs with states=\[0.5\]"):
        run(reflow, *words(base, tmp_path / "no", "segments", pairs="odd"))
    with pytest.raises(
        UserError, match=r"for_steps=\[1, 2, 4\]: .* 2 windows, which one step do not"
    ):
        run(reflow, *words(base, tmp_path / "no", "segments", "for_steps=[1,2,4]"))
    with pytest.raises(UserError, match=r"for_steps=\[1\]: objective.name=cmt is for times along"):
        run(reflow, *words(base, tmp_path / "no", "cmt", "for_steps=[1]"))
    run(reflow, *words(base, tmp_path / "more", "segments", "for_steps=[4]", "fit.steps=1"))
    known = manifest.read(tmp_path / "more", "x")["facts"]
    assert known["for_steps"] == [4]
    assert "windows" not in known
    run(reflow, *words(base, tmp_path / "odd", "cmt", pairs="odd"))
    assert "windows" not in manifest.read(tmp_path / "odd", "x")["facts"]
