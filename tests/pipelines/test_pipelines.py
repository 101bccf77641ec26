"""Stages in this process, on small networks of every kind: labels, guidance, and what is exported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowmatch.config import UserError
from flowmatch.data.config import DataConfig
from flowmatch.data.dataset import load as load_data
from flowmatch.data.dataset import reference
from flowmatch.evaluation import features, metrics
from flowmatch.export import model_card, network_folder
from flowmatch.export.provenance import Origin
from flowmatch.flow import grids, noise, solvers
from flowmatch.models import networks, teachers
from flowmatch.models.config import NetConfig
from flowmatch.models.digest import network_digest
from flowmatch.models.velocity import Velocity
from flowmatch.pairs import generator
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import manifest
from flowmatch.runs.command import execute, load
from pipelines import evaluate, export, generate_pairs, reflow, train_classifier, train_flow
from tests.stages import UNET, run

ROOT = Path(__file__).parents[2]
DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
DIT |= {"norm_num_groups": 4}


def trained(folder, name, arguments, shape, classes, round_=1):
    """A sealed training folder with a network whose weights are not near zero."""
    net = networks.build(NetConfig(name=name, **arguments), shape, classes, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    files = networks.save(net, folder / "net")
    facts = {"round": round_, "net": network_digest(net)}
    outputs = [f"net/{file}" for file in files]
    manifest.seal(folder, stage="reflow", config={}, inputs={}, outputs=outputs, **facts)
    return net.eval()


KINDS = {
    "unet": ("UNet2DModel", UNET, (1, 8, 8), None, "DDPMPipeline"),
    "unet-labels": ("UNet2DModel", UNET, (3, 8, 8), 4, "ConsistencyModelPipeline"),
    "dit": ("DiTTransformer2DModel", DIT, (3, 8, 8), 4, "ReflowPipeline"),
    "mlp-labels": ("VelocityMLP", {"hidden": 16}, (2,), 3, "ReflowPipeline"),
}


@pytest.mark.parametrize(
    "kind", ["unet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:])]
)
def test_every_kind_of_network_is_exported_and_checked(fresh_process, tmp_path, kind, capsys):
    name, arguments, shape, classes, pipeline = KINDS[kind]
    trained(tmp_path / "reflow", name, arguments, shape, classes)
    run(export, f"run_dir={tmp_path}/export", f"student={tmp_path}/reflow", "steps=[1,2]")
    folder = tmp_path / "export"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == pipeline
    if pipeline != "ReflowPipeline":
        assert {value[0] for value in index.values() if isinstance(value, list)} == {"diffusers"}
    scheduler = json.loads((folder / "scheduler_flowmatch/scheduler_config.json").read_text())
    assert scheduler["reflow_round"] == 1
    text = (folder / "README.md").read_text()
    assert "| 1 | " in text
    assert "{" not in text.split("```python")[0]
    for file in folder.rglob("*.json"):
        assert file.name == "config.yaml" or str(tmp_path) not in file.read_text()
    # the lines that the stage prints, as a user would run them, without the package
    snippet = capsys.readouterr().out.split("\n\n")[-1]
    code = f"import sys; sys.modules['flowmatch'] = None\n{snippet}\nprint('sampled')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("sampled"), done.stderr


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_card_promises_no_more_steps_than_the_student_has(kind, one_step):
    name, arguments, shape, classes, pipeline = KINDS[kind]
    net = networks.build(NetConfig(name=name, **arguments), shape, classes, 0)
    student = teachers.Teacher(net, "d" * 64, 1, for_steps=(1,) * one_step)
    chosen = model_card.kind_of(student)
    assert chosen.name == pipeline
    text = model_card.text(student, chosen, "", {1: {"exact": 0.0}}, Origin())
    assert "{" not in text
    promises = ("any number of steps", "for N steps", "few-step", "one to four", "Heun")
    made = [promise for promise in promises if promise in text]
    assert made == [] if one_step else "any number of steps" in made
    assert ("always pass `num_inference_steps=1`" in text.replace("Always", "always")) == one_step


def test_weights_of_half_precision_are_rounded_before_they_are_checked(tmp_path):
    net = trained(tmp_path / "reflow", "UNet2DModel", UNET, (1, 8, 8), None)
    place = [f"run_dir={tmp_path}/export", f"student={tmp_path}/reflow", "steps=[1]"]
    run(export, *place, "dtype=float16")
    stored = load_file(tmp_path / "export/unet/diffusion_pytorch_model.safetensors")
    own = net.state_dict()
    assert all(torch.equal(value, own[name].half()) for name, value in stored.items())
    assert set(stored) == set(own)


def test_an_export_that_differs_is_not_sealed(tmp_path, monkeypatch):
    trained(tmp_path / "reflow", "UNet2DModel", UNET, (1, 8, 8), None)
    honest = network_folder.own_samples
    monkeypatch.setattr(
        network_folder, "own_samples", lambda student, *words: honest(student, *words) + 1e-3
    )
    with pytest.raises(UserError, match="differs from our solver by 0.001"):
        run(export, f"run_dir={tmp_path}/export", f"student={tmp_path}/reflow", "steps=[1]")
    assert not manifest.sealed(tmp_path / "export")


def test_an_evaluation_of_another_student_is_refused(tmp_path):
    trained(tmp_path / "reflow", "UNet2DModel", UNET, (1, 8, 8), None)
    other = {"student": "somebody else"}
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "table.md").write_text("")
    manifest.seal(tmp_path / "evaluate", stage="evaluate", config={}, inputs=other, outputs=[])
    with pytest.raises(UserError, match="scored another student"):
        run(
            export,
            f"run_dir={tmp_path}/export",
            f"student={tmp_path}/reflow",
            f"evaluation={tmp_path}/evaluate",
        )


def generate(folder, *words):
    run(
        generate_pairs,
        f"run_dir={folder}/pairs",
        f"teacher={folder}/flow",
        *("shards=2", "shard_size=20", "block=8", "compute_batch=8", *words),
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_a_compiled_teacher_makes_the_same_pairs_by_one_graph(tmp_path):
    name, arguments, shape, classes, _ = KINDS["unet-labels"]
    found = []
    for number, compiled in enumerate((False, True)):
        root = tmp_path / str(number)
        trained(root / "flow", name, arguments, shape, classes, round_=0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        words = ("guidance=2.0", "solver.steps=3", "dtype=float32")
        generate(root, *words, f"compile={compiled}")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(compiled)
        found.append(PairData(root / "pairs").batch(np.arange(40)))
    assert torch.equal(found[0]["x0"], found[1]["x0"])
    torch.testing.assert_close(found[0]["x1"], found[1]["x1"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["unet", "unet-labels", "mlp-labels"])
def test_a_dry_run_measures_batches_and_writes_nothing(tmp_path, kind, capsys):
    name, arguments, shape, classes, _ = KINDS[kind]
    trained(tmp_path / "flow", name, arguments, shape, classes, round_=0)
    config, _ = load(
        generate_pairs.PairsConfig,
        [f"run_dir={tmp_path}/pairs", f"teacher={tmp_path}/flow", "shards=1", "device=cpu"],
    )
    execute(generate_pairs.STAGE, config, True)
    assert "generate_pairs: compute_batch: up to " in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["flow"]


def test_the_batch_that_does_not_fit_is_named():
    class Narrow(Velocity):
        def __call__(self, x, t, cond=None, r=None):
            tried.append(len(x))
            if len(x) > 10:
                raise torch.OutOfMemoryError
            return x

    tried = []
    velocity = Narrow(networks.build(NetConfig(name="VelocityMLP"), (2,), None, 0))
    line = generator.measure_batch(velocity, (2,), "cpu", "fp32", seconds=60)
    assert "compute_batch: up to 8 fit (16 do not); fastest a sample " in line
    assert tried == [1, 1, 2, 2, 4, 4, 8, 8, 16]


@pytest.mark.parametrize("kind", ["unet-labels", "dit"])
def test_labels_and_guidance_travel_with_the_pairs(tmp_path, kind):
    name, arguments, shape, classes, _ = KINDS[kind]
    net = trained(tmp_path / "flow", name, arguments, shape, classes, round_=0)
    values = ("solver.steps=2", "solver.name=euler", "dtype=float32", "seed=4")
    generate(tmp_path, "guidance=2.5", *values)
    data = PairData(tmp_path / "pairs")
    ids = np.arange(len(data))
    batch = data.batch(ids)
    label = torch.from_numpy(noise.labels(4, ids, classes))
    assert torch.equal(batch["label"], label)
    assert len(label.unique()) == classes
    plain = Velocity(net)

    def guided(x, t):
        null = plain(x, t)
        return null + 2.5 * (plain(x, t, {"label": label}) - null)

    with torch.no_grad():
        x1 = solvers.integrate(guided, batch["x0"], grids.uniform_grid(2))
    torch.testing.assert_close(batch["x1"], x1, atol=1e-4, rtol=1e-3)
    facts = manifest.read(tmp_path / "pairs", "pairs")["facts"]
    assert (facts["evaluations"], facts["classes"], facts["round"]) == (4, classes, 0)


def test_a_class_conditional_chain_on_real_digits(tmp_path, monkeypatch):
    """Labels from the data to the pairs to the student; the student refuses pairs without them."""
    small = ["fit.steps=8", "fit.batch_size=16", "fit.log_every=4", "fit.warmup=2"]
    data = ["data.source=digits", "data.labels=true"]
    network = [f"net={json.dumps({'name': 'UNet2DModel', **UNET})}"]
    run(train_flow, f"run_dir={tmp_path}/flow", *data, *network, *small)
    few = ["shards=1", "shard_size=64", "block=16", "compute_batch=32", "solver.steps=2"]
    run(generate_pairs, f"run_dir={tmp_path}/pairs", f"teacher={tmp_path}/flow", *few)
    entry = f"pairs=[{{path: {tmp_path}/pairs}}]"
    run(reflow, f"run_dir={tmp_path}/reflow", f"start={tmp_path}/flow", entry, *small)
    streams, honest = [], noise.normal

    def recorded(seed, ids, shape, stream):
        streams.append(stream)
        return honest(seed, ids, shape, stream)

    monkeypatch.setattr(noise, "normal", recorded)
    run(
        evaluate,
        f"run_dir={tmp_path}/evaluate",
        f"teacher={tmp_path}/flow",
        f"student={tmp_path}/reflow",
        *(*data, "samples=64", "steps=[1]", "converged_steps=1", "guidance=1.5"),
        "features=values",
    )
    rows = json.loads((tmp_path / "evaluate/metrics.json").read_text())["student"]["rows"]
    assert [row["evaluations"] for row in rows] == [2, 4]  # guidance counts two
    assert set(streams) == {noise.EVALUATION}  # a student is never scored on the noise of its pairs
    run(train_flow, f"run_dir={tmp_path}/plain", "data.source=digits", *network, *small)
    with pytest.raises(UserError, match="has 10 classes; the network at start= takes none"):
        run(reflow, f"run_dir={tmp_path}/no", f"start={tmp_path}/plain", entry, *small)


def test_an_evaluation_with_a_reference_and_a_classifier_of_its_own(tmp_path):
    """Images on disk: 30 of training, 20 others; the classifier's digest is an input."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 30), ("test", 20)):
        x = rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", x=x, y=np.arange(n) % 3)
    source = f"source: npz, path: {tmp_path}"
    train, test = f"{{{source}/train.npz}}", f"{{{source}/test.npz}}"
    labelled = f"data={{{source}/train.npz, labels: true}}"
    words = [f"run_dir={tmp_path}/classifier", labelled, "steps=3", "batch_size=8", "device=cpu"]
    execute(train_classifier.STAGE, load(train_classifier.ClassifierConfig, words)[0], False)
    trained(tmp_path / "flow", "UNet2DModel", UNET, (1, 8, 8), None, round_=0)
    trained(tmp_path / "reflow", "UNet2DModel", UNET, (1, 8, 8), None)
    words = [f"teacher={tmp_path}/flow", f"student={tmp_path}/reflow", f"data={train}"]
    words += ["samples=16", "steps=[1]", "converged_steps=1", f"reference={test}"]
    classifier = f"classifier={tmp_path}/classifier"
    run(evaluate, f"run_dir={tmp_path}/evaluate", *words, classifier)
    seal = manifest.read(tmp_path / "evaluate", "evaluation")
    assert set(seal["inputs"]) == {"data", "reference", "teacher", "student", "classifier"}
    assert seal["inputs"]["classifier"] == manifest.digest(tmp_path / "classifier")
    result = json.loads((tmp_path / "evaluate/metrics.json").read_text())
    protocol = result["protocol"]
    assert protocol["training_samples"] == 30
    assert protocol["reference"] == seal["inputs"]["reference"] != protocol["data"]
    facts = manifest.read(tmp_path / "classifier", "classifier")["facts"]
    assert protocol["features"]["sha256"] == facts["sha256"]
    assert protocol["features"]["held_out_accuracy"] == facts["accuracy"]
    net, _ = features.load(tmp_path / "classifier", "classifier", (1, 8, 8))
    sets = [
        load_data(DataConfig(source="npz", path=f"{tmp_path}/{n}.npz")) for n in ("test", "train")
    ]
    seen = features.embed(sets[1].batch(np.arange(30))["x1"], net)
    chosen = features.embed(reference(sets[0], 16, 0)["x1"], net)
    assert result["floor"]["nearest"] == pytest.approx(metrics.nearest(chosen, seen))
    for row in (*result["teacher"]["rows"], *result["student"]["rows"]):
        assert {"distance", "kernel", "precision", "recall", "nearest"} < set(row)
    table = (tmp_path / "evaluate/table.md").read_text()
    assert "| real against real | " in table
    assert "that no model has seen" in (tmp_path / "evaluate/report.html").read_text()
    for more, fault in (
        (["features=values", classifier], "has no effect with features='values'"),
        ([], "needs data.labels=true, or classifier="),
        ([classifier, "samples=11"], "11 samples: images are scored on 12 or more"),
    ):
        with pytest.raises(UserError, match=fault):
            run(evaluate, f"run_dir={tmp_path}/no", *words, *more)


