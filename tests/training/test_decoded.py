"""The feature loss on latents: through a decoder, on crops, checkpointed, resumed, refused."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from flowmatch.config import UserError
from flowmatch.evaluation import decoded, features
from flowmatch.flow import losses, objectives
from flowmatch.flow.config import LossConfig, ObjectiveConfig
from flowmatch.models.autoencoder import Autoencoder
from flowmatch.runs import manifest
from flowmatch.training import loop
from pipelines import generate_pairs, reflow
from tests import stages
from tests.pairset import make_teacher

UNET = {"name": "UNet2DModel", **stages.UNET}
LEVELS = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
RANDOM = LossConfig(name="feature", features="random", power=1.0)
FIT = ["fit.steps=4", "fit.batch_size=8", "fit.log_every=1", "fit.save_every=2", "fit.warmup=0"]


class Same(torch.nn.Module):
    """An autoencoder that does nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def decode(self, z):
        return SimpleNamespace(sample=z)


def some(channels=4, n=3):
    torch.manual_seed(1)
    v, x0, x1 = torch.randn(3, n, channels, 8, 8)
    t = torch.linspace(0, 0.9, n)
    u = torch.linspace(0, 0.999, n)
    return (
        v.requires_grad_(),
        (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * x1,
        x0,
        x1,
        t,
        u,
    )


def slope(config, module, values):
    loss = losses.build(config, module)(*values[:5], u=values[5])
    return loss.detach(), torch.autograd.grad(loss.sum(), values[0])[0]


def vae_of(folder):
    torch.manual_seed(0)
    net = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, **LEVELS).eval()
    net.save_pretrained(folder)
    return net


def test_crops_are_squares_that_a_number_places():
    x = torch.arange(2 * 5 * 7.0).reshape(1, 2, 5, 7).expand(12, -1, -1, -1)
    found = losses.cut(x, 3, (torch.arange(12) * 15 // 12 + 0.5) / 15)
    for one, place in zip(found, (torch.arange(12) * 15 // 12).tolist(), strict=True):
        down, right = divmod(place, 5)
        assert torch.equal(one, x[0, :, down : down + 3, right : right + 3])
    ends = losses.cut(x[:2], 3, torch.tensor([0.0, 1 - 2**-24]))
    assert torch.equal(ends[0], x[0, :, :3, :3])
    assert torch.equal(ends[1], x[0, :, 2:, 4:])


@pytest.mark.parametrize("crop", [None, 3])
def test_a_decoder_that_does_nothing_leaves_the_loss_as_it_is(crop):
    config, values = RANDOM.model_copy(update={"crop": crop}), some()
    seen = features.random_features((4, 8, 8), 0)
    plain = slope(config, seen, values)
    through = slope(config, decoded.Decoded(Same(), 1.0, 0.0, seen), values)
    one = slope(config, decoded.Decoded(Same(), 1.0, 0.0, seen, checkpointing=True), values)
    for found in (through, one):
        torch.testing.assert_close(found, plain)
    goal = objectives.build(ObjectiveConfig(), config, seen)  # the places are those of its numbers
    v, _, *rest = values
    torch.testing.assert_close(goal(lambda x, t, cond: v, None, *rest, None, 0).detach(), plain[0])
    scaled = slope(config, decoded.Decoded(Same(), [2.0] * 4, 0.5, seen), values)
    assert not torch.allclose(scaled[0], plain[0], rtol=1e-2)
    if crop is not None:  # another place is another loss
        other = slope(config, seen, (*values[:5], values[5].flip(0)))
        assert not torch.allclose(other[0][[0, 2]], plain[0][[0, 2]], rtol=1e-3)


def test_gradients_flow_through_the_decoder_to_the_student_alone(tmp_path):
    net, values = vae_of(tmp_path / "vae"), some()
    facts = Autoencoder(net, 0.5, 0.25, (3, 16, 16), "").facts
    facts["vae"] = decoded.autoencoder.network_digest(net)
    start = SimpleNamespace(shape=(4, 8, 8), latents=facts, features=())

    def load(precision="fp32", **more):
        config = RANDOM.model_copy(update={"vae": str(tmp_path / "vae"), **more})
        how = {"precision": precision, "device": "cpu", "seed": 3}
        seen = decoded.of_loss(config, start, "", [], 4, **how)
        return config, seen.module, seen.inputs["features"], *seen.digests, seen.lines

    config, module, digest, own, told = load()
    assert digest == own == features.module_digest(features.random_features((3, 16, 16), 3))
    assert "pictures of [3, 16, 16], decoded by AutoencoderKL in float32" in told[0]
    plain, grad = slope(config, module, values)
    assert grad.flatten(1).norm(dim=1).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    with torch.no_grad():  # by hand, at t = 0
        picture = [
            net.decode(x / 0.5 + 0.25).sample
            for x in (values[1][:1] + values[0][:1], values[3][:1])
        ]
        seen = features.random_features((3, 16, 16), 3)
        apart = (seen(picture[0]) - seen(picture[1])).square().sum()
    assert float(plain[0]) == pytest.approx(float((apart / 1e-3).log1p()), rel=1e-3)
    again = slope(*load(checkpointing=True)[:2], values)
    torch.testing.assert_close(again, (plain, grad), rtol=1e-4, atol=1e-5)
    config, module, _, _, told = load("bf16", crop=4)
    assert "pictures of [3, 8, 8], decoded by AutoencoderKL in bfloat16" in told[0]
    assert {p.dtype for p in module.vae.parameters()} == {torch.bfloat16}
    assert slope(config, module, values)[1].abs().max() > 0
    with pytest.raises(UserError, match="loss.crop=9: a square of samples"):
        load(crop=9)
    facts["vae"] = "0" * 64
    with pytest.raises(UserError, match="is another VAE than the one that the latents"):
        load()


def test_latents_without_their_decoder_are_refused_and_a_resumed_run_is_the_same(tmp_path):
    net = vae_of(tmp_path / "vae")
    make_teacher(tmp_path / "flow", None, (4, 8, 8), **UNET)
    facts = Autoencoder(net, 0.5, 0.0, (3, 16, 16), decoded.autoencoder.network_digest(net)).facts
    sealed = manifest.read(tmp_path / "flow", "x")
    manifest.seal(
        tmp_path / "flow",
        **{k: sealed[k] for k in ("stage", "config", "inputs", "outputs")},
        **sealed["facts"] | {"latents": facts},
    )
    few = [
        "shards=1",
        "shard_size=16",
        "block=8",
        "compute_batch=16",
        "solver={name: euler, steps: 1}",
    ]
    stages.run(generate_pairs, f"run_dir={tmp_path}/pairs", f"teacher={tmp_path}/flow", *few)
    words = [f"start={tmp_path}/flow", f"pairs={tmp_path}/pairs", *FIT]
    loss = "{name: feature, features: random, power: 1.0, crop: 3}"
    with pytest.raises(
        UserError, match="latents of a VAE whose folder was not found; set loss.vae="
    ):
        stages.run(reflow, f"run_dir={tmp_path}/no", *words, f"loss={loss}")
    words += [f"loss={loss}", f"loss.vae={tmp_path}/vae"]
    stages.run(reflow, f"run_dir={tmp_path}/whole", *words)
    update = loop.State.update

    def fail(self, *values):
        if self.step == 3:
            raise KeyboardInterrupt
        return update(self, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.State, "update", fail)
        with pytest.raises(KeyboardInterrupt):
            stages.run(reflow, f"run_dir={tmp_path}/again", *words)
    stages.run(reflow, f"run_dir={tmp_path}/again", *words)
    for file in ("manifest.json", "net/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
