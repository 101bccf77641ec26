"""The levers of few-step quality as options of the stages, on small networks, in this process."""

import hashlib
import json

import pytest
import torch

from flowmatch.config import UserError
from flowmatch.evaluation import features
from flowmatch.evaluation.sampling import Sampler
from flowmatch.flow import path
from flowmatch.models import networks, teachers
from flowmatch.models.digest import module_digest
from flowmatch.models.velocity import Velocity
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import manifest
from flowmatch.training import loop
from pipelines import evaluate, export, generate_pairs, reflow, train_classifier, train_flow
from tests import stages
from tests.pairset import make_teacher
from tests.stages import run

UNET = {"name": "UNet2DModel", **stages.UNET}
SMALL = ["fit.steps=6", "fit.batch_size=16", "fit.log_every=2", "fit.save_every=3", "fit.warmup=2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A flow on 8x8 images, 64 pairs of it, and two classifiers of the digits."""
    root = tmp_path_factory.mktemp("levers")
    make_teacher(root / "flow", None, (1, 8, 8), **UNET)
    few = ["shards=1", "shard_size=64", "block=16", "compute_batch=32", "solver.steps=2"]
    run(generate_pairs, f"run_dir={root}/pairs", f"teacher={root}/flow", *few)
    for seed in (0, 1):
        words = ["data.source=digits", "data.labels=true", "steps=5", f"seed={seed}"]
        run(train_classifier, f"run_dir={root}/classifier_{seed}", *words)
    return root


RANDOM = "loss.features=random"


def reflow_words(base, folder, *more):
    place = [f"run_dir={folder}", f"start={base}/flow", f"pairs=[{{path: {base}/pairs}}]"]
    return [*place, *SMALL, *more]


def facts(folder):
    return manifest.read(folder, "x")["facts"]


def test_reflow_learns_by_a_feature_loss_that_never_scores_it(base, tmp_path, monkeypatch):
    loss = f"loss={{name: feature, c: 0.5, features: {base}/classifier_0}}"
    run(reflow, *reflow_words(base, tmp_path / "reflow", loss))
    seal = manifest.read(tmp_path / "reflow", "student")
    assert seal["inputs"]["features"] == manifest.digest(base / "classifier_0")
    assert seal["facts"]["features"] == [facts(base / "classifier_0")["sha256"]]
    again = [f"start={tmp_path}/reflow", "fit.steps=1"]  # what it has looked through stays known
    run(reflow, *reflow_words(base, tmp_path / "again", *again))
    assert facts(tmp_path / "again")["features"] == seal["facts"]["features"]
    assert "features" not in seal["config"]["loss"]  # its path is no content
    assert "features" not in facts(base / "flow")
    assert "features" not in facts(base / "pairs")

    # through the student's own pairs, too, from a start that has looked at nothing
    few = ["shards=1", "shard_size=32", "block=16", "compute_batch=32", "solver.steps=1"]
    words = [f"run_dir={tmp_path}/pairs", f"teacher={tmp_path}/reflow", *few]
    run(generate_pairs, *words)
    assert facts(tmp_path / "pairs")["features"] == seal["facts"]["features"]
    both = f"pairs=[{{path: {base}/pairs}}, {{path: {tmp_path}/pairs}}]"
    run(reflow, *reflow_words(base, tmp_path / "second", both, "fit.steps=1"))
    assert facts(tmp_path / "second")["features"] == seal["facts"]["features"]

    # the loss that was logged is the formula's: at the start weights, on the first batch
    lines = (tmp_path / "reflow/metrics.jsonl").read_text().splitlines()
    classifier, _ = features.load(str(base / "classifier_0"), "x", (1, 8, 8))
    batch = PairData(base / "pairs").batch(range(64))
    x0, x1, net = batch["x0"], batch["x1"], networks.load(base / "flow/net", "x")
    with torch.no_grad():
        t = torch.zeros(64)
        found = path.data_prediction(x0, Velocity(net)(x0, t), t)
        seen = features.Perceptual(classifier)
        error = ((seen(found) - seen(x1)).square().sum(1) + 0.25).sqrt() - 0.5
    first = json.loads(lines[0])["loss"]
    assert error.mean() * 0.3 < first < error.mean() * 1.5  # half of it is at t = 0, as here

    scored = ["data={source: digits}", "samples=16", "steps=[1]", "converged_steps=1"]
    words = [f"teacher={base}/flow", f"student={tmp_path}/reflow", *scored]
    own = f"classifier={base}/classifier_0"
    with pytest.raises(UserError, match="student was trained with a loss on the same class"):
        run(evaluate, f"run_dir={tmp_path}/no", *words, own)
    run(evaluate, f"run_dir={tmp_path}/evaluate", *words, f"classifier={base}/classifier_1")

    # one that the evaluation trains is found out before any sample is made
    taught = (features.load(f"{base}/classifier_0", "x", (1, 8, 8))[0], 0.9)
    monkeypatch.setattr(features, "train_classifier", lambda *given: taught)
    monkeypatch.setattr(Sampler, "rows", None)
    with pytest.raises(UserError, match="student was trained with a loss on the same class"):
        run(evaluate, f"run_dir={tmp_path}/no", *words, "data.labels=true")


def test_a_feature_loss_is_refused_where_it_means_nothing(base, tmp_path):
    loss = f"loss={{name: feature, features: {base}/classifier_0}}"
    net = f"net={json.dumps(UNET)}"
    with pytest.raises(UserError, match="needs noise/sample pairs"):
        run(train_flow, f"run_dir={tmp_path}/no", "data.source=digits", net, loss, *SMALL)
    loss = f"loss={{name: feature, features: {base}/flow}}"
    with pytest.raises(UserError, match=r"loss.features=.* holds the result of train_flow"):
        run(reflow, *reflow_words(base, tmp_path / "no", loss))
    for name, fault in {
        "no": "run the stage that makes it first",
        "no.pt2": "no such file",
    }.items():
        loss = f"loss={{name: feature, features: {base}/{name}}}"
        with pytest.raises(UserError, match=rf"loss.features=\S+/{name}\b.* {fault}"):
            run(reflow, *reflow_words(base, tmp_path / "no", loss), "start=later")


class Cut(torch.nn.Module):
    def forward(self, x):
        return x.detach().abs()


def save(net, file, channels=1, batch=None):
    sizes = {0: torch.export.Dim.STATIC if batch else torch.export.Dim("batch")}
    x = torch.zeros(batch or 2, channels, 8, 8)
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=(sizes,)), file)