def test_reflow_refuses_pairs_of_another_number_of_classes(tmp_path):
    for name, classes in (("flow", 4), ("fewer", 3), ("more", 5)):
        trained(tmp_path / name, "VelocityMLP", {"hidden": 8}, (2,), classes, round_=0)
    generate(tmp_path, "solver.steps=1")
    words = [f"pairs=[{{path: {tmp_path}/pairs}}]", "fit.steps=1", "fit.batch_size=4"]
    for name, classes in (("fewer", 3), ("more", 5)):
        expected = f"has 4 classes; the network at start= takes {classes}"
        with pytest.raises(UserError, match=expected):
            run(reflow, f"run_dir={tmp_path}/no", f"start={tmp_path}/{name}", *words)
    assert not (tmp_path / "no").exists()


def test_several_sets_of_pairs_mix_by_weight(tmp_path):
    net = {"name": "VelocityMLP", "hidden": 8}
    small = ["fit.steps=3", "fit.batch_size=10", "fit.log_every=1"]
    run(
        train_flow,
        f"run_dir={tmp_path}/flow",
        *("data.source=ring", "data.samples=50", f"net={json.dumps(net)}", *small),
    )
    for number in (0, 1):
        run(
            generate_pairs,
            f"run_dir={tmp_path}/pairs{number}",
            f"teacher={tmp_path}/flow",
            *("shards=1", "shard_size=40", "compute_batch=40", "solver.steps=1", f"seed={number}"),
        )
    sets = [{"path": f"{tmp_path}/pairs0", "weight": 4}, {"path": f"{tmp_path}/pairs1"}]
    words = [f"start={tmp_path}/flow", f"pairs={json.dumps(sets)}", *small]
    run(reflow, f"run_dir={tmp_path}/reflow", *words)
    seal = manifest.read(tmp_path / "reflow", "student")
    assert [entry["weight"] for entry in seal["config"]["pairs"]] == [4.0, 1.0]
    assert set(seal["inputs"]) == {"start", "pairs.0", "pairs.1"}
    sets[1]["weight"] = 0.01
    words = [f"start={tmp_path}/flow", f"pairs={json.dumps(sets)}", *small]
    with pytest.raises(UserError, match="less than one pair in a batch of 10"):
        run(reflow, f"run_dir={tmp_path}/no", *words)
