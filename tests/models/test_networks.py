"""The bridge between diffusers' terms and the math's, and the label traps of diffusers' networks."""

import json
import os
import shutil
from typing import ClassVar

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file

from flowmatch.config import UserError
from flowmatch.models import networks, two_time
from flowmatch.models.config import NetConfig
from flowmatch.models.digest import network_digest
from flowmatch.models.velocity import Velocity, classes_of
from tests.stages import UNET

DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
DIT |= {"norm_num_groups": 4}


def unet(classes=None, shape=(1, 8, 8)):
    return networks.build(NetConfig(name="UNet2DModel", **UNET), shape, classes, 0)


def dit(classes=5, shape=(1, 8, 8)):
    return networks.build(NetConfig(name="DiTTransformer2DModel", **DIT), shape, classes, 0)


class Recorder(torch.nn.Module):
    """A network that answers with its inputs: noise - data = 2 x, and remembers the timesteps."""

    config: ClassVar = {"num_class_embeds": 4}

    def forward(self, sample, timestep, class_labels=None):
        self.timestep, self.labels = timestep, class_labels
        scale = 2.0 + class_labels.float().reshape(-1, *[1] * (sample.ndim - 1))
        return type("Out", (), {"sample": scale * sample})


def test_the_bridge_flips_time_and_sign():
    net = Recorder()
    x, t = torch.randn(3, 1, 2, 2), torch.tensor([0.0, 0.25, 1.0])
    v = Velocity(net)(x, t, {"label": torch.tensor([0, 1, 2])})
    assert torch.equal(net.timestep, torch.tensor([1000.0, 750.0, 0.0]))
    assert net.timestep.dtype == torch.float32
    torch.testing.assert_close(v, -torch.tensor([2.0, 3.0, 4.0]).reshape(3, 1, 1, 1) * x)


def test_a_python_time_keeps_its_fraction():
    net = unet()
    x = torch.randn(2, 1, 8, 8)
    v = Velocity(net)
    with torch.no_grad():
        a, b = v(x, 0.5), v(x, 0.4995)
        torch.testing.assert_close(v(x, 0.5), v(x, torch.full((2,), 0.5)))
    assert (a - b).abs().max() > 1e-5  # UNet2DModel cuts 500.5 to 500 where it is a Python number


def test_guidance_mixes_null_and_condition_and_counts_two():
    net = Recorder()
    x, label = torch.randn(2, 3), torch.tensor([0, 1])
    plain, guided = Velocity(net), Velocity(net, guidance=3.0)
    conditional, null = plain(x, 0.5, {"label": label}), plain(x, 0.5)
    assert (net.labels == 3).all()  # without labels a conditional network gets the null class K
    torch.testing.assert_close(guided(x, 0.5, {"label": label}), null + 3 * (conditional - null))
    assert (plain.evaluations, guided.evaluations) == (2, 2)


def test_guidance_without_labels_is_refused():
    with pytest.raises(UserError, match="takes no labels"):
        Velocity(unet(), guidance=2.0)
    with pytest.raises(UserError, match="takes none"):
        Velocity(unet())(torch.zeros(1, 1, 8, 8), 0.5, {"label": torch.zeros(1, dtype=torch.long)})


@pytest.mark.parametrize(("make", "rows"), [(unet, 6), (dit, 6)])
def test_the_null_class_is_k_and_has_a_row(make, rows):
    net = make(5)
    assert classes_of(net) == 5
    table = next(
        m for m in net.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == rows
    )
    with torch.no_grad():
        table.weight[5] += 1
        v = Velocity(net.eval())
        x = torch.randn(1, 1, 8, 8)
        v(x, 0.5, {"label": torch.tensor([5])})


def test_dit_does_not_drop_labels_by_its_own_coins():
    net = dit(5).train()
    x, label = torch.randn(64, 1, 8, 8), {"label": torch.zeros(64, dtype=torch.long)}
    with torch.no_grad():
        for parameter in net.parameters():  # a fresh DiT is nearly blind to its label
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        first, second = (Velocity(net)(x, 0.5, label) for _ in range(2))
    assert torch.equal(first, second)


def test_the_modules_that_are_found_by_type_are_there():
    """LabelEmbedding and Attention are classes of diffusers that have no public name."""
    from diffusers.models.embeddings import LabelEmbedding

    found = [m.dropout_prob for m in dit(5).modules() if isinstance(m, LabelEmbedding)]
    assert found, "DiT's label embedding has another type; silence_label_drop misses it"
    assert not any(found)
    attentive = NetConfig(name="UNet2DModel", **UNET | {"add_attention": True})
    net = networks.build(attentive, (1, 8, 8), None, 0)
    assert two_time.has_attention(net), "UNet2DModel's attention has another type"
    assert not two_time.has_attention(unet())


