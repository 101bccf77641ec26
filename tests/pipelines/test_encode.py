"""Latents with their VAE: encoded, trained on, decoded for every picture, exported with the VAE."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel, VQModel
from PIL import Image

from flowmatch.config import UserError, validate
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.evaluation import figures
from flowmatch.export import model_card, network_folder
from flowmatch.export.fresh import Fresh
from flowmatch.export.sample import sample
from flowmatch.models import autoencoder, teachers
from flowmatch.models.teachers import Teacher
from flowmatch.runs import manifest
from pipelines import encode, evaluate, export, generate_pairs, inspect_pairs, reflow, train_flow
from tests import stages
from tests.images import folder_of, pictures
from tests.stages import UNET

LEVELS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
FIT = ["fit.batch_size=8", "fit.steps=2", "fit.log_every=1", "fit.warmup=0"]


def vae_of(folder, kind=AutoencoderKL, **more):
    torch.manual_seed(0)
    net = kind(in_channels=3, out_channels=3, **LEVELS, **more).eval()
    net.save_pretrained(folder)
    return net


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """16x16 pictures, latents [4, 8, 8] of an untrained VAE, and the chain on them."""
    root = tmp_path_factory.mktemp("latents")
    vae_of(root / "vae", latent_channels=4, scaling_factor=0.5)
    folder_of(root / "set", pictures(26, (16, 16, 3)))
    images = f"{{source: images, path: {root}/set}}"
    stages.run(
        encode, f"run_dir={root}/encode", f"vae={root}/vae", f"data={images}", "shard_size=10"
    )
    net = [f"net.{key}={json.dumps(value)}" for key, value in UNET.items()]
    latents = f"data={{source: latents, path: {root}/encode}}"
    flow = [f"run_dir={root}/flow", "net.name=UNet2DModel", *net, *FIT]
    stages.run(train_flow, *flow, latents)
    pairs = [f"run_dir={root}/pairs", f"teacher={root}/flow", "shard_size=16", "per_image=0.5"]
    stages.run(generate_pairs, *pairs, "solver={name: euler, steps: 2}")
    again = [f"run_dir={root}/reflow", f"start={root}/flow", f"pairs={root}/pairs", *FIT]
    stages.run(reflow, *again)
    both = [f"teacher={root}/flow", f"student={root}/reflow", f"reference={images}"]
    rows = ["steps=[1]", "converged_steps=2", "features=values", "samples=20"]
    stages.run(evaluate, f"run_dir={root}/evaluate", *both, latents, *rows)
    last = [f"student={root}/reflow", f"evaluation={root}/evaluate", "steps=[1,2]"]
    stages.run(export, f"run_dir={root}/export", *last)
    return root


def load(root):
    return dataset.load(validate(DataConfig, {"source": "latents", "path": f"{root}/encode"}))


def test_latents_are_the_scaled_means_of_the_vae(root):
    net = AutoencoderKL.from_pretrained(root / "vae")
    x = dataset.load(DataConfig(path=f"{root}/set")).batch(np.arange(26))["x1"]
    with torch.no_grad():
        wanted = net.encode(x).latent_dist.mode() * 0.5
    data = load(root)
    found = data.batch(np.array([25, 0, 11]))["x1"]
    assert (found - wanted[[25, 0, 11]]).abs().max() < 1e-5
    assert (data.count, data.shape, data.latents, data.images) == (26, (4, 8, 8), True, False)
    vae = autoencoder.of_data(data, "data.path")
    with torch.no_grad():
        shown = net.decode(wanted[:3] / 0.5).sample.clamp(-1, 1)
    assert (vae.decoded(data).batch(np.arange(3))["x1"] - shown).abs().max() < 1e-5


def test_what_is_a_latent_is_a_fact_that_travels(root):
    told = manifest.read(root / "encode", "run")["facts"]["latents"]
    assert told["scale"] == 0.5
    assert told["picture"] == [3, 16, 16]
    for stage in ("flow", "pairs", "reflow", "export"):
        assert manifest.read(root / stage, "run")["facts"]["latents"] == told


def test_a_killed_encoding_goes_on_to_the_same_bytes(root, tmp_path, capsys):
    whole = manifest.read(root / "encode", "run")["outputs"]
    words = [f"run_dir={tmp_path}/e", f"vae={root}/vae", "shard_size=10"]
    words += [f"data={{source: images, path: {root}/set}}"]
    stages.run(encode, *words)
    (tmp_path / "e" / "manifest.json").unlink()
    (tmp_path / "e" / "latents-000001.npy").unlink()
    with open(tmp_path / "e" / "latents-000000.npy", "r+b") as file:  # damaged since
        file.seek(200)
        file.write(bytes(8))
    assert "resumes" not in capsys.readouterr().out
    stages.run(encode, *words)
    assert manifest.read(tmp_path / "e", "run")["outputs"] == whole
    out = capsys.readouterr().out
    assert "standard deviation" in out
    files = sum(name.endswith(".npy") for name in whole)
    assert f"encode: resumes: {files - 2} of {files} files made before" in out


def test_scores_and_pictures_are_of_decoded_samples(root):
    result = json.loads((root / "evaluate" / "metrics.json").read_text())
    assert result["protocol"]["distance"] == "frechet"
    assert result["protocol"]["decoded by"].startswith("AutoencoderKL, sha256 ")
    assert "precision" in result["student"]["rows"][0]
    assert (root / "evaluate" / "grid.png").is_file()


def test_previews_are_decoded(root, tmp_path, monkeypatch):
    """Also the pictures that the held-out loss is taken on become latents."""
    decoded, keep = [], autoencoder.Autoencoder.decode
    monkeypatch.setattr(
        autoencoder.Autoencoder, "decode", lambda vae, x: (decoded.append(len(x)), keep(vae, x))[1]
    )
    net = [f"net.{key}={json.dumps(value)}" for key, value in UNET.items()]
    latents = f"data={{source: latents, path: {root}/encode}}"
    real = f"reference={{source: images, path: {root}/set}}"
    words = [f"run_dir={tmp_path}/flow", "net.name=UNet2DModel", *net, *FIT, "fit.sample_every=2"]
    stages.run(train_flow, *words, latents, real)
    assert len(list((tmp_path / "flow" / "samples").glob("*.png"))) == 1
    assert len(decoded) == 2  # the samples of 8 and of 32 steps
    assert (tmp_path / "flow" / "held_out.jsonl").read_text().startswith("{")
    again = [f"run_dir={tmp_path}/r", f"start={root}/flow", f"pairs={root}/pairs", *FIT]
    stages.run(reflow, *again, "fit.sample_every=2")
    net, other = (manifest.read(p, "x")["facts"]["net"] for p in (root / "reflow", tmp_path / "r"))
    assert net == other  # the same bytes


def test_inspection_draws_pictures(root, tmp_path, monkeypatch, capsys):
    drawn = []
    keep = figures.pairs
    monkeypatch.setattr(figures, "pairs", lambda *words: (drawn.append(words), keep(*words)))
    assert inspect_pairs.main([f"{root}/pairs", "--out", str(tmp_path)]) == 0
    _, x0, x1, _, latent = drawn[0]
    assert (x0.shape[1:], x1.shape[1:], latent) == ((4, 8, 8), (3, 16, 16), False)
    monkeypatch.setattr(autoencoder, "find", lambda folder: None)
    assert inspect_pairs.main([f"{root}/pairs", "--out", str(tmp_path)]) == 0
    assert drawn[1][2].shape[1:] == (4, 8, 8)
    assert "name it with --vae" in capsys.readouterr().out


def test_a_stock_class_returns_pictures(root, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(root / "export")
    assert type(pipe).__name__ == "LDMPipeline"
    pipe.set_progress_bar_config(disable=True)
    image = pipe(num_inference_steps=1).images[0]
    assert (image.size, image.mode) == ((16, 16), "RGB")
    told = sample(str(root / "export"), 1, tmp_path / "out", 3, 0)
    assert told.startswith("wrote 3 images")
    known = manifest.read(root / "encode", "run")["facts"]["latents"]
    assert teachers.load(root / "export", "teacher").latents == known  # as a teacher again


def test_a_quantising_vae_is_taken_too(tmp_path):
    net = vae_of(tmp_path / "vae", VQModel, latent_channels=3, scaling_factor=2.0)
    vae = autoencoder.load(tmp_path / "vae", "vae", (3, 16, 8))
    x = torch.rand(2, 3, 16, 8) * 2 - 1
    with torch.no_grad():
        z = net.encode(x).latents
        assert (vae.encode(x) - 2 * z).abs().max() < 1e-5
        assert (vae.decode(2 * z) - net.decode(z).sample.clamp(-1, 1)).abs().max() < 1e-5
    assert vae.plain


def test_ours_where_there_is_no_stock_class(tmp_path):
    """Classes by name, rectangles, and a scale and a shift for each channel."""
    more = {"latents_mean": [0.5, 0.0, -1.0], "latents_std": [1.0, 2.0, 4.0]}
    vae_of(tmp_path / "vae", latent_channels=3, scaling_factor=2.0, **more)
    vae = autoencoder.load(tmp_path / "vae", "vae", (3, 16, 8))
    assert vae.scale == [2.0, 1.0, 0.5]
    x = vae.encode(torch.rand(2, 3, 16, 8) * 2 - 1)
    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=[8, 4], in_channels=3, out_channels=3, num_class_embeds=3, **UNET
    ).eval()
    words = ("cat", "dog")
    student = Teacher(unet, "0" * 64, 1, names=words, latents=vae.facts)
    chosen = model_card.kind_of(student, vae)
    assert (chosen.name, x.shape[1:]) == ("ReflowPipeline", student.shape)
    with Fresh() as fresh:
        written = network_folder.write(tmp_path / "out", student, chosen, [1], vae)
        differences = network_folder.compare(tmp_path / "out", student, chosen, [1], 0, fresh, vae)
    assert differences[1]["latent"] <= network_folder.TOLERANCE
    assert "vae/config.json" in written
    told = sample(str(tmp_path / "out"), 1, tmp_path / "pictures", 2, 0, ["dog"])
    assert told.startswith("wrote 2 images")
    assert Image.open(tmp_path / "pictures" / "00.png").size == (8, 16)
    assert teachers.load(tmp_path / "out", "teacher").shape == (3, 8, 4)


def test_latents_of_three_channels_are_no_pictures(tmp_path):
    unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **UNET).eval()
    student = Teacher(unet, "0" * 64, 1, latents={})
    kind = model_card.kind_of(student)
    assert kind.name == "ReflowPipeline"
    assert 'output_type="latent"' in kind.snippet
    plain = model_card.kind_of(dataclasses.replace(student, latents=None))
    assert plain.name == "DDPMPipeline"
    pipe = network_folder.pipeline_of(student)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=1).images.shape == (1, 3, 8, 8)  # no picture, unasked
    with pytest.raises(ValueError, match="expected one of np, pt, latent"):
        pipe(num_inference_steps=1, output_type="pil")


def test_a_scale_of_one_standard_deviation(root, tmp_path):
    words = [f"run_dir={tmp_path}/e", f"vae={root}/vae", "scale=unit"]
    stages.run(encode, *words, f"data={{source: images, path: {root}/set}}")
    found = dataset.load(DataConfig(source="latents", path=f"{tmp_path}/e"))
    x = found.batch(np.arange(26))["x1"]
    assert abs(float(x.std()) - 1) < 1e-3
    vae = autoencoder.of_data(found, "data.path")
    assert vae.plain  # so that stock classes decode them


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["data={source: digits}"], "does not take pictures of [1, 8, 8]"),
        (["data={source: ring}"], "data holds [2]; expected pictures"),
        (["vae=ROOT/flow/net"], "UNet2DModel does not encode pictures; expected a VAE"),
        (["data.size=15"], "turns pictures of [3, 15, 15] into [3, 14, 14]; set data.size"),
        (["data.size=8", "data.crop=random"], "each picture is encoded once"),
    ],
)
def test_what_cannot_be_encoded_is_refused(root, tmp_path, words, fault):
    words = [word.replace("ROOT", str(root)) for word in words]
    usual = [f"vae={root}/vae", f"data={{source: images, path: {root}/set}}"]
    usual = [u for u in usual if not any(w.startswith(u.split("=")[0] + "=") for w in words)]
    with pytest.raises(UserError) as caught:
        stages.run(encode, f"run_dir={tmp_path}/e", *usual, *words)
    assert fault in str(caught.value)


def test_another_vae_is_refused(root, tmp_path):
    vae_of(tmp_path / "vae", latent_channels=4, scaling_factor=0.25)
    with pytest.raises(
        UserError, match="is another VAE than the one that the latents were made with"
    ):
        stages.run(export, f"run_dir={tmp_path}/x", f"student={root}/reflow", f"vae={tmp_path}/vae")
