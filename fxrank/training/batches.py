"""What a batch is, how the model is called with it, and what its loss and accuracy are: inferred where it can be,
refused with the fix where not.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrank.distributed.team import Team
from fxrank.passes.model.calls import Call, call_arguments, describe, own_call
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.profiling.timing import autocast
from fxrank.torch_private import pytree

log = logging.getLogger("fxrank")

IGNORED = -100
"""The label that torch's cross-entropy leaves out."""
LossFn = Callable[[Any, Any], Tensor]


def first_batch(loader: Iterable[Any]) -> Any:
    """The first batch of a loader that can be iterated again. Raises `TypeError` or `ValueError` for one that cannot or is
    empty.
    """
    iterator = iter(loader)
    if iterator is loader:
        raise TypeError(
            f"the loader must be iterable again for every epoch; got a one-pass {type(loader).__name__}. Pass a DataLoader or a list of batches."
        )
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError(
            "the loader must yield at least one batch; it is empty. Check the data set, batch_size and drop_last."
        ) from None


def check_validation(loader: Iterable[Any] | None, team: Team) -> None:
    """Raise `TypeError` or `ValueError`, in all processes, for a validation loader that can be iterated only once, or that is
    known to be empty in all of them. Nothing is drawn from it.
    """
    if loader is None:
        return
    if isinstance(loader, Iterator) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(
            f"val_loader must be iterable, and again for every epoch; got {'a one-pass ' * isinstance(loader, Iterator)}{type(loader).__name__}. "
            "Pass a DataLoader or a list of batches."
        )
    lengths = team.gather(known_length(loader))  # one process's share may be empty
    if team.agree(lambda: not any(length is None or length > 0 for length in lengths)):
        raise ValueError(
            "val_loader must yield at least one batch; it is empty (length 0). Check the data set, batch_size and drop_last, or leave it out."
        )


def known_length(loader: Iterable[Any]) -> int | None:
    """How many batches a loader says it has; None for one that does not say."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def to_device(batch: Any, device: torch.device) -> Any:
    """The same nest with every tensor on `device`, copies overlapping where the memory is pinned."""
    return pytree.tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, batch)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """`(inputs, targets)`: the last element of a tuple or list of two or more is the target; a mapping or a tensor
    is all input, its own target.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
        return inputs, batch[-1]
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return batch[0], batch[0]
    return batch, batch


def model_inputs(model: nn.Module, batch: Any) -> Any:
    """What the model is called with: the batch's inputs, and its targets too if they are a list of mappings and the
    forward has an argument `targets` (torchvision's detectors, which return their losses in training mode).
    """
    inputs, targets = split_batch(batch)
    return {"images": inputs, "targets": targets} if takes_targets(model, targets) else inputs


