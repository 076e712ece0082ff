"""Processes that torchrun has started: their group, and each one's share of the data."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler


@contextmanager
def launched() -> Iterator[torch.device | None]:
    """Join the group of processes that `torchrun` started this one in, for the time of the block, and give its device:
    NCCL and one GPU each where there are GPUs, else gloo. None for a process on its own.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield None
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def in_shares(loader: Any) -> Any:
    """The loader over this process's share of the data; itself for a process on its own.

    Raises `TypeError` for anything but a `DataLoader` with a batch size of its own, or a loader with
    `share(part, parts)`: other data cannot be divided from here.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return loader
    if hasattr(loader, "share"):
        return loader.share(dist.get_rank(), dist.get_world_size())
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        raise TypeError(
            f"several processes divide the data of a torch DataLoader with a batch_size; got {type(loader).__name__}. Return a DataLoader, "
            "or a loader with share(part, parts)."
        )
    shuffled = isinstance(loader.sampler, RandomSampler)
    sampler: DistributedSampler[Any] = DistributedSampler(loader.dataset, shuffle=shuffled, drop_last=loader.drop_last)
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
    )
