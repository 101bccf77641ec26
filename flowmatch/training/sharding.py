"""Parameters shared out over the processes (FSDP2), and tensors made whole again.

The only place that knows of it: to the loop a sharded network is a network, and a checkpoint holds whole
tensors either way, so a run may go on with another number of processes, sharded or not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowmatch.runs.process import leads, world_size


def shard(net: Any, device: torch.device) -> None:  # collective: every rank
    """Give each process its share of a network's parameters, in place, on its device.

    A unit is gathered whole for its forward and backward pass and freed after them. The float32
    weights themselves are gathered, and autocast rounds them as it does without sharding: FSDP's own
    mixed precision would round the timestep to bfloat16, too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for unit in [*units(net), net]:
        fully_shard(unit, mesh=mesh)


def units(net: nn.Module) -> Iterator[nn.Module]:
    """List what is gathered as one: the blocks of a network, inner ones first.

    The output layer of diffusers' DiT calls the embedding inside its first block, which is therefore
    a unit of its own.
    """
    for name, child in net.named_children():
        if name == "transformer_blocks" and hasattr(child[0], "norm1"):  # type: ignore[index]
            emb = getattr(child[0].norm1, "emb", None)  # type: ignore[index]
            if emb is not None:
                yield emb
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name == "mid_block" and child is not None:
            yield child


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:  # collective: every rank
    """Make tensors whole, one after another: on rank 0, sharded ones on its CPU; elsewhere none."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if leads():
            found[name] = tensor if whole is tensor else whole.cpu()
    return found


def lay_out(whole: Tensor, like: Tensor) -> Tensor:  # collective where it is sharded
    """Lay a whole tensor out like another one: its device, strides and share."""
    if not hasattr(like, "full_tensor"):
        return torch.empty_like(like).copy_(whole)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
