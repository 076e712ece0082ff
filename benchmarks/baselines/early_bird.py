"""EB Train: channels pruned early in the training, when it has become clear which (You et al. 2020).

The scales γ of the BatchNorms are pushed towards zero by an L1 penalty. After each epoch a mask keeps the channels with the largest ones, and
when masks hardly differ any more from those before, the ticket is drawn: the channels that the mask leaves out are taken out of the network, which
trains on. A mask with γ = β = 0 makes a channel zero, so the thinner network computes what the masked one did.
"""

import importlib
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.baselines.base import CPU, Run, Trained, sample
from benchmarks.subjects.jobs import size
from benchmarks.subjects.tasks import Task
from fxrank.passes.model.calls import at_other_batch_size, call_arguments
from fxrank.training.batches import model_inputs

CLOSE = 1e-4
"""How far the thinner network's outputs may be from the masked one's, of the largest of these: sums in another order."""


@dataclass(frozen=True)
class Stream:
    """Channels that go through one BatchNorm: `places` are theirs in it. `cuts` are the parameters that shrink with them, each with the dimension
    and, for its places there, the channels. `take_out` removes channels from everything.
    """

    norm: _BatchNorm
    places: Tensor
    cuts: tuple[tuple[nn.Parameter, int, Tensor], ...]
    take_out: Callable[[list[int]], None]

    @property
    def scales(self) -> Tensor:
        """|γ| of each channel, `(channels,)`."""
        return self.norm.weight.detach().cpu()[self.places].abs()


def streams(model: nn.Module, batch: Any) -> list[Stream]:
    """The streams of a model's channels, by torch-pruning's dependency graph; where several BatchNorms write to the same channels, as around
    shortcuts, or read them, there is none.

    Raises `ModuleNotFoundError` where the library is not installed, `ValueError` for a model without any.
    """
    found = []
    if any(isinstance(m, _BatchNorm) and m.affine for m in model.modules()):
        try:
            tp = importlib.import_module("torch_pruning")
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "EB Train takes channels out of a network with torch-pruning, which is not installed. pip install 'fxrank[runs]'"
            ) from None
        graph = tp.DependencyGraph().build_dependency(
            model, example_inputs=_call(model, batch), forward_fn=lambda m, c: m(*c[0], **c[1]), verbose=False
        )
        for group in list(graph.get_all_groups(root_module_types=[nn.modules.conv._ConvNd, nn.Linear])):
            norms = [item for item in group if isinstance(item.dep.target.module, _BatchNorm)]
            if len(norms) == 1 and norms[0].dep.target.module.affine:
                found.append(_stream(graph, group, norms[0]))
    if not found:
        raise ValueError(
            f"EB Train ranks channels by the scales of the BatchNorms that they go through; {type(model).__name__} has none with channels of its own. "
            "Choose a model with BatchNorm."
        )
    return found


def _stream(graph: Any, group: Any, norm: Any) -> Stream:
    root = group[0].dep

    def take_out(channels: list[int]) -> None:
        graph.get_pruning_group(root.target.module, root.handler, channels).prune()

    places = torch.empty(len(group[0].idxs), dtype=torch.long)
    places[torch.tensor(norm.root_idxs)] = torch.tensor(norm.idxs)
    cuts = tuple(
        (parameter, 0 if out else 1, torch.tensor(item.root_idxs))
        for item in group
        for out in [graph.is_out_channel_pruning_fn(item.dep.handler)]
        for parameter in item.dep.target.module.parameters(recurse=False)
        if out or parameter.ndim > 1
    )
    return Stream(norm.dep.target.module, places, cuts, take_out)


def _call(model: nn.Module, batch: Any) -> Any:
    """A call of the model with a few rows of a batch."""
    return at_other_batch_size(*call_arguments(model, model_inputs(model, batch)))


def masks(scales: Sequence[Tensor], out: int) -> list[Tensor]:
    """Of the scales of several streams, which channels are kept: all but so many of all together with the smallest ones, but in each stream at
    least the largest.
    """
    flat = torch.cat(list(scales))
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[:out]] = False
    found = list(kept.split([len(s) for s in scales]))
    for mask, of_stream in zip(found, scales, strict=True):
        mask[of_stream.argmax()] = True
    return found


def size_with(model: nn.Module, found: Sequence[Stream], kept: Sequence[Tensor]) -> int:
    """Parameters of the model without the channels that are masked."""
    shapes = {id(p): list(p.shape) for p in model.parameters()}
    for stream, mask in zip(found, kept, strict=True):
        for parameter, dim, channels in stream.cuts:
            shapes[id(parameter)][dim] -= int((~mask[channels]).sum())
    return sum(math.prod(shape) for shape in shapes.values())


