"""The statistics of BatchNorm measured again, over the inputs that a rewritten model gives it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fxrank.passes.calibration.processes import OfAll, alone, together
from fxrank.passes.errors import CalibrationError
from fxrank.passes.model.calls import Call
from fxrank.passes.model.compiled import eagerly
from fxrank.passes.model.restored import modes_put_back, randoms_put_back, unwritten
from fxrank.torch_private.modules import BatchNorm


def measure_batchnorms(
    model: nn.Module, calls: Callable[[], Iterable[Call]], of_all: OfAll = alone, *, trained: bool = False
) -> int:
    """Set `running_mean` and `running_var` of every BatchNorm that keeps them, or of those alone that are `trained`, in training mode, to those of all its inputs over the calls, and return
    how many there are. Each position counts once, whatever the sizes of the batches, the variance as an unbiased one: a mean of the
    batches' own, as exponential averages and `torch.optim.swa_utils.update_bn` take it, misses what lies between them.

    The layers normalize by the batch meanwhile, all else is in evaluation mode; nothing else of the model is changed. What several processes see is added up. Raises
    `CalibrationError` for statistics that are not finite, naming the layer; then none is set.
    """
    norms = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, BatchNorm) and m.running_mean is not None and (not trained or _trained_alone(m))
    }
    if not norms:
        return 0
    sums = {name: _Sums() for name in norms}
    hooks = [norm.register_forward_pre_hook(sums[name].add) for name, norm in norms.items()]
    try:
        with (
            torch.random.fork_rng(),
            randoms_put_back(model),
            unwritten(model),
            torch.no_grad(),
            eagerly(model),
            modes_put_back(model),
        ):
            model.eval()
            for norm in norms.values():
                norm.train()

            def run() -> None:
                for args, kwargs in calls():
                    model(*args, **kwargs)

            together(run, of_all)
    finally:
        for hook in hooks:
            hook.remove()
    for name, own in list(sums.items()):
        found = sums[name] = _Sums.added(of_all(own.on_cpu()))  # what others send would lie on their devices
        if found.count > 1 and not all(torch.isfinite(t).all() for t in found.moments()):
            raise CalibrationError(
                f"the inputs of a BatchNorm must be finite to measure its statistics; those of {name!r} are not. Check the calibration data"
                + ("." if trained else ", or pass recalibrate=False.")
            )
    with torch.no_grad():
        for name, norm in norms.items():
            if sums[name].count > 1:  # else no call reached it
                mean, var = sums[name].moments()
                for buffer, value in ((norm.running_mean, mean), (norm.running_var, var)):
                    assert buffer is not None
                    buffer.copy_(value)
    return len(norms)


def _trained_alone(norm: BatchNorm) -> bool:
    """In training mode, and of one process's batches: another would wait for as many calls of each process."""
    return norm.training and not isinstance(norm, nn.SyncBatchNorm)


class _Sums:
    """Of one layer's inputs, by channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook. Chan, Golub & LeVeque's update: exact whatever the means."""
        x = inputs[0].to(torch.float64)
        over = [d for d in range(x.ndim) if d != 1]
        n = x.numel() // x.shape[1]
        norm.training = n > 1  # one position alone has no variance to normalize by
        if not n:
            return
        self.take(n, x.mean(over), x.var(over, correction=0) * n)

    def on_cpu(self) -> "_Sums":
        self.mean, self.squares = (torch.as_tensor(t).cpu() for t in (self.mean, self.squares))
        return self

    @classmethod
    def added(cls, all_of_them: "list[_Sums]") -> "_Sums":
        """Of the inputs of all of these together."""
        first, *others = all_of_them
        for other in others:
            if other.count:
                first.take(other.count, other.mean, other.squares)
        return first

    def take(self, n: int, mean: Tensor | float, squares: Tensor | float) -> None:
        off = torch.as_tensor(mean - self.mean)
        total = self.count + n
        self.squares = self.squares + squares + off.square() * (self.count * n / total)
        self.mean = self.mean + off * (n / total)
        self.count = total

    def moments(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.mean, Tensor) and isinstance(self.squares, Tensor)
        return self.mean, self.squares / (self.count - 1)
