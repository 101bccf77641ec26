"""The commands of docs/guides/own-data.md, on 300 pictures as people have them, and small numbers."""

import os
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowmatch.config import UserError, validate
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.runs import own_data
from flowmatch.runs.values import read_yaml
from tests import forked
from tests.pipelines.test_encode import vae_of

ROOT = Path(__file__).parents[2]
SMALL = [
    *("net.block_out_channels=[8,8]", "net.down_block_types=[DownBlock2D,DownBlock2D]"),
    *("net.up_block_types=[UpBlock2D,UpBlock2D]", "flow.fit.epochs=0.5", "pairs.per_image=0.5"),
    *("pairs.shard_size=80", "pairs.solver.steps=1", "reflow.fit.epochs=0.5", "device=cpu"),
    *("evaluate.per_image=0.1", "evaluate.steps=[1]", "evaluate.converged_steps=1"),
    *("export.steps=[1]",),
]


def call(folder, *words):
    known = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "cache")}
    return forked.run(["flowmatch", *words], cwd=folder, env=known)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """300 RGB pictures of mixed sizes, some transparent, some small, some broken."""
    place = tmp_path_factory.mktemp("guide")
    folder, rng = place / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(300):
        shape = (*rng.integers(10, 40, 2), 4 if i % 7 == 0 else 3)
        file = folder / f"{i:03d}.png"
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file)
        if i % 50 == 1:
            file.write_bytes(file.read_bytes()[:99])
    vae_of(place / "vae", latent_channels=4, scaling_factor=1.0)
    return place


def commands():
    """List the commands of the guide: the blocks of its first three sections."""
    text = (ROOT / "docs/guides/own-data.md").read_text().split("\n## ")[1:4]
    blocks = re.findall(r"```sh\n(.*?)```", "\n".join(text), flags=re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_the_guide_needs_six_commands_at_most():
    assert 3 <= len(commands()) <= 6
    assert all(words[0] == "flowmatch" for words in commands())


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--vae", "vae"]], ids=["pictures", "latents"])
def test_from_a_folder_to_one_step_samples(place, more):
    """Every command of the guide as it stands, but for small numbers; and the same through a VAE."""
    name = "mine" if not more else "coded"
    for words in commands():
        words = [word.replace("mine", name) for word in words]
        assert words[0] == "flowmatch"
        if more and "name=small" in words:  # once is enough
            continue
        words = [*words, *more] if words[1] == "new" else words
        words = [*words, *SMALL] if words[1] == "run" else words
        done = call(place, *[word if word != "32" else "16" for word in words[1:]])
        assert done.returncode == 0, done.stdout + done.stderr
        if "--dry-run" in words:
            assert "6 of 300 images left out" in done.stdout
            assert "294 samples of [3, 16, 16]" in done.stdout
            assert not (place / "runs" / name).exists()
    runs = place / "runs" / name
    assert "<html" in (runs / "evaluate" / "report.html").read_text()
    assert len(list(place.glob("samples-new/*.png"))) == 16
    kind = "LDMPipeline" if more else "DDPMPipeline"
    assert f'"{kind}"' in (runs / "export" / "model_index.json").read_text()


def config_of(text):
    return validate(DataConfig, {k: v for k, v in text["data"].items()})


def test_parquet_tars_and_arrays_hold_the_same_pictures(place, tmp_path, monkeypatch):
    """The file that `flowmatch new` writes for each of them reads the same samples."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = sorted((place / "pictures").iterdir())
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in files]
    kinds = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in files:
            tar.add(file, file.name)
    found = {}
    for path in (place / "pictures", tmp_path / "a.parquet", tmp_path / "a.tar"):
        text = own_data.body("a", str(path), "16", 3, False, None, None)
        (tmp_path / "a.yaml").write_text(text)
        data = dataset.load(config_of(read_yaml(str(tmp_path / "a.yaml"))))
        assert len(data.skipped) == 6
        found[path.name] = data.batch(np.arange(len(data)))["x1"]
    x = found["pictures"]
    assert x.shape == (294, 3, 16, 16)
    assert torch.equal(found["a.parquet"], x)
    assert torch.equal(found["a.tar"], x)
    pixels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", x=pixels)
    text = own_data.body("a", str(tmp_path / "a.npz"), None, 3, False, None, None)
    (tmp_path / "a.yaml").write_text(text)
    arrays = dataset.load(config_of(read_yaml(str(tmp_path / "a.yaml"))))
    assert torch.equal(arrays.batch(np.arange(294))["x1"], x)


@pytest.mark.parametrize(
    ("size", "vae", "levels"),
    [("64", None, 4), ("28", None, 3), ("48x32", None, 3), ("32", "vae", 2)],
)
def test_the_network_fits_the_size(place, tmp_path, size, vae, levels):
    place = str(place / vae) if vae else None
    text = own_data.body("a", "pictures", size, 3, True, "others", place)
    (tmp_path / "a.yaml").write_text(text)
    values = read_yaml(str(tmp_path / "a.yaml"))
    assert len(values["net"]["block_out_channels"]) == levels
    assert values["reference"]["labels"]
    with pytest.raises(UserError, match="--size 3.5: expected pixels of a side"):
        own_data.body("a", "pictures", "3.5", 3, False, None, None)
