"""Real groups of processes for tests: gloo on this machine, forked from a server that has torch in memory."""

import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "fxrank", "teams"])


def _member(function, rank, size, store, results, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        value = function(rank, size, *args)
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def team(function, size, *args, timeout=120):
    """What `function(rank, size, *args)` returns in each of `size` processes, in order of their ranks."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        results = _SERVER.Queue()
        members = [
            _SERVER.Process(
                target=_member, args=(function, r, size, Path(folder) / "store", results, args), daemon=True
            )
            for r in range(size)
        ]
        for member in members:
            member.start()
        try:
            answers = sorted((results.get(timeout=timeout) for _ in members), key=lambda answer: answer[0])
        finally:
            for member in members:
                member.join(5)
                member.kill()
    failures = [f"process {rank}:\n{failure}" for rank, _, failure in answers if failure is not None]
    assert not failures, "\n".join(failures)
    return [value for _, value, _ in answers]
