"""What must be the same when a run goes on, and whether a checkpoint has it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fxrank.distributed.team import Team
from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.model.names import own_state
from fxrank.plan import Plan
from fxrank.policies.scene import Clock
from fxrank.resume.team_shares import check_others
from fxrank.saving.model_files import check_names
from fxrank.saving.random_state import generators_of
from fxrank.session.state import check_state, described
from fxrank.switch.plan_of import has_plan
from fxrank.training.options import RunOptions

DEALT, STEPS = "generators of the loaders", "number of steps an epoch"
"""What another number of processes may have in another way."""
_PARTS: dict[str, type | tuple[type, ...]] = {
    "run": dict,
    "epoch": int,
    "taken": int,
    "first_random": dict,
    "random": dict,
    "epoch_random": dict,
    "session": dict,
    "model": dict,
    "optimizer": dict,
    "scheduler": (dict, type(None)),
    "scaler": dict,
    "loss": dict,
    "totals": dict,
    "history": list,
    "memory": dict,
    "at_switch": dict,
    "seconds": list,
    "others": list,
    "buckets": (list, type(None)),
}


def run_of(options: RunOptions) -> dict[str, Any]:
    """What must be the same when the run goes on, of a model before the switch. Raises `TypeError` for a run that a
    checkpoint cannot hold.
    """
    check_whole(options.model)
    check_held(options.optimizer, options.model, loss_module(options))
    optimizer, scheduler = options.optimizer, options.scheduler
    sizes = [] if optimizer is None else [len(group["params"]) for group in optimizer.param_groups]
    return {
        "model": _tensors_of(uncompiled(options.model)),
        "loss_fn": _tensors_of(loss_module(options)),
        "optimizer": "the default" if optimizer is None else f"{type(optimizer).__name__} of {sizes} parameters",
        "optimizer's option": {
            name: described(value)
            for name, value in getattr(optimizer, "defaults", {}).items()
            if not isinstance(value, Tensor)  # a learning rate that schedulers write into
        },
        "scheduler": f"{type(scheduler).__name__}, stepped by {options.scheduler_per}",
        "number of epochs": str(options.epochs),
        STEPS: str(options.steps_per_epoch),
        "policy": described(options.policy),
        "include": ", ".join(map(described, options.include)) or "()",
        "exclude": ", ".join(map(described, options.exclude)) or "()",
        "seed": str(options.seed),
        "amp": str(options.amp),
        DEALT: ", ".join(type(g).__name__ for g in generators_of(_loaders(options)).values()),
    }


def _loaders(options: RunOptions) -> list[Iterable[Any] | None]:
    return [options.loader, options.val_loader]


def holders(options: RunOptions) -> list[Any]:
    """Where the user's generators may be."""
    return [*_loaders(options), uncompiled(options.model), options.loss_fn]


def loss_module(options: RunOptions) -> nn.Module:
    """The loss, if it is a module, which may learn or remember; else one without a state."""
    return options.loss_fn if isinstance(options.loss_fn, nn.Module) else nn.Module()


def check_saved(saved: Any, run: dict[str, Any], options: RunOptions, team: Team, path: Path) -> None:
    """Raise `CheckpointError` or `PlanMismatchError` unless `run`, what `run_of` has found, can go on from the checkpoint
    `saved`, which was read from `path`.
    """
    fix = "Pass the same, or start afresh: with another output_dir, or without this file"
    for name, kind in _PARTS.items():
        if not isinstance(saved, dict) or name not in saved or not isinstance(saved[name], kind):
            raise CheckpointError(f"a checkpoint must hold the whole run; {path} has no good {name!r}. {fix}.")
    check_others(saved)
    before, now = 1 + len(saved["others"]), team.size
    for name, value in run.items():
        if saved["run"].get(name) == value or (name == DEALT and before != now):
            continue  # loaders that divide the data have samplers of another kind
        if name == STEPS and before != now:
            fix = f"{before} processes became {now}: pass batches of {before}/{now} the size, so that all together take the same, or steps_per_epoch={saved['run'].get(name)}"
        if name == "model" and has_plan(options.model):
            fix = "This one has been made low-rank already, by the run that was broken off maybe: build it anew, and its optimizer and scheduler"
        old, new = _difference(saved["run"].get(name), value)
        raise CheckpointError(
            f"a run goes on as it was started; in {path} its {name} was {old:.300}, now it is {new:.300}. {fix}."
        )
    clock = Clock(0, options.total_steps, options.steps_per_epoch)
    model = uncompiled(options.model)
    plan, _ = check_state(saved["session"], options.policy, clock, None, model)
    tensors = {name: value for name, value in saved["model"].items() if isinstance(value, Tensor)}
    shapes = dict.fromkeys(saved["model"]) | {name: tuple(value.shape) for name, value in tensors.items()}
    memory = {name: value.data_ptr() for name, value in tensors.items() if value.numel()}
    check_names(model, plan or Plan("", ()), shapes, memory)


def check_whole(model: nn.Module) -> None:
    """Raise `TypeError` for a model that processes hold in pieces."""
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise TypeError(
                f"a checkpoint of resume=True holds whole tensors; {name!r} is sharded. Save LowRankSession.state_dict() beside torch.distributed.checkpoint in a loop of your own."
            )


def check_held(optimizer: Optimizer | None, model: nn.Module, loss: nn.Module) -> None:
    """Raise `TypeError` for an optimizer with parameters that are in no checkpoint."""
    groups = [] if optimizer is None else optimizer.param_groups
    stepped = {id(p): p for group in groups for p in group["params"]}
    others = stepped.keys() - {id(p) for module in (model, loss) for p in module.parameters()}
    if others and len(others) < len(stepped):  # one of another model is refused later
        raise TypeError(
            f"a checkpoint of resume=True holds the parameters of the model, and of loss_fn if it is a module; the optimizer steps {len(others)} other, of shape "
            f"{tuple(stepped[min(others)].shape)} for one. Register it in either, or train without resume=True."
        )


def _tensors_of(model: nn.Module) -> dict[str, str]:
    """Shape and dtype of each entry of the state dict, and the name under which a shared one came first."""
    first: dict[int, str] = {}
    tensors = {}
    for name, value in own_state(model).items():
        what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        shared = first.setdefault(id(value), name)
        tensors[name] = what if shared == name else f"{what}, shared with {shared}"
    return tensors


def _difference(before: Any, now: Any) -> tuple[str, str]:
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(n for n in [*now, *before] if before.get(n) != now.get(n))
        return f"{name!r} {before.get(name, 'missing')}", f"{now.get(name, 'missing')}"
    return str(before), str(now)
