"""Split parameters over the processes (FSDP2), and gather them again.

Other modules treat a sharded network like any network. A checkpoint holds the rows of each process
(`behind`): a run can go on with another number of processes, sharded or not.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowmatch.config import UserError
from flowmatch.models.network import Network
from flowmatch.runs import parts
from flowmatch.runs.process import leads, world_size


def processes_of(shard: bool | str) -> int:
    """Return over how many processes `fit.shard` splits: those of the job, or of one machine.

    Raises:
        UserError: The machines have different numbers of processes, or one each.
    """
    if shard != "machine":
        return world_size() if shard else 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if local < 2 or world_size() % local:
        raise UserError(
            f"fit.shard=machine: {world_size()} processes, {local} of them on this machine; expected "
            "the same number on each, two or more, or use fit.shard=true"
        )
    return local


def shard(net: Network, device: torch.device, share: int) -> None:  # collective: every rank
    """Split a network's parameters over the processes, in place.

    Each of its `units` is gathered for its forward and backward pass and freed after them. The float32
    weights are gathered, and autocast rounds them as it does without sharding: FSDP's own mixed
    precision would round the timestep to bfloat16, too.

    Args:
        net: A diffusers model.
        device: The device of this process.
        share: Number of consecutive processes that hold one copy together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape = (world_size(),) if share == world_size() else (world_size() // share, share)
    names = ("machine", "share")[-len(shape) :]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
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


def rows_of(tensor: Any) -> tuple[int, int]:
    """Return the numbers of the first row of a split tensor that is held here, and of the one after.

    FSDP cuts the rows into as many pieces of one size as there are processes; the last may be smaller,
    or empty.
    """
    (at,) = [i for i, place in enumerate(tensor.placements) if place.is_shard(0)]
    size = -(-tensor.shape[0] // tensor.device_mesh.size(at))
    first = min(tensor.device_mesh.get_local_rank(at) * size, tensor.shape[0])
    local = tensor.to_local()
    assert local.shape[0] == min(size, tensor.shape[0] - first), "FSDP cuts rows in another way now"
    return first, first + local.shape[0]


def pieces(tensors: Mapping[str, Tensor]) -> dict[str, parts.Piece]:
    """Copy what this process writes of some tensors: its rows of split ones; process 0 all others."""
    found = {}
    for name, tensor in tensors.items():
        if is_split(tensor):
            first, end = rows_of(tensor)
            if holds_first_copy(tensor) and (end > first or first == 0):
                local = tensor.to_local().detach()  # type: ignore[attr-defined]
                found[name] = parts.Piece(copied(local), first, tensor.shape[0])
        elif leads():
            found[name] = parts.Piece(copied(tensor.detach()))
    return found


def holds_first_copy(tensor: Any) -> bool:
    """Return whether this process belongs to the first of the machines that hold a split tensor."""
    mesh = tensor.device_mesh
    copies = [i for i, place in enumerate(tensor.placements) if place.is_replicate()]
    return all(mesh.get_local_rank(i) == 0 for i in copies)


def copied(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU."""
    return tensor.cpu() if tensor.device.type != "cpu" else tensor.clone().contiguous()


def is_split(tensor: Any) -> bool:
    """Return whether a tensor is split over the processes."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def fill(tensor: Tensor, saved: Any) -> None:
    """Fill a tensor, or the rows of it that are held here, from a whole one or from `parts.Rows`."""
    if is_split(tensor):
        tensor.to_local().copy_(parts.some(saved, *rows_of(tensor)))  # type: ignore[attr-defined]
    else:
        tensor.copy_(parts.whole(saved))


def lay_out(saved: Any, like: Tensor) -> Tensor:
    """Copy a tensor to the layout of another one.

    Args:
        saved: The whole tensor, or its `parts.Rows`.
        like: A tensor of the same shape, whose device, strides and split over the processes it takes.

    Returns:
        The copy.
    """
    found = torch.empty_like(like)
    fill(found, saved)
    return found
