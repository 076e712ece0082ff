"""What `auto_lowrank` was asked for, as one record: checked once, with the defaults in place."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fxrank.distributed.team import Team
from fxrank.loggers import Logger
from fxrank.passes.discovery.selection import Selector, listed
from fxrank.passes.errors import unknown_name
from fxrank.passes.model.device import known_device
from fxrank.plan import Plan
from fxrank.policies.base import Policy
from fxrank.policies.fixed import as_policy
from fxrank.training.batches import LossFn, known_length

DEFAULT_EPOCHS = 30
AMP_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Scheduler(Protocol):
    """What is asked of a user's scheduler: torch's, or one with the same methods."""

    def step(self) -> None:
        """Set the learning rates of the next batch or epoch."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Inverse of `state_dict`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunOptions:
    """The arguments of `auto_lowrank`, which describes them, in the form in which the run uses them. Made by `of`."""

    model: nn.Module
    loader: Iterable[Any]
    epochs: int
    epochs_by_default: bool
    """Whether nobody has said how many."""
    steps_per_epoch: int
    val_loader: Iterable[Any] | None
    loss_fn: LossFn | None
    optimizer: Optimizer | None
    scheduler: Scheduler | ReduceLROnPlateau | None
    scheduler_per: str
    device: torch.device | None
    amp: torch.dtype | None
    policy: Policy
    include: tuple[Selector, ...]
    exclude: tuple[Selector, ...]
    seed: int | None
    progress: bool
    logger: Logger | None
    output: Path | None
    resume: bool
    checkpoint_every: int | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        val_loader: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
        scheduler_per: str = "epoch",
        device: str | torch.device | None = None,
        amp: str | torch.dtype | None = None,
        policy: Policy | Plan | str | None = None,
        include: Iterable[Selector] | Selector = (),
        exclude: Iterable[Selector] | Selector = (),
        seed: int | None = None,
        progress: bool = True,
        logger: Logger | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        checkpoint_every: int | None = None,
    ) -> "RunOptions":
        """The signature of `auto_lowrank`. Raises `ValueError` or `TypeError` for the first option that is wrong."""
        _check_kept(output_dir, resume, checkpoint_every)
        chosen = as_policy(policy)
        _check_trained(model, epochs, optimizer, scheduler, scheduler_per)
        return cls(
            model=model,
            loader=loader,
            epochs=DEFAULT_EPOCHS if epochs is None else epochs,
            epochs_by_default=epochs is None,
            amp=_amp_type(amp),  # the length comes after it: the first that is wrong is named
            steps_per_epoch=_length(loader) if steps_per_epoch is None else steps_per_epoch,
            val_loader=val_loader,
            loss_fn=loss_fn,
            optimizer=optimizer,
            scheduler=scheduler,
            scheduler_per=scheduler_per,
            device=None if device is None else known_device(device),
            policy=chosen,
            include=listed(include),
            exclude=listed(exclude),
            seed=seed,
            progress=progress,
            logger=logger,
            output=None if output_dir is None else Path(output_dir),
            resume=resume,
            checkpoint_every=checkpoint_every,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def device_for(self, team: Team) -> torch.device:
        """Where to train: as asked; else a GPU if there is one, but several processes stay where their models are."""
        if self.device is not None:
            return self.device
        if torch.cuda.is_available() and team.size == 1:
            return torch.device("cuda")
        return next(self.model.parameters()).device


def _check_kept(output_dir: str | os.PathLike[str] | None, resume: bool, every: int | None) -> None:
    if output_dir is None or not resume:
        if resume or every is not None:
            raise ValueError(
                f"checkpoints take both output_dir= and resume=True; got output_dir={output_dir!r}, resume={resume}, checkpoint_every={every}."
            )
    elif every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(
            f"checkpoint_every counts optimizer steps, at least 1; got {every!r}. None leaves it at every epoch."
        )


def _check_trained(
    model: nn.Module, epochs: int | None, optimizer: object, scheduler: object, scheduler_per: str
) -> None:
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1; got {epochs}.")
    if scheduler_per not in ("epoch", "batch"):
        raise unknown_name("scheduler_per", scheduler_per, ("epoch", "batch"))
    if scheduler is not None and optimizer is None:
        raise ValueError(
            "a scheduler drives one optimizer; got a scheduler without optimizer=. Pass the optimizer it was built with."
        )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"auto_lowrank steps one torch optimizer; got {type(optimizer).__name__}. For several, attach a LowRankSession to them in a loop of your own."
        )
    if not any(True for _ in model.parameters()):
        raise ValueError(f"the model must have parameters to train; {type(model).__name__} has none.")


def _amp_type(amp: str | torch.dtype | None) -> torch.dtype | None:
    if amp is None or amp in AMP_TYPES.values():
        return amp  # type: ignore[return-value]
    if isinstance(amp, str) and amp in AMP_TYPES:
        return AMP_TYPES[amp]
    raise unknown_name("amp", amp, AMP_TYPES)


def _length(loader: Iterable[Any]) -> int:
    length = known_length(loader)
    if length is None:
        raise TypeError(
            f"the loader must have a length, so that schedule and switch can be placed; {type(loader).__name__} has none. Pass steps_per_epoch=."
        )
    if length == 0:
        raise ValueError(
            "the loader must yield at least one batch; it is empty (length 0). Check the data set, batch_size and drop_last."
        )
    return length
