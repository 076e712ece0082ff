"""Whether the values of a checkpoint are ones that a run can go on from: a good digest says only that they are as they were written."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.names import own_state
from fxrank.resume.same_run import holders, loss_module
from fxrank.saving.random_state import random_state, restore_random
from fxrank.session.state import FULL, LOW
from fxrank.training.options import RunOptions

_LIKE_THE_WEIGHT = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg")
"""What torch's optimizers keep of the size of a parameter."""
_ROW = ("epoch", "phase", "loss", "accuracy", "val_loss", "val_accuracy")


def check_sound(saved: dict[str, Any], options: RunOptions, *, dealt_alike: bool) -> None:
    """Raise `CheckpointError` that names the first part of the checkpoint that no run has written. Nothing is changed: random
    numbers are tried, and put back. `dealt_alike` tells whether the loaders have the generators that they had.
    """
    epoch, taken = saved["epoch"], saved["taken"]
    _need("epoch", _is_count(epoch) and epoch <= options.epochs)
    _need("taken", _is_count(taken))
    _need("seconds", len(saved["seconds"]) == 2 and all(map(_is_number, saved["seconds"])))
    _need("history", len(saved["history"]) == epoch and all(map(_is_row, saved["history"])))
    _need(
        "memory",
        saved["memory"].keys() == {FULL, LOW} and all(_none_or(_is_count, v) for v in saved["memory"].values()),
    )
    at_switch = saved["at_switch"]
    _need(
        "at_switch",
        at_switch.keys() == {"before_switch", "after_switch"}
        and all(_none_or(_is_number, v) for v in at_switch.values()),
    )
    _need("loss", _shapes(saved["loss"]) == _shapes(own_state(loss_module(options))))
    _need(
        "optimizer",
        _is_optimizer(
            saved["optimizer"],
            options,
            {math.prod(shape or ()) for part in ("model", "loss") for shape in _shapes(saved[part]).values()},
        ),
    )
    last = (saved["scheduler"] or {}).get("last_epoch", 0)
    _need("scheduler", _is_count(last) and (saved["scheduler"] is None) <= (options.scheduler is None))
    _need("scaler", all(map(_is_number, saved["scaler"].values())))
    for own in [saved, *saved["others"]]:
        _need("totals", _are_totals(own["totals"]))
        for name in ("first_random", "random", "epoch_random"):
            _need(name, _is_random(own[name], holders(options) if dealt_alike else []))


def _need(name: str, holds: bool) -> None:
    if not holds:
        raise CheckpointError(
            f"a checkpoint must hold what a run has written; its part {name!r} is not of one like this. Put a good copy in its place, or start afresh."
        )


def _is_random(state: dict[str, Any], own: list[Any]) -> bool:
    before = random_state(own)
    try:
        restore_random(state, own)
    except Exception:  # torch, numpy and Python each refuse in a way of their own
        return False
    finally:
        restore_random(before, own)
    return True


def _is_optimizer(state: dict[str, Any], options: RunOptions, sizes: set[int]) -> bool:
    groups, entries = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(entries, dict) or not all(isinstance(g, dict) for g in groups):
        return False
    if options.optimizer is not None and len(groups) != len(options.optimizer.param_groups):
        return False
    if not all(
        isinstance(g.get("params"), list) and all(map(_is_count, g["params"])) and _is_rate(g.get("lr", 0.0))
        for g in groups
    ):
        return False
    if not entries.keys() <= {index for group in groups for index in group["params"]}:
        return False
    for entry in entries.values():
        if not isinstance(entry, dict):
            return False
        for name, value in entry.items():
            like = name in _LIKE_THE_WEIGHT and value is not None
            if like and not (isinstance(value, Tensor) and value.numel() in sizes):
                return False
    return True


def _are_totals(totals: dict[str, Any]) -> bool:
    if totals.keys() != {"loss", "correct", "examples", "predictions"}:
        return False
    tensors = [totals["loss"], totals["correct"]]
    counts = [v for v in (totals["examples"], totals["predictions"]) if not isinstance(v, Tensor)]
    tensors += [v for v in (totals["examples"], totals["predictions"]) if isinstance(v, Tensor)]
    return all(isinstance(t, Tensor) and t.ndim == 0 for t in tensors) and all(map(_is_count, counts))


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() >= set(_ROW)
        and all(_none_or(_is_float, row[name]) for name in _ROW if name != "phase")
    )


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}


def _none_or(holds: Callable[[Any], bool], value: Any) -> bool:
    return value is None or holds(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_float(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_float(value) and math.isfinite(value)


def _is_rate(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, Tensor) and value.numel() == 1)