def test_the_data_decides_sizes_and_contradictions_are_named():
    net = unet(3, (3, 16, 16))
    assert (net.config.in_channels, net.config.sample_size, net.config.num_class_embeds) == (
        3,
        16,
        4,
    )
    config = NetConfig(name="UNet2DModel", **UNET, in_channels=7, layer_per_block=2)
    with pytest.raises(UserError) as error:
        networks.build(config, (1, 8, 8), None, 0)
    assert len(error.value.faults) == 2
    assert "net.layer_per_block: unknown key; UNet2DModel takes" in str(error.value)
    assert "net.in_channels=7: the data needs 1" in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "message"),
    [
        ("UNet3DModel", (1, 8, 8), None, "expected VelocityMLP or a diffusers model class"),
        ("Path", (1, 8, 8), None, "expected VelocityMLP or a diffusers model class"),
        ("VelocityMLP", (1, 8, 8), None, "does not take samples of shape"),
        ("UNet2DModel", (2,), None, "does not take samples of shape"),
        ("DiTTransformer2DModel", (1, 8, 8), None, "needs labels"),
        ("UNet2DConditionModel", (4, 8, 8), None, "needs encoder_hidden_states; .* set prompts"),
        ("SD3Transformer2DModel", (4, 8, 8), None, "needs encoder_hidden_states"),
        ("ControlNetModel", (4, 8, 8), None, "needs encoder_hidden_states, controlnet_cond"),
        ("AutoencoderKL", (3, 8, 8), None, "takes sample, sample_posterior.*a timestep"),
    ],
)
def test_networks_that_do_not_fit_are_refused(name, shape, classes, message):
    with pytest.raises(UserError, match=message):
        networks.build(NetConfig(name=name), shape, classes, 0)


def test_a_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(UserError, match="patch"):
        dit(5, (1, 9, 9))


@pytest.mark.parametrize("make", [unet, dit])
def test_save_and_load_give_the_same_network_and_digest(make, tmp_path):
    net = make(5).eval()
    assert networks.save(net, tmp_path / "net") == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    again = networks.load(tmp_path / "net", "teacher")
    assert network_digest(again) == network_digest(net)
    assert not again.training
    second = networks.save(again, tmp_path / "net2")
    for name in second:
        assert (tmp_path / "net" / name).read_bytes() == (tmp_path / "net2" / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "net2" / "config.json").read_text()
    with torch.no_grad():
        next(iter(again.parameters())).view(-1)[0] += 1e-6
    assert network_digest(again) != network_digest(net)


def test_stock_diffusers_loads_what_is_saved(tmp_path):
    networks.save(unet(), tmp_path / "u")
    networks.save(dit(), tmp_path / "d")
    UNet2DModel.from_pretrained(tmp_path / "u")
    DiTTransformer2DModel.from_pretrained(tmp_path / "d")


def test_the_same_seed_gives_the_same_weights():
    assert network_digest(unet()) == network_digest(unet())


WEIGHTS = "diffusion_pytorch_model.safetensors"


def without_a_weight(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["conv_out.bias"]
    save_file(weights, folder / WEIGHTS)


def with_a_nan(folder):
    weights = load_file(folder / WEIGHTS)
    weights["conv_out.bias"][0] = torch.nan
    save_file(weights, folder / WEIGHTS)


def of_another_width(folder):
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"conv_out.bias": torch.zeros(3)}, folder / WEIGHTS)


def cut(folder):
    os.truncate(folder / WEIGHTS, 5000)


def configured(**values):
    def edit(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without_a_weight, "1 weights are missing, first conv_out.bias"),  # random ones before
        (with_a_nan, "its weights conv_out.bias hold NaN or infinity"),
        (of_another_width, "no diffusers model could be read there: .*size mismatch"),
        (cut, "no diffusers model could be read there"),
        (configured(act_fn=-0.5), "no diffusers model could be read there"),
        (configured(_class_name="CLIPTextModel"), "its class='CLIPTextModel': expected"),
        (configured(_class_name=None), "its class=None: expected"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
        (shutil.rmtree, "no diffusers model could be read there"),
    ],
)
def test_a_folder_without_a_sound_model_is_named(tmp_path, harm, message):
    networks.save(unet(), tmp_path / "net")
    harm(tmp_path / "net")
    (tmp_path / "net").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=f"^teacher={tmp_path}/net: .*{message}"):
        networks.load(tmp_path / "net", "teacher")


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path):
    networks.save(unet(), tmp_path / "net")
    (tmp_path / "new").touch()
    modes = {file.stat().st_mode for file in [*(tmp_path / "net").iterdir(), tmp_path / "new"]}
    assert len(modes) == 1
