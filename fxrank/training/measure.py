"""Counting what a training step costs: memory, parameters, multiply-adds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxrank.plan import Plan
from fxrank.torch_private.dtensor import local


class StepMemory:
    """Peak training memory of the steps made inside the `with` block, in bytes.

    On a GPU the allocator's own peak. On a CPU, which keeps no such count: parameters, buffers, gradients,
    optimizer state, and everything autograd saved for the backward pass, each storage once. `peak_bytes` is
    readable after the block.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._device = next(model.parameters()).device
        self._saved: dict[int, int] = {}
        self.peak_bytes = 0

    def __enter__(self) -> "StepMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
            self._hooks.__enter__()
        return self

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *error: Any) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._hooks.__exit__(*error)
        held: dict[int, int] = dict(self._saved)
        for tensor in map(local, [*self._model.parameters(), *self._model.buffers()]):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        gradients = sum(local(p).nbytes for p in self._model.parameters() if p.requires_grad)
        state = sum(
            local(v).nbytes for s in self._optimizer.state.values() for v in s.values() if isinstance(v, Tensor)
        )
        self.peak_bytes = sum(held.values()) + gradients + state


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def planned_macs(plan: Plan) -> tuple[int, int]:
    """Multiply-adds of all weight layers in one forward call at the example's batch size, dense and as planned."""
    dense = sum(layer.macs for layer in plan.layers)
    return dense, sum(layer.macs if layer.pair_macs is None else layer.pair_macs for layer in plan.layers)


def predicted_speedup(plan: Plan, dense_ms: dict[str, float], step_ms: float) -> float | None:
    """Full step over low-rank step, from the layers' own measurements: the step less what each pair saves. None
    without measurements.
    """
    savings = [
        dense_ms[d.name] * (1 - 1 / d.speedup) for d in plan.layers if d.factorized and d.speedup and d.name in dense_ms
    ]
    return step_ms / (step_ms - sum(savings)) if savings and sum(savings) < step_ms else None


def median(values: Sequence[float], skip: int = 3) -> float | None:
    """Median without the first `skip` values (warm-up); None if nothing is left."""
    kept = sorted(list(values)[skip:])
    return kept[len(kept) // 2] if kept else None
