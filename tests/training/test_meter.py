"""The cost of a step: FLOPs in closed form, their share of a peak, and what the log says."""

import pytest
import torch
from torch import nn

from flowmatch.models import flops
from flowmatch.training import meter
from flowmatch.training.meter import Meter
from tests.training.test_loop import images, train, unet

CPU = torch.device("cpu")


def counted(net, x):
    one = Meter(CPU, "fp32", len(x))
    one.peak = 1e12
    with one.counted() as forward_is_done:
        out = net(x)
        forward_is_done()
        out.sum().backward()
    return one


def test_a_linear_layers_flops_are_two_for_each_weight_and_pass():
    net, x = nn.Linear(8, 16), torch.randn(4, 8)
    assert counted(net, x).flops == 2 * (2 * 8 * 16)  # forward, and the weights' gradient
    assert counted(net, x.requires_grad_()).flops == 3 * (2 * 8 * 16)
    net.weight.requires_grad_(False)
    assert counted(net, x).flops == 2 * (
        2 * 8 * 16
    )  # a frozen layer's gradient is that of its input


def test_what_is_computed_again_is_no_work_of_the_model():
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = torch.randn(4, 8, requires_grad=True)

    def again(x):
        return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)

    assert counted(again, x).flops == counted(net, x).flops


def test_fused_attention_counts_on_a_cpu():
    q, k, v = (torch.randn(2, 4, 32, 16, requires_grad=True) for _ in range(3))
    found = counted(lambda _: torch.nn.functional.scaled_dot_product_attention(q, k, v), q)
    assert found.flops == 3.5 * 2 * (
        2 * 4 * 32 * 32 * 16
    )  # the backward pass takes 5 products for 2


def test_the_share_of_a_peak():
    one = Meter(CPU, "bf16", 4)
    assert "mfu" not in one.values(1.0)  # no peak is known
    one.peak, one.flops = flops.peak_of("NVIDIA H100 80GB HBM3", "bf16"), 1e13
    assert one.values(30.0)["mfu"] == pytest.approx(3e14 / 989e12, rel=1e-3)
    assert flops.peak_of("NVIDIA H100 PCIe", "tf32") == 378e12
    assert flops.peak_of("an unknown GPU", "bf16") is None


def test_each_line_of_the_log_has_its_costs_and_the_count_changes_no_bit(tmp_path, monkeypatch):
    short = {"steps": 4, "batch_size": 8, "save_every": 2, "log_every": 1, "warmup": 2}
    files, plain = train(tmp_path / "a", images, unet(0.3), **short)
    assert all(0.01 < line["memory_gb"] < 100 and "mfu" not in line for line in plain)
    monkeypatch.setattr(meter, "device_peak", lambda device, precision: 1e9)
    again, counted = train(tmp_path / "b", images, unet(0.3), **short)
    assert [line["loss"] for line in counted] == [line["loss"] for line in plain]
    assert again == files
    per_sample = [line["mfu"] / line["images_per_second"] * 1e9 for line in counted]
    assert per_sample[-1] > 1e5
    assert max(per_sample) == pytest.approx(min(per_sample), rel=0.02)
