"""What `teacher=` and `start=` take: exports, too; and what they refuse, with the way to go on."""

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from safetensors.torch import save_file

from flowmatch.config import NotReady, UserError
from flowmatch.models import networks, teachers
from flowmatch.models.config import NetConfig
from flowmatch.models.digest import network_digest
from flowmatch.runs import manifest
from tests.stages import UNET
from tests.tiny import diffusion, vaes


def unet():
    return networks.build(NetConfig(name="UNet2DModel", **UNET), (1, 8, 8), None, 0)


def exported(folder, scheduler, **facts):
    """A sealed export of a small network, as the stage writes it."""
    net = unet()
    DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained(folder)
    files = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]
    manifest.seal(folder, stage="export", config={}, inputs={}, outputs=files, round=2, **facts)
    return net


def any_n():
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")


def test_an_export_is_a_teacher_that_keeps_its_facts(tmp_path):
    net = exported(tmp_path / "export", any_n(), features=["abc"])
    found = teachers.load(tmp_path / "export", "teacher")
    assert (found.digest, found.round, found.features) == (network_digest(net), 2, ("abc",))
    assert found.diffusion is None
    assert not found.one_step
    again = teachers.load(tmp_path / "export/unet", "teacher")
    assert again.digest == found.digest
    index = tmp_path / "export/model_index.json"
    index.write_text(index.read_text().replace('"DDPMPipeline"', '["pipeline", "ReflowPipeline"]'))
    with pytest.raises(UserError, match="model_index.json is not the file that was sealed"):
        teachers.load(tmp_path / "export", "teacher")
    (tmp_path / "export/manifest.json").unlink()  # as a hub may hold it: a pipeline with a file
    assert teachers.load(tmp_path / "export", "teacher").digest == found.digest


@pytest.mark.parametrize("facts", [{"one_step": True}, {}])  # the second: as 0.1.0 sealed it
def test_an_export_for_one_step_has_no_flow_to_follow(tmp_path, facts):
    exported(tmp_path, FlowMatchEulerDiscreteScheduler(), **facts)
    with pytest.raises(UserError, match="is for one step only"):
        teachers.load(tmp_path, "teacher").check_teaches("teacher")


def sd3():
    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (diffusion.unet, "UNet2DConditionModel needs encoder_hidden_states; .* set prompts"),
        (sd3, "SD3Transformer2DModel needs encoder_hidden_states"),
        (vaes.kl, "AutoencoderKL takes sample, sample_posterior"),
    ],
)
def test_a_part_of_a_text_pipeline_is_no_teacher_by_itself(tmp_path, make, message):
    make().save_pretrained(tmp_path / "part")
    with pytest.raises(UserError, match=f"^teacher={tmp_path}/part: {message}"):
        teachers.load(tmp_path / "part", "teacher")


def test_weights_and_folders_of_weights_are_told_what_is_missing(tmp_path):
    save_file(unet().state_dict(), tmp_path / "model.safetensors")
    torch.save({}, tmp_path / "model.pt")
    way = "build it, load them, save_pretrained\\(\\) a folder and name that"
    for name in ("model.safetensors", "model.pt"):
        with pytest.raises(UserError, match=f"start={tmp_path}/{name} is a file; weights .*{way}"):
            teachers.load(tmp_path / name, "start")
    with pytest.raises(UserError, match="holds neither manifest.json .* config.json .*model_index"):
        teachers.load(tmp_path, "teacher")
    for unfinished in ("none", "empty", "run"):  # a stage that is not finished, as ever
        if unfinished != "none":
            (tmp_path / unfinished).mkdir()
        if unfinished == "run":
            (tmp_path / "run/config.yaml").write_text("run_dir: run\n")
        with pytest.raises(NotReady):
            teachers.load(tmp_path / unfinished, "teacher")


def test_a_checkpoint_without_its_index_is_no_teacher(tmp_path):
    step = tmp_path / "run/checkpoints/step_00000010"
    step.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, step / "ema.safetensors")
    with pytest.raises(UserError, match="holds neither manifest.json"):
        teachers.load(step, "teacher")
