"""Whether a run's weights are numbers still. What diverges does not come back, so a run that goes on only overwrites what was good."""

import torch
from torch import Tensor, nn

from fxrank.passes.errors import NonFiniteWeightError
from fxrank.torch_private.dtensor import local

_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def not_finite(model: nn.Module) -> list[str]:
    """The names of the parameters and buffers that hold NaN or infinity; the device is waited for once."""
    names, flags = [], []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if _is_checked(part := local(tensor.detach())):
            names.append(name)
            flags.append(torch.isfinite(part).all())
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    return [name for name, good in zip(names, finite, strict=True) if not good]


def _is_checked(tensor: Tensor) -> bool:
    return tensor.dtype in _CHECKED and tensor.layout is torch.strided and not tensor.is_meta


class FiniteWeights:
    """Keeps watch over one model: what is finite when the run begins, and what comes at the switch, must stay so. A mask
    of infinities that a model is built with is no fault.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._always = frozenset(not_finite(model))

    def broken(self) -> list[str]:
        """The names of what is finite no longer."""
        return [name for name in not_finite(self._model) if name not in self._always]

    def check(self, step: int) -> None:
        """Raise `NonFiniteWeightError` that names the first, if there is one."""
        if names := self.broken():
            raise NonFiniteWeightError(
                f"weights must stay finite; after step {step} {names[0]!r} holds NaN or infinity"
                f"{f', and {len(names) - 1} more' if len(names) > 1 else ''}. Lower the learning rate, or look for a bad batch."
            )
