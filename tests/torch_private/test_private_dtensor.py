import torch
from teams import team
from torch import nn

from fxrank.torch_private.dtensor import in_shards, is_sharded, local, placed_like, whole


def test_a_plain_tensor_is_itself():
    tensor = torch.randn(3)
    assert whole(tensor) is local(tensor) is placed_like(tensor, tensor) is tensor
    assert not in_shards(tensor) and not is_sharded(nn.Linear(2, 2))


def spread(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    full = torch.arange(12.0).reshape(4, 3)
    sharded = distribute_tensor(full, init_device_mesh("cpu", (size,)), [Shard(0)])
    placed = placed_like(full * 2, sharded)
    layer = nn.Linear(3, 4)
    before = is_sharded(layer)
    layer.weight = nn.Parameter(sharded)
    return (
        in_shards(sharded),
        whole(sharded).tolist() == full.tolist(),
        local(sharded).tolist() == full.chunk(size)[rank].tolist(),
        type(placed) is type(sharded) and placed.placements == sharded.placements,
        local(placed).tolist() == (2 * full).chunk(size)[rank].tolist(),
        (before, is_sharded(layer)) == (False, True),
    )


def test_a_tensor_in_shards_is_gathered_and_read_and_another_placed_like_it():
    assert team(spread, 2) == [(True,) * 6] * 2
