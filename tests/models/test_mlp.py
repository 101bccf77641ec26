"""VelocityMLP: its contract, its round trip, and that it learns a velocity."""

import math

import pytest
import torch

import flowmatch
from flowmatch.models.mlp import VelocityMLP


def tiny(**kwargs):
    torch.manual_seed(0)
    return VelocityMLP(hidden=16, layers=2, **kwargs).eval()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_times_of_every_form_agree(channels):
    net, x = tiny(in_channels=channels), torch.randn(4, channels)
    each = net(x, torch.full((4,), 250.0)).sample
    assert each.shape == x.shape
    for t in (torch.tensor(250.0), torch.tensor([250.0]), torch.tensor(250), 250.0, 250):
        assert torch.equal(net(x, t).sample, each)
    assert torch.equal(net(x, 250.0, return_dict=False)[0], each)
    mixed = net(x, torch.tensor([250.0, 0.0, 250.0, 1000.0])).sample
    torch.testing.assert_close(mixed[::2], each[::2])
    assert (mixed[1::2] - each[1::2]).abs().min(0).values.max() > 1e-3  # time is seen
    # continuous: neighbouring times neither merge nor jump
    step = (net(x, 250.5).sample - each).abs().max()
    assert 1e-6 < step < 1e-2


def test_labels():
    net, x = tiny(num_class_embeds=3), torch.randn(3, 2)
    out = net(x[:1].repeat(3, 1), 500.0, class_labels=torch.tensor([0, 1, 2])).sample
    assert torch.pdist(out).min() > 1e-2
    with pytest.raises(ValueError, match="class_labels are missing, but num_class_embeds=3"):
        net(x, 500.0)
    with pytest.raises(ValueError, match="class_labels are given, but num_class_embeds=None"):
        tiny()(x, 500.0, class_labels=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("shape", [(4, 3), (2,), (4, 2, 1)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[B, 2\]"):
        tiny()(torch.zeros(shape), 500.0)


@pytest.mark.parametrize(
    "arguments",
    [{"in_channels": 0}, {"layers": 0}, {"time_frequencies": -1}, {"num_class_embeds": 0}],
)
def test_wrong_configs_are_refused(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        VelocityMLP(**arguments)


def test_it_survives_the_disk(tmp_path):
    arguments = {"in_channels": 3, "hidden": 8, "layers": 4, "time_frequencies": 1}
    net = VelocityMLP(**arguments, num_class_embeds=3, second_time=True)
    net.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = flowmatch.VelocityMLP.from_pretrained(tmp_path)
    assert dict(net.config) == {key: loaded.config[key] for key in net.config}
    x, label = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    second = {"target_timestep": torch.tensor(3.0)}
    assert torch.equal(loaded(x, 7.0, label, **second).sample, net(x, 7.0, label, **second).sample)
    with pytest.raises(ValueError, match="target_timestep is missing, but second_time=True"):
        net(x, 7.0, label)
    assert VelocityMLP.__module__ == "flowmatch"
    assert issubclass(VelocityMLP, flowmatch.ModelMixin)


def test_half_precision_and_gradients():
    net = tiny().to(torch.bfloat16)
    assert net(torch.randn(2, 2).bfloat16(), torch.tensor(500.0)).sample.dtype == torch.bfloat16
    net = VelocityMLP(num_class_embeds=2)
    net(torch.randn(2, 2), torch.tensor([1.0, 2.0]), torch.tensor([0, 1])).sample.sum().backward()
    assert all(p.grad is not None for p in net.parameters())  # DDP would stop at an unused one


def test_it_learns_the_ring():
    """Excess error over the exact velocity of 8 Gaussians, radius 2.5 and std .3 (closed form)."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.arange(8) * math.pi / 4
    means = 2.5 * torch.stack([angle.cos(), angle.sin()], dim=1)

    def batch(size):
        noise, t = (
            torch.randn(size, 2, generator=generator),
            torch.rand(size, 1, generator=generator),
        )
        data = means[torch.randint(8, (size,), generator=generator)]
        data = data + 0.3 * torch.randn(size, 2, generator=generator)
        return (1 - t) * noise + t * data, t, noise - data

    torch.manual_seed(0)
    net = VelocityMLP()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        x, t, target = batch(256)
        loss = (net(x, 1000 * (1 - t[:, 0])).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    x, t, _ = batch(20000)
    away = x[:, None] - t[:, None] * means  # [B, 8, 2]
    variance = 0.09 * t**2 + (1 - t) ** 2
    weight = torch.softmax(-away.square().sum(2) / (2 * variance), dim=1)[:, :, None]
    slope = ((0.09 * t - (1 - t)) / variance)[:, None] * away
    exact = -(weight * (means + slope)).sum(1)
    with torch.no_grad():
        excess = (net(x, 1000 * (1 - t[:, 0])).sample - exact).square().sum(1).mean()
    assert excess < 0.25, f"{excess:.3f}"  # 1.7 for a network that does not see the time
