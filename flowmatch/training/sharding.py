"""Split parameters over the processes (FSDP2), and gather them again.

Other modules treat a sharded network like any network. A checkpoint holds whole tensors in both cases:
a run can go on with another number of processes, sharded or not.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from flowmatch.models.network import Network
from flowmatch.runs.process import leads, world_size


def shard(net: Network, device: torch.device) -> None:  # collective: every rank
    """Split a network's parameters over the processes, in place.

    Each of its `units` is gathered for its forward and backward pass and freed after them. The float32
    weights are gathered, and autocast rounds them as it does without sharding: FSDP's own mixed
    precision would round the timestep to bfloat16, too.

    Args:
        net: A diffusers model.
        device: The device of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    assert isinstance(net, nn.Module)
    for unit in [*units(net), net]:
        fully_shard(unit, mesh=mesh)


def units(net: nn.Module) -> Iterator[nn.Module]:
    """Return the modules that are gathered as one: the blocks of a network, inner ones first.

    The output layer of diffusers' DiT calls the embedding inside its first block, which is therefore a
    unit of its own.
    """
    from diffusers.models.normalization import AdaLayerNormZero

    for name, child in net.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            norm = getattr(child[0], "norm1", None)
            if isinstance(norm, AdaLayerNormZero) and norm.emb is not None:
                yield norm.emb
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name == "mid_block" and child is not None:
            yield child


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:  # collective: every rank
    """Gather tensors, one after another.

    Returns:
        On rank 0 the whole tensors, sharded ones on the CPU; on other ranks an empty dict.
    """
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if leads():
            gathered[name] = tensor if whole is tensor else whole.cpu()
    return gathered


def lay_out(whole: Tensor, like: Tensor) -> Tensor:  # collective where it is sharded
    """Copy a whole tensor to the layout of another one.

    Args:
        whole: The tensor.
        like: A tensor of the same shape, whose device, strides and split over the processes it takes.

    Returns:
        The copy.
    """
    if not hasattr(like, "full_tensor"):
        return torch.empty_like(like).copy_(whole)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
