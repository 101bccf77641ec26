"""The experiments that need a GPU, planned on stand-ins of the right shape: every stage, every key."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowmatch.evaluation import features
from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.models.digest import network_digest
from flowmatch.pairs import shards
from flowmatch.runs import manifest
from flowmatch.runs.command import execute, load
from pipelines import evaluate, export, generate_pairs, reflow, train_flow

ROOT = Path(__file__).parent.parent
SHAPES = {  # shape, classes, parameters of the network in millions, GB of all pairs
    "cifar10": ((3, 32, 32), None, 35.7, 12.9),
    "imagenet64": ((3, 64, 64), 1000, 202.1, 247),
    "latent_imagenet256": ((4, 32, 32), 1000, 147.4, 34.5),
}
TINY = {
    "UNet2DModel": {
        **{"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
        **{"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
        "add_attention": False,
    },
    "DiTTransformer2DModel": {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    | {"patch_size": 2, "norm_num_groups": 4},
}


def stand_in(folder, name, shape, classes):
    """Write a few samples, with all labels, in the format that the config reads; give its path."""
    n, rng = 24 if classes is None else classes + 1, np.random.default_rng(0)
    if name.startswith("latent"):
        x = rng.normal(size=(n, *shape)).astype(np.float16) * 1.5
        np.savez(folder / "x.npz", x=x, y=np.arange(n) % classes)
        return folder / "x.npz"
    for i in range(n):
        place = folder / "train" / (f"n{i % classes:08}" if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (shape[1] + 8, shape[2], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return folder / "train"


def sealed(folder, name, arguments, shape, classes, round_):
    net = networks.build(NetConfig(name=name, **arguments), shape, classes, 0)
    files = [f"net/{file}" for file in networks.save(net, folder / "net")]
    facts = {"round": round_, "net": network_digest(net)}
    manifest.seal(folder, stage="reflow", config={}, inputs={}, outputs=files, **facts)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SHAPES))
def test_an_experiment_is_planned_as_its_page_says(tmp_path, name, capsys, monkeypatch):
    shape, classes, millions, gigabytes = SHAPES[name]
    path = f"data.path={stand_in(tmp_path, name, shape, classes)}"

    def plan(stage, model, key, *words):
        config, _ = load(model, [name, "device=cpu", f"run_dir={tmp_path}/{key}", *words])
        execute(stage.STAGE, config, True)
        return capsys.readouterr().out, config

    out, flow = plan(train_flow, train_flow.FlowConfig, "flow", path, "fit.precision=fp32")
    parameters = float(out.split(" of ")[2].split(" parameters")[0].replace(",", "")) / 1e6
    assert parameters == pytest.approx(millions, abs=0.1)
    arguments = TINY[flow.net.name]
    for key, round_ in (("teacher", 0), ("student", 1)):
        sealed(tmp_path / key, flow.net.name, arguments, shape, classes, round_)
    teacher, student = (f"{key}={tmp_path}/{key}" for key in ("teacher", "student"))

    out, pairs = plan(generate_pairs, generate_pairs.PairsConfig, "pairs", teacher)
    size = float(out.split(" MB on disk")[0].split()[-1].replace(",", "")) / 1e3
    assert size == pytest.approx(gigabytes, rel=0.01)
    few = ["shards=1", "shard_size=12", "compute_batch=12", "solver.steps=1", "device=cpu"]
    words = [name, f"run_dir={tmp_path}/pairs", teacher, *few]
    execute(generate_pairs.STAGE, load(generate_pairs.PairsConfig, words)[0], False)
    assert shards.sidecar(tmp_path / "pairs", 0)["count"] == 12

    entry = f"pairs=[{{path: {tmp_path}/pairs}}]"
    start = f"start={tmp_path}/teacher"
    out, student_config = plan(reflow, reflow.ReflowConfig, "reflow", start, entry)
    times, loss = student_config.times, student_config.loss  # the best without a feature loss
    assert (times.name, times.zero, loss.name, loss.power) == ("noise_heavy", 0.5, "normalised", 1)
    assert "with labels" in out if classes else "no labels" in out

    monkeypatch.setattr(features, "Inception", lambda weights: torch.nn.Identity())
    out, _ = plan(evaluate, evaluate.EvaluateConfig, "evaluate", path, teacher, student)
    kind = "sliced_wasserstein" if name.startswith("latent") else "frechet"
    assert f"{kind} distance" in out
    plan(export, export.ExportConfig, "export", student, "evaluation=null")
    page = (ROOT / "docs/guides/large-data.md").read_text()
    assert f"{pairs.shards * pairs.shard_size:,} pairs" in page
    assert f"{gigabytes} GB" in page
    assert "not measured" in page or "Nothing on this page has been measured" in page


@pytest.mark.slow
def test_latents_go_through_every_stage(tmp_path):
    """No clamp, no picture's range: what comes out is as wide as what went in."""
    path = stand_in(tmp_path, "latent", (4, 8, 8), 10)
    data = [f"data.path={path}", "data.source=latents", "device=cpu"]
    net = f"net={json.dumps({'name': 'DiTTransformer2DModel', **TINY['DiTTransformer2DModel']})}"
    small = ["fit.steps=4", "fit.batch_size=4", "fit.log_every=2"]

    def run(stage, model, *words):
        execute(stage.STAGE, load(model, list(words))[0])

    flow = (f"run_dir={tmp_path}/flow", *data, "data.labels=true", net, *small)
    run(train_flow, train_flow.FlowConfig, *flow)
    arguments = TINY["DiTTransformer2DModel"]
    sealed(tmp_path / "student", "DiTTransformer2DModel", arguments, (4, 8, 8), 10, 1)
    models = (f"teacher={tmp_path}/flow", f"student={tmp_path}/student")
    words = (f"run_dir={tmp_path}/evaluate", *data, *models, "samples=8", "steps=[1]")
    run(evaluate, evaluate.EvaluateConfig, *words, "converged_steps=1", "compute_batch=8")
    assert (tmp_path / "evaluate/report.html").is_file()
    seal = (f"run_dir={tmp_path}/export", f"student={tmp_path}/student", "steps=[1]", "device=cpu")
    run(export, export.ExportConfig, *seal)
    assert manifest.sealed(tmp_path / "export")
    sealed(tmp_path / "unet", "UNet2DModel", TINY["UNet2DModel"], (4, 8, 8), None, 1)
    seal = (f"run_dir={tmp_path}/other", f"student={tmp_path}/unet", "steps=[2]", "device=cpu")
    run(export, export.ExportConfig, *seal)  # no stock pipeline, which would make it RGBA
    for name in ("export", "other"):
        text = (tmp_path / name / "README.md").read_text()
        code = text.split("```python\n")[1].split("```")[0]
        code = code.replace("path/to/this/folder", f"{tmp_path}/{name}")
        code += "\nassert sample.shape == (4, 8, 8) and sample.abs().max() > 1"
        environment = os.environ | {"HF_MODULES_CACHE": f"{tmp_path}/modules_{name}"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        assert "vae.decode(sample[None] / vae.config.scaling_factor)" in text


def test_images_of_fashion_mnist_are_inverted_by_its_config():
    """All 60,000 of them: no shard is cut short."""
    words = ["fashion_mnist", "section=inverted"]
    config, _ = load(generate_pairs.PairsConfig, words)
    assert config.shards * config.shard_size == 60_000
    assert config.shard_size % config.compute_batch == config.shard_size % config.block == 0
    reflowed, _ = load(reflow.ReflowConfig, ["fashion_mnist"])
    assert reflowed.fit.batch_size * 0.05 >= 1  # the share of the mixture that the config tells of