def exported(file, channels=1, batch=None):
    """A module as a user gives it: a convolution, squashed."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(channels, 4, 3, stride=2), torch.nn.Tanh())
    save(net, file, channels, batch)
    return net


def test_a_feature_loss_looks_through_a_module_that_is_given(base, tmp_path):
    net = exported(tmp_path / "eyes.pt2")
    loss = f"loss={{name: feature, features: {tmp_path}/eyes.pt2}}"
    run(reflow, *reflow_words(base, tmp_path / "reflow", loss, "fit.steps=2", "fit.micro_batch=8"))
    seal = manifest.read(tmp_path / "reflow", "x")
    digest = hashlib.sha256((tmp_path / "eyes.pt2").read_bytes()).hexdigest()
    assert seal["inputs"]["features"] == digest
    assert seal["facts"]["features"] == [digest]
    run(reflow, *reflow_words(base, tmp_path / "random", loss, "fit.steps=2"), RANDOM, "seed=5")
    digest = module_digest(features.random_features((1, 8, 8), 5))
    assert manifest.read(tmp_path / "random", "x")["inputs"]["features"] == digest
    assert facts(tmp_path / "random")["features"] == [digest]

    module, _, _ = features.perceptual(f"{tmp_path}/eyes.pt2", "x", 4, (1, 8, 8), "cpu")
    assert not any(p.requires_grad for p in module.parameters())
    x = torch.randn(5, 1, 8, 8, requires_grad=True)
    wanted = torch.cat([x.flatten(1), net(x).flatten(1)], dim=1)
    torch.testing.assert_close(module(x), wanted)
    found = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), x))

    for file in ("no.pt2", "weights.pth"):
        (tmp_path / file).write_bytes(b"nothing")
    exported(tmp_path / "colour.pt2", channels=3)
    exported(tmp_path / "fixed.pt2", batch=2)
    save(Cut(), tmp_path / "cut.pt2")
    save(torch.nn.Flatten(0, 1), tmp_path / "flat.pt2", channels=3)
    faults = dict.fromkeys(
        ("no.pt2", "weights.pth", "colour.pt2", "fixed.pt2"), ": cannot load this file as a module"
    )
    faults |= {"cut.pt2": " returns 4 rows for a batch of 4, without a gradient"}
    for name, fault in faults.items():
        with pytest.raises(UserError, match=rf"loss.features=\S+/{name}{fault}"):
            features.perceptual(f"{tmp_path}/{name}", "loss.features", 4, (1, 8, 8), "cpu")
    with pytest.raises(UserError, match="returns 12 rows for a batch of 4, with a gradient"):
        features.perceptual(f"{tmp_path}/flat.pt2", "loss.features", 4, (3, 8, 8), "cpu")
    features.perceptual(f"{tmp_path}/eyes.pt2", "x", 10**9, (1, 8, 8), "cpu")  # planned, not run


SCORED = ["data={source: digits}", "samples=16", "converged_steps=1", "features=values"]


def test_a_one_step_student_is_known_as_one_everywhere(base, tmp_path, capsys):
    run(reflow, *reflow_words(base, tmp_path / "reflow"))
    start = f"start={tmp_path}/reflow"
    run(reflow, *reflow_words(base, tmp_path / "distil", start, "times={zero: 1.0}"))
    assert "for one step only, at their times" in capsys.readouterr().out
    assert facts(tmp_path / "distil")["for_steps"] == [1]
    assert "for_steps" not in facts(tmp_path / "reflow")

    for stage, key in ((generate_pairs, "teacher"), (evaluate, "teacher")):
        words = [f"run_dir={tmp_path}/no", f"{key}={tmp_path}/distil"]
        words += ["shards=1"] if stage is generate_pairs else [f"student={base}/flow", *SCORED]
        with pytest.raises(UserError, match=r"teacher= is for one step only: .*no flow to follow"):
            run(stage, *words)

    models = [f"teacher={base}/flow", f"student={tmp_path}/distil"]
    run(evaluate, f"run_dir={tmp_path}/evaluate", *models, *SCORED, "steps=[1,2]")
    result = json.loads((tmp_path / "evaluate/metrics.json").read_text())
    assert result["student"]["for_steps"] == [1]
    said = "trained for one step only; its rows with more steps are not meaningful"
    for name in ("table.md", "report.html"):
        assert said in (tmp_path / "evaluate" / name).read_text()

    student = [f"student={tmp_path}/distil", f"evaluation={tmp_path}/evaluate"]
    with pytest.raises(UserError, match="the student is for one step only; use steps="):
        run(export, f"run_dir={tmp_path}/export", *student, "steps=[1,2]")
    run(export, f"run_dir={tmp_path}/export", *student)
    index = json.loads((tmp_path / "export/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]  # exact for one
    card = (tmp_path / "export/README.md").read_text()
    assert "in exactly one Euler step" in card
    assert "any number of steps, with the small error" not in card
    assert said in card


def test_a_student_for_some_steps_learns_at_their_times_alone(base, tmp_path, monkeypatch, capsys):
    """And says so: in its manifest, its evaluation and its export, whose schedulers are these grids."""
    seen = []

    def watched(*values, inner=loop.draw, **more):
        seen.append(inner(*values, **more))
        return seen[-1]

    monkeypatch.setattr(loop, "draw", watched)
    pairs = f"pairs=[{{path: {base}/pairs, held_out: 8}}]"
    words = ["for_steps=[2,4]", "fit.sample_every=6", pairs]
    run(reflow, *reflow_words(base, tmp_path / "reflow", *words))
    assert "for 2 and 4 steps only, at their times" in capsys.readouterr().out
    times = torch.cat([drawn.t for drawn in seen])
    assert set(times.tolist()) == {0.0, 0.25, 0.5, 0.75}
    assert facts(tmp_path / "reflow")["for_steps"] == [2, 4]
    assert teachers.load(tmp_path / "reflow", "x").for_steps == (2, 4)
    held = PairData(base / "pairs").batch(range(56, 64))
    v, total = Velocity(networks.load(tmp_path / "reflow/net", "x")), 0.0
    for t in (0, 0.25, 0.5, 0.75):
        with torch.no_grad():
            found = v(path.interpolate(held["x0"], held["x1"], t), t)
        total += float((found - (held["x1"] - held["x0"])).square().mean()) / 4
    line = json.loads((tmp_path / "reflow/held_out.jsonl").read_text())
    assert line["held_out_loss"] == pytest.approx(total, rel=1e-4)

    for bad, fault in {
        "[3,2]": "expected rising numbers",
        "[0]": "expected rising numbers",
    }.items():
        with pytest.raises(UserError, match=fault):
            run(reflow, *reflow_words(base, tmp_path / "no", f"for_steps={bad}"))
    with pytest.raises(UserError, match=r"for_steps=\[1\]: sets the times; leave times out, or at"):
        run(reflow, *reflow_words(base, tmp_path / "no", "for_steps=[1]", "times.name=uniform"))
    with pytest.raises(UserError, match="teacher= is for 2 and 4 steps only: .*no flow to follow"):
        run(generate_pairs, f"run_dir={tmp_path}/no", f"teacher={tmp_path}/reflow", "shards=1")
    models = [f"teacher={base}/flow", f"student={tmp_path}/reflow"]
    run(evaluate, f"run_dir={tmp_path}/evaluate", *models, *SCORED, "steps=[1,2]")
    said = "The student was trained for 2 and 4 steps only; its other rows are not meaningful."
    for name in ("table.md", "report.html"):
        assert said in (tmp_path / "evaluate" / name).read_text()
    student = f"student={tmp_path}/reflow"
    with pytest.raises(
        UserError, match=r"the student is for 2 and 4 steps only; use steps=\[2, 4\]"
    ):
        run(export, f"run_dir={tmp_path}/no", student, "steps=[1,2]")
    run(export, f"run_dir={tmp_path}/export", student)
    made = sorted(folder.name for folder in (tmp_path / "export").glob("scheduler*"))
    assert made == ["scheduler", "scheduler_2", "scheduler_4", "scheduler_flowmatch"]
    card = (tmp_path / "export/README.md").read_text()
    for told in ("in 2 and 4 steps, equal", "takes 2 and 4 steps, with", "num_inference_steps=2"):
        assert told in card
    for wrong in ("any number of steps", "num_inference_steps=1)", "scheduler_1", "in one step"):
        assert wrong not in card
    assert teachers.load(tmp_path / "export", "x").for_steps == (2, 4)


def test_stage_one_refuses_the_time_of_distillation(tmp_path):
    words = [f"run_dir={tmp_path}/no", "data.source=digits", f"net={json.dumps(UNET)}", *SMALL]
    with pytest.raises(UserError, match="times.zero=1 needs noise/sample pairs"):
        run(train_flow, *words, "times.zero=1.0")


def test_a_second_width_is_named_by_its_folder(base, tmp_path):
    run(reflow, *reflow_words(base, tmp_path / "reflow", "fit.ema=[0.05, 0.2]"))
    first, second = (
        teachers.load(tmp_path / "reflow" / name, "student") for name in ("net", "net_2")
    )
    assert first.digest == teachers.load(tmp_path / "reflow", "student").digest != second.digest
    assert first.round == second.round == 1
    models = [f"teacher={base}/flow", f"student={tmp_path}/reflow/net_2"]
    run(evaluate, f"run_dir={tmp_path}/evaluate", *models, *SCORED, "steps=[1]")
    inputs = manifest.read(tmp_path / "evaluate", "x")["inputs"]
    assert inputs["student"] == second.digest
    assert "Config of the student" in (tmp_path / "evaluate/report.html").read_text()
    with pytest.raises(UserError, match=r"fit.ema: width 0.4; expected more than 0, at most 0.289"):
        run(reflow, *reflow_words(base, tmp_path / "no", "fit.ema=[0.4]"))