def largest(model: nn.Module, found: Sequence[Stream], limit: float) -> list[Tensor]:
    """The masks that leave out as few channels as leave no more than so many parameters. `ValueError` if too many are left in any case."""
    scales = [stream.scales for stream in found]
    total = sum(len(s) for s in scales)
    out = bisect_left(range(total + 1), True, key=lambda k: size_with(model, found, masks(scales, k)) <= limit)
    if out > total:
        least = size_with(model, found, masks(scales, total))
        raise ValueError(
            f"EB Train leaves at least one channel of each BatchNorm, and those around shortcuts: {least} parameters; "
            f"the share given allows {limit:.0f}. Raise share."
        )
    return masks(scales, out)


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The share of channels that one mask keeps and the other does not (Hamming distance; §3.2)."""
    a, b = torch.cat(list(one)), torch.cat(list(other))
    return float((a != b).float().mean())


def silence(found: Sequence[Stream], kept: Sequence[Tensor]) -> None:
    """Set γ and β of masked channels to zero, in place."""
    with torch.no_grad():
        for stream, mask in zip(found, kept, strict=True):
            out = stream.places[~mask].to(stream.norm.weight.device)
            stream.norm.weight[out] = 0
            stream.norm.bias[out] = 0


def thin(model: nn.Module, found: Sequence[Stream], kept: Sequence[Tensor], batch: Any) -> None:
    """Take masked channels out of the model, in place. Raises `ValueError` if it then computes anything else than with them at zero: in
    evaluation, on the batch.
    """
    args, kwargs = _call(model, batch)
    silence(found, kept)
    was_training = model.training
    with torch.no_grad():
        before = model.eval()(*args, **kwargs)
        for stream, mask in zip(found, kept, strict=True):
            if out := (~mask).nonzero().flatten().tolist():
                stream.take_out(out)
        after = model(*args, **kwargs)
    model.train(was_training)
    alike = before.shape == after.shape
    gap = float((before - after).abs().max() / before.abs().max().clamp_min(1e-12)) if alike else math.inf
    if gap > CLOSE:
        raise ValueError(
            f"a channel with γ = β = 0 must do nothing to the output; without such channels that of {type(model).__name__} differs by {gap:.1e} of it. "
            "EB Train needs a BatchNorm after every convolution, and activations that leave 0 at 0."
        )


@dataclass(frozen=True, kw_only=True)
class EarlyBird:
    """Train with a penalty `sparsity · Σ|γ|` on BatchNorms' scales until the mask that leaves no more than the share `share` of all parameters
    is nearer than `threshold` to each of the `queue` masks of the epochs before, at the latest after the share `latest` of the run; then train the
    thinner network to the end of it. The optimizer's momentum begins anew there, the schedule goes on.

    The paper gives the share of channels that are left out, and has five masks of 160 epochs in its queue (§3.2); a run of a few epochs has none
    to wait for. Channels that a shortcut ties together stay: by their scales whole stages of ResNet-20 went first, but for one channel. Needs
    torch-pruning, a BatchNorm after each convolution, and a model that gives a tensor.
    """

    share: float = 0.5
    threshold: float = 0.1
    queue: int = 1
    sparsity: float = 1e-4
    latest: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not 0 < self.latest < 1 or self.queue < 1:
            raise ValueError(
                f"share and latest must be between 0 and 1, queue at least 1; got {self.share}, {self.latest} and {self.queue}."
            )

    def sized(self, share: float) -> "EarlyBird":
        """With no more than this share of the parameters."""
        return replace(self, share=share)

    def __call__(self, task: Task, epochs: int, seed: int, device: torch.device = CPU) -> Trained:
        """`facts`: the epochs before the ticket, whether the masks had settled, their distances, and the channels before and after."""
        if epochs < 2:
            raise ValueError(
                f"EB Train draws its ticket after an epoch and trains on; got epochs={epochs}. Give 2 or more."
            )
        started = time.perf_counter()
        run = Run(task, task.build(seed), epochs, seed, device)
        dense, batch = size(run.model), sample(task, device)
        found = streams(run.model, batch)
        drawn: list[list[Tensor]] = []
        distances: list[float] = []
        facts: dict[str, Any] = {}

        def push() -> None:
            for stream in found:
                gamma = stream.norm.weight
                assert gamma.grad is not None
                gamma.grad += self.sparsity * gamma.detach().sign()

        def look() -> None:
            if facts:
                return
            mask = largest(run.model, found, self.share * dense)
            near = [distance(mask, other) for other in drawn[-self.queue :]]
            distances.extend(near[-1:])
            drawn.append(mask)
            settled = len(near) == self.queue and max(near) < self.threshold
            epoch = run.step // run.per_epoch
            if not settled and epoch < min(self.latest * epochs, epochs - 1):
                return
            channels, kept = [len(m) for m in mask], [int(m.sum()) for m in mask]
            facts.update(ticket_epoch=epoch, settled=settled, distances=distances, channels=channels, kept=kept)
            run.before_step.remove(push)
            names = {id(p): name for name, p in run.model.named_parameters()}
            thin(run.model, found, mask, batch)
            run.adopt(names)

        run.before_step.append(push)
        run.after_epoch.append(look)
        run.train()
        return Trained(run.model, dense, size(run.model), time.perf_counter() - started, facts)
