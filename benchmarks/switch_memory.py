"""What the switch needs beside the model: peak of what it allocates, against the factors, their optimizer state and one layer.

    python -m benchmarks.switch_memory

The dense weights are freed one after another while the factors come, so the peak stays below what is new in the end and one
copy of the largest layer; where ranks are chosen by outputs, pairs are tried in a copy of the model before, and moments of what layers
give are held for a while. On a CPU what Python allocates is traced as well, for numpy's arrays; what stays of it in the end,
the nodes of the graph, is `python` and no part of the share.
"""

import argparse
import contextlib
import gc
import importlib
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxrank
from benchmarks import record
from benchmarks.subjects.models import resnet18
from fxrank.passes.rewriting.install import pairs_in


class NewBytes(TorchDispatchMode):
    """Peak of the memory that is allocated on the CPU inside the block and not yet freed: torch's storages, and what Python
    traces (numpy's arrays).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {_storage(t) for t in _tensors((args, kwargs))}
        outputs = function(*args, **(kwargs or {}))
        for tensor in _tensors(outputs):
            key = _storage(tensor)
            if key not in known and key not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                self.now += self.sizes[key]
                weakref.finalize(tensor.untyped_storage(), self._gone, key)
        self.peak = max(self.peak, self.now + tracemalloc.get_traced_memory()[0])
        return outputs

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def _tensors(tree: Any) -> list[Tensor]:
    found = [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.device.type == "cpu"]
    return [t for t in found if not isinstance(t, FakeTensor)]  # those of a graph have sizes only


@contextlib.contextmanager
def new_bytes(device: torch.device) -> Iterator[dict[str, int]]:
    """The `peak` of what the block allocates, and what stays of Python's own objects (`python`), when it has ended."""
    found: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found |= {"peak": torch.cuda.max_memory_allocated(device) - before, "python": 0}
        return
    tracemalloc.start()
    try:
        with NewBytes() as memory:
            yield found
        gc.collect()
        found |= {"peak": memory.peak, "python": tracemalloc.get_traced_memory()[0]}
    finally:
        tracemalloc.stop()


def vit_small() -> nn.Module:
    """timm's ViT-small with patches of 4×4 for 32×32 images."""
    sizes = {"img_size": 32, "patch_size": 4, "num_classes": 10}
    model: nn.Module = importlib.import_module("timm").create_model("vit_small_patch16_224", **sizes)
    return model


POLICIES = {
    "weights": fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", ratio=0.25, latest=1.0, wait=False),
    "outputs": fxrank.Cuttlefish(keep=0.01, speedup_threshold=None, latest=1.0, wait=False),
}
"""Cuttlefish at a quarter of full rank, and by what the model gives, which is little but noise here, so that hardly any of it is kept."""


def switch(
    model: nn.Module, x: Tensor, y: Tensor, policy: fxrank.Policy, kind: type[torch.optim.Optimizer], **options: Any
) -> dict[str, Any]:
    """Two steps of training, then the switch by the policy; bytes."""
    weights = sum(p.nbytes for p in model.parameters())
    optimizer = kind(model.parameters(), lr=0.01, **options)  # type: ignore[call-arg]
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=9, steps_per_epoch=1, policy=policy
    )
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    with new_bytes(x.device) as found:
        session._switch("now")
    pairs = list(pairs_in(model).values())
    factors = [p for pair in pairs for p in (pair.u.weight, pair.v.weight)]
    return {
        "weights": weights,
        "factors": sum(p.nbytes for p in factors),
        "factor_state": sum(t.nbytes for p in factors for t in optimizer.state[p].values() if isinstance(t, Tensor)),
        "largest_layer": max(4 * d.parameters for d in session.plan.layers if d.factorized) if session.plan else 0,
        **found,
        "pairs": len(pairs),
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    device = torch.device(options.device)
    results = {}
    for name, build, side in (("resnet18", resnet18, 32), ("vit_small", vit_small, 32)):
        for kind, more in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})):
            torch.manual_seed(0)
            x = torch.randn(4, 3, side, side, device=device)
            for by, policy in POLICIES.items():
                found = switch(build().to(device), x, torch.arange(4, device=device), policy, kind, **more)
                limit = found["factors"] + found["factor_state"] + found["largest_layer"]
                found["share_of_limit"] = (found["peak"] - found["python"]) / limit
                found["share_of_weights"] = (found["peak"] - found["python"]) / found["weights"]
                results[f"{name}, {kind.__name__}, by {by}"] = found
    columns = ("weights", "factors", "factor_state", "largest_layer", "peak", "python")
    print(
        tabulate(
            [
                (
                    n,
                    *(f"{r[c] / 1e6:.1f} MB" for c in columns),
                    f"{r['share_of_limit']:.2f}",
                    f"{r['share_of_weights']:.2f}",
                )
                for n, r in results.items()
            ],
            headers=("", *columns, "share of the limit", "of the weights"),
        )
    )
    return record.write(
        "switch_memory",
        {"configuration": {"device": options.device}, "results": results},
        device=device,
        folder=options.results,
    )


if __name__ == "__main__":
    print(f"written: {main().name}")
