"""Which modules of a network FSDP gathers as one: found by type and name in diffusers' networks."""

import pytest
from torch import nn

from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.training import sharding
from tests.models.test_networks import DIT
from tests.stages import UNET

NETS = {
    "unet": (NetConfig(name="UNet2DModel", **UNET), None),
    "dit": (NetConfig(name="DiTTransformer2DModel", **DIT), 3),
}


def count(modules):
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


@pytest.mark.parametrize("kind", NETS)
def test_the_units_hold_most_of_a_network_and_none_holds_it_all(kind):
    config, classes = NETS[kind]
    net = networks.build(config, (1, 8, 8), classes, 0)
    units = list(sharding.units(net))
    assert len(units) > 2
    assert count(units) > 0.8 * count([net]), "diffusers' blocks have other names now"
    assert max(count([unit]) for unit in units) < count([net])


def test_the_embedding_that_dits_output_layer_calls_is_a_unit_before_its_block():
    """Else FSDP has freed it with the first block when the output layer calls it."""
    net = networks.build(*(NETS["dit"][0], (1, 8, 8), 3, 0))
    units = list(sharding.units(net))
    shared = net.transformer_blocks[0].norm1.emb
    assert isinstance(shared, nn.Module), "DiT's first block has another place for it now"
    assert units.index(shared) < units.index(net.transformer_blocks[0])
