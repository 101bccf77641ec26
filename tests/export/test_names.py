"""Rectangles, and classes by name, in the folders of stock pipelines and of ours."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.utils import logging

from flowmatch.export import model_card, network_folder
from flowmatch.models.teachers import Teacher
from tests.export.test_pipeline import tiny_dit
from tests.stages import UNET

WORDS = ("cat", "dog")
OURS = {"custom_pipeline": "pipeline", "trust_remote_code": True}


def student(net, names=WORDS):
    return Teacher(net.eval(), "0" * 64, 1, names=names)


def unet(size, classes=None):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size, in_channels=3, out_channels=3, num_class_embeds=classes, **UNET
    )


def draw(pipe, **more):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=1, generator=noise, output_type="np", **more).images


def test_a_stock_pipeline_draws_rectangles(tmp_path):
    made = student(unet([12, 8]), None)
    kind = model_card.kind_of(made)
    assert kind.name == "DDPMPipeline"
    network_folder.write(tmp_path / "out", made, kind, [1])
    exact = FlowMatchEulerDiscreteScheduler.from_pretrained(
        tmp_path / "out", subfolder="scheduler_1"
    )
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out", scheduler=exact)
    theirs = torch.from_numpy(draw(pipe, batch_size=4)).permute(0, 3, 1, 2)
    ours = network_folder.own_samples(made, 1, 0)
    assert theirs.shape == (4, 3, 12, 8)
    assert (theirs - ours).abs().max() <= network_folder.TOLERANCE


def test_a_stock_folder_knows_the_names_without_a_word_of_the_stock_class(
    tmp_path, monkeypatch, capfd
):
    """Its model_index.json is the stock one; the pipeline file beside it has the names."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = student(unet(8, 3))
    kind = model_card.kind_of(made)
    assert kind.name == "ConsistencyModelPipeline"
    network_folder.write(tmp_path / "out", made, kind, [1])
    assert "id2label" not in json.loads((tmp_path / "out" / "model_index.json").read_text())
    logging.set_verbosity_warning()
    DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert "not expected" not in capfd.readouterr().err
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", **OURS)
    assert (draw(pipe, class_labels="dog") == draw(pipe, class_labels=1)).all()
    assert (draw(pipe, class_labels="dog") != draw(pipe, class_labels="cat")).any()


def test_a_transformer_takes_names_and_numbers_together():
    pipe = network_folder.pipeline_of(student(tiny_dit(), ("cat", "dog", "red fox")))
    both = draw(pipe, batch_size=2, class_labels=["red fox", 0])
    assert (both == draw(pipe, batch_size=2, class_labels=[2, 0])).all()
    assert pipe.config.id2label == {0: "cat", 1: "dog", 2: "red fox"}
    with pytest.raises(ValueError, match=r"\['fox'\]: expected names of cat, dog, red fox"):
        draw(pipe, class_labels="fox")
    bare = network_folder.pipeline_of(student(tiny_dit(), None))
    with pytest.raises(ValueError, match="numbers; the classes have no names here"):
        draw(bare, class_labels="fox")
