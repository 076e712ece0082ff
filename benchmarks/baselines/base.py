"""What the baselines share: what each takes and returns, one plain training loop, and which weights they may prune."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.lr_scheduler import ReduceLROnPlateau

from benchmarks.real_runs import evaluate
from benchmarks.subjects.jobs import size
from benchmarks.subjects.tasks import Task
from fxrank.passes.model.calls import call_arguments
from fxrank.training.batches import first_batch, model_inputs, run_batch, to_device

CPU = torch.device("cpu")
MASK = "weight_mask"
"""What `torch.nn.utils.prune` calls the mask of a weight."""
Layers = dict[str, nn.Module]
"""By name, in the order in which the model calls them."""


@dataclass(frozen=True)
class Trained:
    """What a baseline has come to. `remaining` is how many numbers of 32 bits are left of the model's `dense_parameters`: those that no
    mask holds at zero, those that a smaller model has, or, of weights of one bit, a 32nd. `seconds` are those of the whole method, by
    the wall, without the evaluation of its model. `facts` are plain data that only this method has.
    """

    model: nn.Module
    dense_parameters: int
    remaining: float
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """What is left of the dense model's parameters."""
        return self.remaining / self.dense_parameters


class Baseline(Protocol):
    """A method with its options: trains a fresh model of a task for so many epochs of its own optimizer and schedule, and as much longer
    as the method takes. `ValueError` says where the method has nothing to work on.
    """

    def __call__(self, task: Task, epochs: int, seed: int, device: torch.device = CPU) -> Trained:
        """Train."""


@runtime_checkable
class Sizeable(Protocol):
    """A baseline that can be asked for a size."""

    def sized(self, share: float) -> Baseline:
        """The same, set so that about this share of the dense model's parameters is left."""


class Snapshot(NamedTuple):
    """A run as it was after a step: the model's numbers, the settings of the optimizer, the schedule."""

    step: int
    numbers: dict[str, Tensor]
    settings: list[dict[str, Any]]
    schedule: dict[str, Any]


class Run:
    """A model trained as its task says, by a loop without anything of fxrank's in it.

    `before_step` are called when the gradients are there, `after_step` after the optimizer's step and the schedule's, `after_epoch` after
    each `per_epoch` steps. Each takes no argument; `step` counts the steps that were made, of `total`.
    """

    def __init__(self, task: Task, model: nn.Module, epochs: int, seed: int, device: torch.device = CPU) -> None:
        torch.manual_seed(seed)
        self.task, self.model, self.device = task, model.to(device), device
        self.loader, self._validation = task.loaders(seed)
        self.per_epoch: int = len(self.loader)  # type: ignore[arg-type]
        self.step, self.total = 0, epochs * self.per_epoch
        self.optimizer = task.optimizer(model)
        self.scheduler, self._per = task.schedule(self.optimizer, self.total)
        self.before_step: list[Callable[[], object]] = []
        self.after_step: list[Callable[[], object]] = []
        self.after_epoch: list[Callable[[], object]] = []
        self._batches = self._endless()

    def _endless(self) -> Iterator[Any]:
        for loader in itertools.repeat(self.loader):
            for batch in loader:
                yield to_device(batch, self.device)

    def train(self, until: int | None = None) -> None:
        """Go on until so many steps were made, by default all."""
        self.model.train()
        while self.step < (self.total if until is None else until):
            batch = next(self._batches)
            self.optimizer.zero_grad(set_to_none=True)
            run_batch(self.model, batch, self.task.loss_fn).loss.backward()
            _call(self.before_step)
            self.optimizer.step()
            self.step += 1
            if self._per == "batch":
                self.scheduler.step()
            _call(self.after_step)
            if self.step % self.per_epoch == 0:
                self._end_epoch()

    def _end_epoch(self) -> None:
        if self._per == "epoch" and isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(evaluate(self.model, self._validation, self.device)[0])
            self.model.train()
        elif self._per == "epoch":
            self.scheduler.step()
        _call(self.after_epoch)

    def snapshot(self) -> Snapshot:
        """The run as it is now, without the momentum, and without masks."""
        numbers = {name: x.detach().clone() for name, x in self.model.state_dict().items() if not name.endswith(MASK)}
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return Snapshot(self.step, numbers, copy.deepcopy(settings), copy.deepcopy(self.scheduler.state_dict()))

    def rewind(self, to: Snapshot) -> None:
        """Go back: numbers, learning rate and schedule are as they were, masks stay, the momentum begins anew (Frankle et al. 2020)."""
        self.model.load_state_dict(self.model.state_dict() | to.numbers)
        self.optimizer.state.clear()
        for group, settings in zip(self.optimizer.param_groups, copy.deepcopy(to.settings), strict=True):
            group.update(settings)
        self.scheduler.load_state_dict(copy.deepcopy(to.schedule))
        self.step = to.step

    def adopt(self, names: dict[int, str]) -> None:
        """Go on with the model's present parameters, where others have taken the place of those that had these names, by `id`; what the
        optimizer remembers of a parameter that is gone is gone too.
        """
        for group in self.optimizer.param_groups:
            group["params"] = [self.model.get_parameter(names[id(p)]) for p in group["params"]]
        present = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for parameter in [p for p in self.optimizer.state if id(p) not in present]:
            del self.optimizer.state[parameter]


def _call(hooks: list[Callable[[], object]]) -> None:
    for hook in hooks:
        hook()


def sample(task: Task, device: torch.device = CPU) -> Any:
    """A training batch, from a loader of its own: a run sees the same batches as if nobody had looked."""
    return to_device(first_batch(task.loaders(0)[0]), device)


def weight_layers(model: nn.Module, batch: Any) -> Layers:
    """The Linear and convolutional layers that a call of the model calls, but those whose weight other modules hold too: such a weight
    is no matter of one layer. A layer whose weight is read by other code, as attention's own, is not called.
    """
    own = copy.deepcopy(model)  # in training mode a call leaves traces in BatchNorms
    names = {m: name for name, m in own.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))}
    held = [id(p) for m in own.modules() for p in m._parameters.values() if p is not None]
    called: list[str] = []
    for layer, name in names.items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    args, kwargs = call_arguments(own, model_inputs(own, batch))
    with torch.no_grad(), torch.random.fork_rng():
        own.train()(*args, **kwargs)
    alone = {name for m, name in names.items() if held.count(id(m.weight)) == 1}
    return {name: model.get_submodule(name) for name in dict.fromkeys(called) if name in alone}


def prunable(run: Run, method: str) -> Layers:
    """The layers of a run's model whose weights may be masked. `ValueError` if there are none."""
    layers = weight_layers(run.model, sample(run.task, run.device))
    if not layers:
        raise ValueError(
            f"{method} prunes weights of Linear and convolutional layers that no other module shares; "
            f"{type(run.model).__name__} calls none. Choose another task."
        )
    return layers


def remaining(model: nn.Module) -> int:
    """Parameters that no mask holds at zero."""
    masks = [mask for name, mask in model.named_buffers() if name.endswith(MASK)]
    return size(model) - sum(int((mask == 0).sum()) for mask in masks)


def settle(layers: Layers) -> None:
    """Write zeros into masked weights, and take the masks away."""
    for layer in layers.values():
        prune.remove(layer, "weight")
