"""Multiply-adds, counted where torch makes them.

torch's own counter hangs hooks on every module of the process; a mode of the dispatcher sees one thread. Tried on torch 2.8.0 and
2.14.1.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class MultiplyAdds(TorchDispatchMode):
    """Counts, in `total`, the multiply-adds of the products and convolutions inside the block, by torch's own formulas, and those
    of a matrix and a vector, for which it has none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        if operation in (torch.ops.aten.mv, torch.ops.aten.addmv):
            self.total += int(args[operation is torch.ops.aten.addmv].numel())
        elif operation is torch.ops.aten.dot:
            self.total += int(args[0].numel())
        elif operation in flop_registry:
            self.total += flop_registry[operation](*args, **(kwargs or {}), out_val=out) // 2
        return out
