"""What a model computes inside, and leaves behind: outputs alone may hide that it has become another.

A codebook rounds a wrong scale away, an average of weights shows in later calls only.
"""

from collections.abc import Collection
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fxrank.torch_private import pytree
from fxrank.torch_private.kernels import is_of_functorch
from fxrank.torch_private.modules import own_parameters, times_written


class Inside(NamedTuple):
    """Of one run of a model."""

    outputs: Any
    of_modules: dict[str, dict[int, list[Tensor]]]
    """What each module was given and has returned in all its calls, by its name and the number of calls: another number is no ground for
    comparison.
    """
    weights: dict[str, Tensor]
    """Weights that the forward has written into, as it leaves them, by the names of their modules."""


class SeenInside(nn.Module):
    """A model that returns an `Inside`. `written` are the names of the modules whose weights are looked at; without them it is
    those of a weight that is written into. For models that nobody else runs meanwhile, as it takes hooks.
    """

    def __init__(self, model: nn.Module, written: Collection[str] | None = None) -> None:
        super().__init__()
        self.model, self.written = model, written

    def forward(self, *args: Any, **kwargs: Any) -> Inside:
        calls: dict[str, list[list[Tensor]]] = {}

        def look(name: str, *call: Any) -> None:
            calls.setdefault(name, []).append(_copied(call))

        handles = [
            module.register_forward_hook(lambda _, *call, name=name: look(name, *call), with_kwargs=True)
            for name, module in self.model.named_modules()
            if name and not isinstance(module, torch.jit.ScriptModule)
        ]
        before = {n: times_written(w) for n, w in self._weights().items() if not w.is_inference()}
        try:
            outputs = self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        written = self.written
        if written is None:
            now = self._weights()
            written = [name for name, times in before.items() if name in now and times_written(now[name]) != times]
        weights = {n: cast(Tensor, self.model.get_submodule(n).weight).detach().clone() for n in written}
        of_modules = {name: {len(outs): [x for out in outs for x in out]} for name, outs in calls.items()}
        return Inside(outputs, of_modules, weights)

    def _weights(self) -> dict[str, Tensor]:
        modules = [(n, m) for n, m in self.model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
        own = {name: own_parameters(module).get("weight") for name, module in modules}
        return {name: weight for name, weight in own.items() if weight is not None}


def _copied(call: Any) -> list[Tensor]:
    """Its numbers, as others may write into the tensors."""
    tensors = (x for x in pytree.tree_leaves(call) if isinstance(x, Tensor) and not is_of_functorch(x))
    return [x.detach().clone() for x in tensors if x.layout is torch.strided]
