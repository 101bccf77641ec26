"""Own data through every stage: mixed pictures, rectangles, classes with names, counts from the data."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowmatch.config import UserError, validate
from flowmatch.pairs.config import PairsConfig
from flowmatch.runs import manifest
from flowmatch.runs.command import load
from pipelines import evaluate, export, generate_pairs, inspect_pairs, reflow, train_flow
from tests import stages
from tests.stages import UNET

CLASSES = ("cat", "dog")
FIT = ["fit.batch_size=8", "fit.log_every=1", "fit.warmup=0"]


def people(folder, n=24, side=16):
    """Write pictures of two classes as people have them: sizes, one clear, one cut off in each class."""
    rng = np.random.default_rng(0)
    for i in range(n):
        place = folder / CLASSES[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        shape = (*(side + rng.integers(0, 9, 2)), 4 if i in (2, 3) else 3)
        file = place / f"{i:02d}.png"
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file)
        if i in (4, 5):
            file.write_bytes(file.read_bytes()[:100])
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Classes with names and rectangles: flow, pairs, reflow, evaluation, export."""
    root = tmp_path_factory.mktemp("own")
    net = [f"net.{key}={json.dumps(value)}" for key, value in UNET.items()]
    data = f"{{source: images, path: {people(root / 'set')}, size: [12, 8], labels: true, "
    data += "background: white, bad: skip}"
    flow = [f"run_dir={root}/flow", "net.name=UNet2DModel", *net, *FIT]
    stages.run(train_flow, *flow, f"data={data}", "fit.epochs=1")
    pairs = [f"run_dir={root}/pairs", f"teacher={root}/flow", "shard_size=16", "compute_batch=16"]
    solver = "solver={name: euler, steps: 2}"
    stages.run(generate_pairs, *pairs, "per_image=1.6", solver)
    again = [f"run_dir={root}/reflow", f"start={root}/flow", f"pairs={root}/pairs", *FIT]
    stages.run(reflow, *again, "fit.epochs=0.5")
    both = [f"teacher={root}/flow", f"student={root}/reflow"]
    rows = ["steps=[1]", "converged_steps=2", "features=values", "per_image=1"]
    stages.run(evaluate, f"run_dir={root}/evaluate", *both, f"data={data}", *rows)
    last = [f"student={root}/reflow", f"evaluation={root}/evaluate", "steps=[1]"]
    stages.run(export, f"run_dir={root}/export", *last)
    return root


def facts(folder):
    return manifest.read(folder, "run")["facts"]


def test_counts_follow_from_the_data_and_are_content(root):
    """22 of 24 pictures are whole: 3 updates of 8; 2.2 shards of 16 pairs; 3 updates of 1.5 epochs."""
    assert facts(root / "flow")["samples"] == 22
    steps = [manifest.read(root / n, "run")["config"]["fit"]["steps"] for n in ("flow", "reflow")]
    assert steps == [3, 3]
    assert "epochs" not in manifest.read(root / "flow", "run")["config"]["fit"]
    assert facts(root / "pairs")["shards"] == 3
    metrics = json.loads((root / "evaluate" / "metrics.json").read_text())
    assert metrics["protocol"]["samples"] == 22
    config, _ = load(train_flow.FlowConfig, [str(root / "flow" / "config.yaml")])
    assert (config.fit.steps, config.fit.epochs) == (3, 1)
    assert train_flow.STAGE.finished(config)  # the command repeated, without opening the data
    asked = config.model_copy(update={"fit": config.fit.model_copy(update={"steps": 0})})
    assert train_flow.STAGE.finished(asked)
    with pytest.raises(
        UserError, match=r"fit.epochs=1 of 32 samples are 4 updates, and fit.steps=3"
    ):
        config.fit.over(32)


def test_what_is_skipped_is_listed_beside_the_run(root):
    listed = (root / "flow" / "skipped.txt").read_text().splitlines()
    assert [line.split(")")[0][-6:] for line in listed] == ["04.png", "05.png"]


def test_names_of_classes_travel_to_the_export(root):
    names = {"0": "cat", "1": "dog"}
    for stage in ("flow", "pairs", "reflow", "export"):
        assert facts(root / stage)["id2label"] == names
    assert "(class label, int64: 0 cat, 1 dog)" in (root / "pairs" / "README.md").read_text()
    protocol = json.loads((root / "evaluate" / "metrics.json").read_text())["protocol"]
    assert protocol["classes"] == names
    assert "<dt>classes, 1</dt><dd>dog</dd>" in (root / "evaluate" / "report.html").read_text()
    assert "Classes: 0 `cat`, 1 `dog`." in (root / "export" / "README.md").read_text()
    assert json.loads((root / "export" / "model_index.json").read_text())["id2label"] == names


def test_the_export_takes_names_and_draws_rectangles(root):
    from diffusers import DiffusionPipeline

    ours = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    pipe = DiffusionPipeline.from_pretrained(root / "export", **ours)
    pipe.set_progress_bar_config(disable=True)

    def draw(labels):
        noise = torch.Generator().manual_seed(0)
        more = {"batch_size": 2, "num_inference_steps": 1, "output_type": "pt"}
        return pipe(class_labels=labels, generator=noise, **more).images

    named = draw(["dog", "cat"])
    assert named.shape == (2, 3, 12, 8)
    assert torch.equal(named, draw([1, 0]))
    assert torch.equal(draw("dog"), draw(1))
    assert not torch.equal(draw("dog"), draw("cat"))
    assert pipe(num_inference_steps=1, class_labels="cat").images[0].size == (8, 12)
    with pytest.raises(ValueError, match=r"\['bird'\]: expected names of cat, dog"):
        draw(["bird", "cat"])


def test_inspection_names_the_classes(root, capsys):
    assert inspect_pairs.main([f"{root}/pairs", "--out", f"{root}/seen"]) == 0
    assert "labels: cat: " in capsys.readouterr().out


def test_classes_of_other_names_are_refused(root, tmp_path):
    other = people(tmp_path / "set")
    (other / "dog").rename(other / "wolf")
    data = "{source: images, path: PATH, size: [12, 8], labels: true, background: white, bad: skip}"
    both = [f"teacher={root}/flow", f"student={root}/reflow", f"run_dir={tmp_path}/e"]
    ours, theirs = data.replace("PATH", f"{root}/set"), data.replace("PATH", str(other))
    more = ["features=values", f"data={ours}", f"reference={theirs}"]
    with pytest.raises(UserError, match="have other names: data cat, dog; reference cat, wolf"):
        stages.run(evaluate, *both, *more)


def test_per_image_needs_a_teacher_that_knows_its_data():
    config = validate(PairsConfig, {"run_dir": "a", "teacher": "hub/x", "per_image": 2})
    with pytest.raises(
        UserError, match="does not say how many samples it was trained on; set shards"
    ):
        config.over(None)
    assert config.over(16384).shards == 2
    with pytest.raises(UserError, match="expected 1 or more; set shards, or per_image"):
        validate(PairsConfig, {"run_dir": "a", "teacher": "b"})
