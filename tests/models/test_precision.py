"""Torch's global state is restored: flags after a block, the caller's random numbers after a build."""

import pytest
import torch

from flowmatch.models import networks, precision, two_time
from flowmatch.models.config import NetConfig
from flowmatch.models.digest import network_digest


def flags():
    cudnn = torch.backends.cudnn
    return (
        torch.get_float32_matmul_precision(),
        cudnn.allow_tf32,
        cudnn.deterministic,
        cudnn.benchmark,
    )


def test_a_block_restores_the_flags_also_after_an_error(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = flags()
    with precision.arithmetic("fp32", "cpu"):
        assert flags()[:2] == ("highest", False)
    assert flags() == before
    with precision.arithmetic("tf32", "cpu"):
        assert flags()[:2] == ("high", True)
    assert flags() == before

    def interrupted():
        with precision.deterministic():
            assert flags() == (*before[:2], True, before[3])
            torch.backends.cudnn.benchmark = not before[3]
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupted()
    assert flags() == before


def test_bf16_is_that_of_autocast_alone():
    x = torch.randn(4, 4)
    with precision.arithmetic("bf16", "cpu"):
        assert (x @ x).dtype == torch.bfloat16
    assert (x @ x).dtype == torch.float32


def test_seeds_and_what_is_drawn_inside_do_not_reach_the_caller():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    with precision.seeded(7):
        first = torch.randn(3)
    with precision.forked(torch.device("cpu")):
        torch.manual_seed(7)
        assert torch.equal(torch.randn(3), first)
    assert torch.equal(torch.randn(3), expected)


def test_a_network_is_a_function_of_its_seed_and_leaves_the_callers_random_numbers():
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.randn(3)
        torch.manual_seed(seed)
        net = networks.build(NetConfig(name="VelocityMLP", hidden=8), (2,), None, 5)
        digests.add((network_digest(net), network_digest(two_time.add(net, 6))))
        assert torch.equal(torch.randn(3), expected)
    assert len(digests) == 1
    other = networks.build(NetConfig(name="VelocityMLP", hidden=8), (2,), None, 6)
    assert network_digest(other) != network_digest(net)
