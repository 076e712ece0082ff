"""Tensors that may lie in shards, asked without importing `torch.distributed.tensor`, which takes a second and is not in every
build of torch: `DTensor` is known by its `full_tensor`.

`_local_tensor` is read for what a process holds because `to_local` is recorded by autograd. Tried on torch 2.8.0 and 2.14.1.
"""

from torch import Tensor, nn


def in_shards(tensor: Tensor) -> bool:
    """Whether a tensor lies in shards."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in shards; every process that holds one must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may lie in shards."""
    held: Tensor = getattr(tensor, "_local_tensor", tensor)
    return held


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor that all processes have, if `like` lies in shards; else the tensor."""
    if not in_shards(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter lies in shards."""
    return any(in_shards(p) for p in model.parameters())