def calls_of(
    model: nn.Module, batches: Iterable[Any], limit: int | None = None, device: torch.device | None = None
) -> Callable[[], Iterator[Call]]:
    """The calls of the model that calibration batches make, in any form that a training loader yields, targets left out, on the
    `device` (the model's), with tensors of their own; anew each time the result is called, `limit` of them at most.

    Raises `TypeError` for what cannot be iterated again, or is a batch itself, and `ValueError` for a limit below 1.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not hasattr(batches, "__iter__") or isinstance(batches, Iterator):
        one_pass = "a one-pass " * isinstance(batches, Iterator)
        raise TypeError(
            f"calibration must be a loader or a list of batches, iterable again; got {one_pass}{type(batches).__name__}. A batch alone goes into a list: [batch]."
        )
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"calibration_batches must be a whole number above 0; got {limit!r}. None takes them all.")
    place = device or next((p.device for p in model.parameters()), torch.device("cpu"))

    def calls() -> Iterator[Call]:
        for batch in islice(batches, limit):
            yield own_call(call_arguments(model, to_device(model_inputs(model, batch), place)))

    return calls


def takes_targets(model: nn.Module, targets: Any) -> bool:
    """See `model_inputs`."""
    listed = isinstance(targets, (list, tuple)) and bool(targets) and all(isinstance(t, Mapping) for t in targets)
    return listed and {"images", "targets"} <= inspect.signature(uncompiled(model).forward).parameters.keys()


@dataclass(frozen=True)
class Outcome:
    """One batch's loss (scalar, differentiable), number of examples, and correct predictions as a device tensor
    (None where accuracy has no meaning).
    """

    loss: Tensor
    examples: int
    correct: Tensor | None
    predictions: int | Tensor


def run_batch(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Outcome:
    """Forward and loss. `loss_fn(outputs, targets)`; for mapping or bare-tensor batches the second argument is the
    batch itself.

    Without `loss_fn`: the model's own `.loss` (or `["loss"]`), the sum of a detector's losses, else cross-entropy for
    integer targets and mean squared error for float ones, of the output, or of the main one (`logits`, `out`) where
    there are auxiliary ones. Raises `TypeError` or `ValueError` that names the shapes where none of that fits.
    """
    _, targets = split_batch(batch)
    args, kwargs = call_arguments(model, model_inputs(model, batch))
    outputs = model(*args, **kwargs)
    loss = loss_of(outputs, targets, batch, loss_fn)
    correct, predictions = _correct(outputs, targets)
    return Outcome(loss, _examples(batch), correct, predictions)


def check_loss(model: nn.Module, batch: Any, device: torch.device, amp: torch.dtype | None) -> None:
    """Infer the loss of a batch in evaluation mode, before anything is changed; leaves the model in training mode. What the
    model itself refuses is left for the tracer to name. Errors as of `run_batch`.
    """
    batch = to_device(batch, device)
    inputs, targets = split_batch(batch)
    if takes_targets(model, targets):
        return  # its losses come in training mode, and there they would leave traces
    args, kwargs = call_arguments(model, inputs)
    devices = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), autocast(device, amp):
            outputs = model(*args, **kwargs)
    except Exception as error:
        log.debug("the model refused the first batch: %s", error)
        return
    finally:
        model.train()
    loss_of(outputs, targets, batch, None)


def loss_of(outputs: Any, targets: Any, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """The scalar loss of one batch's outputs, given or inferred; errors as of `run_batch`."""
    if loss_fn is not None:
        loss = loss_fn(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"loss_fn must return a scalar tensor; got {describe(loss)}.")
        return loss
    untargeted = not (isinstance(batch, (tuple, list)) and len(batch) >= 2)
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(own, Tensor):
        return own
    if (
        isinstance(outputs, Mapping)
        and outputs
        and all(isinstance(v, Tensor) and v.ndim == 0 for v in outputs.values())
    ):
        return torch.stack([*outputs.values()]).sum()
    outputs = _main(outputs)
    if untargeted or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        raise TypeError(
            f"the loss can be inferred for batches (inputs, targets) with tensor outputs, or for models that return .loss; got a batch "
            f"{describe(batch)} and outputs {describe(outputs)}. Pass loss_fn(outputs, targets)."
        )
    if targets.is_floating_point():
        if outputs.shape != targets.shape:
            raise ValueError(
                f"float targets take the mean squared error, with outputs of their shape; got outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}. "
                "Pass loss_fn(outputs, targets)."
            )
        return F.mse_loss(outputs, targets)
    logits, labels = _logits(outputs, targets)
    if logits is None:
        raise ValueError(
            f"integer targets take the cross-entropy, with one more output dimension (classes); got outputs {tuple(outputs.shape)} and targets "
            f"{tuple(targets.shape)}. Pass loss_fn(outputs, targets)."
        )
    return F.cross_entropy(logits, labels)


def _main(outputs: Any) -> Any:
    """The main output where a model returns it beside auxiliary ones (segmentation, Inception, GoogLeNet)."""
    for name in ("logits", "out"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    return outputs


def _logits(outputs: Any, targets: Any) -> tuple[Tensor | None, Tensor]:
    """Outputs as `(N, classes, …)` for integer targets `(N, …)`: torch's order, or classes last as language models
    have it.
    """
    if (
        not isinstance(outputs, Tensor)
        or not isinstance(targets, Tensor)
        or targets.is_floating_point()
        or targets.is_complex()
    ):
        return None, targets
    if outputs.ndim == targets.ndim + 1 and outputs.shape[0] == targets.shape[0]:
        if outputs.shape[2:] == targets.shape[1:]:
            return outputs, targets
        if outputs.shape[:-1] == targets.shape:
            return outputs.flatten(0, -2), targets.flatten()
    return None, targets


def _correct(outputs: Any, targets: Any) -> tuple[Tensor | None, int | Tensor]:
    own = _main(outputs)
    labels = targets.get("labels") if isinstance(targets, Mapping) else targets
    if isinstance(targets, Mapping) and isinstance(labels, Tensor) and labels.ndim != 1:
        return None, 0  # a language model's own loss shifts and masks its labels in ways only it knows
    logits, labels = _logits(own, labels)
    if logits is None:
        return None, 0
    with torch.no_grad():
        counted = labels != IGNORED
        return ((logits.argmax(1) == labels) & counted).sum(), counted.sum()


def _examples(batch: Any) -> int:
    tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.ndim]
    return len(tensors[0]) if tensors else 1
