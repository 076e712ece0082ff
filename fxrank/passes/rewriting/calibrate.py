"""Extra BatchNorm between the factors, set so that the function does not jump.

A fresh BatchNorm after `u` changes what a model computes in training mode (22 % relative on an untrained ResNet-18).
Here its scale and shift are set to the standard deviation and mean of its own input on one batch, and
its running statistics to the same: it then starts as the identity, in training mode on that batch and in evaluation
mode everywhere, and training takes it from there.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fxrank.passes.model.calls import Example, call_arguments
from fxrank.passes.model.compiled import eagerly
from fxrank.passes.model.restored import randoms_put_back, unwritten
from fxrank.passes.pairs.reading.weight import Norm
from fxrank.torch_private import pytree


def calibrate_on(
    example: Example,
    model: nn.Module,
    norms: Iterable[Norm | None],
    share: Callable[[Iterable[Tensor]], None] | None = None,
) -> None:
    """`calibrate` with a batch, if there is one, and with the norms that there are. `share` gives all processes the first
    one's numbers.
    """
    listed = [norm for norm in norms if norm is not None]
    if not listed or example is None:
        return
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def as_model(tensor: Tensor) -> Tensor:  # which may have changed its dtype since
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    args, kwargs = pytree.tree_map_only(Tensor, as_model, call_arguments(model, example))
    with eagerly(model):
        calibrate(listed, model, lambda: model(*args, **kwargs))
    if share is not None:
        share(t for norm in listed for t in (*norm.parameters(), *norm.buffers()))


def calibrate(norms: Iterable[Norm], model: nn.Module, run: Callable[[], object]) -> None:
    """Make each of `norms` the identity on the inputs that `run()` (one call of `model`) sends through it.

    One forward pass without gradients; the model's other buffers, parameters and the random state are put back.
    """
    norms = list(norms)
    kept = {id(t) for norm in norms for t in (*norm.parameters(), *norm.buffers())}

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, Norm) and norm.running_mean is not None and norm.running_var is not None
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
        over = [0, *range(2, x.ndim)]
        mean, var = x.mean(over), x.var(over, correction=0)
        norm.weight.copy_((var + norm.eps).sqrt())
        norm.bias.copy_(mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)

    def undo_update(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        measure(norm, inputs)
        assert isinstance(norm, Norm) and norm.num_batches_tracked is not None
        norm.num_batches_tracked.zero_()

    hooks = [n.register_forward_pre_hook(measure) for n in norms] + [
        n.register_forward_hook(undo_update) for n in norms
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        drawn = torch.random.fork_rng(devices=list(devices))
        with drawn, randoms_put_back(model), unwritten(model, but=kept), torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
