"""`auto_lowrank`: the one call. A training loop around `LowRankSession`."""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxrank.distributed.team import Team
from fxrank.loggers import Logger
from fxrank.passes.discovery.selection import Selector
from fxrank.passes.model.compiled import uncompiled
from fxrank.plan import Plan
from fxrank.policies.base import Policy
from fxrank.resume.keeper import FileKeeper
from fxrank.saving.model_files import PLAN, WEIGHTS, check_storable, save
from fxrank.saving.places import held, put, try_places
from fxrank.training.batches import LossFn
from fxrank.training.keeper import Keeper
from fxrank.training.options import RunOptions
from fxrank.training.report import figure
from fxrank.training.trainer import Result, Trainer

log = logging.getLogger("fxrank")

FIGURE = "ranks.png"
REPORT, PAGE = "report.json", "report.html"
RESULTS = (WEIGHTS, PLAN, REPORT, "report.txt", PAGE, FIGURE)
"""The files of a run's folder."""


def auto_lowrank(
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
) -> Result:
    """Train `model` on `loader`, full-rank first; when its ranks have settled, make it low-rank, and train on.

    Defaults, so that two arguments are enough:

    - the loss: the model's own (`outputs.loss`), cross-entropy for integer targets, mean squared error for float
      ones; `loss_fn(outputs, targets)` otherwise;
    - batches: `(inputs, targets)`, `(input, input, …, targets)`, dicts (keywords of the model), nested; moved to
      the device as they are;
    - optimizer: `AdamW(lr=1e-3, weight_decay=0.05)`; schedule: linear warm-up over 5 % of the steps, then cosine to
      0, stepped per batch;
    - `epochs=30`, printed; device: a GPU if there is one, else where the model is; float32 (`amp="bfloat16"` or
      `"float16"` for autocast, the latter with loss scaling);
    - `policy=Cuttlefish()`: E, K and R by themselves.

    `steps_per_epoch` is needed for a loader without a length. A `scheduler` of yours is stepped once an epoch, or a
    batch with `scheduler_per="batch"` (`ReduceLROnPlateau` gets the validation loss, or else the training loss).
    `include` and `exclude` as in `factorize`. `seed` fixes torch's random numbers. `logger` receives the rank curves and the
    switch (see `Logger`). `output_dir` receives
    `model.safetensors`, `plan.json`, `report.json`, `report.txt`, `report.html` to look at and, if matplotlib is installed, `ranks.png`. It is tried before the
    training, and belongs to one run at a time; if the files cannot be written at the end, a warning names the folder where they are.

    With `resume=True` the run may be killed at any moment: the same call goes on from
    `output_dir/checkpoint.safetensors`, to the same result, or starts if there is none yet. One is written at the
    start, at the end of each epoch, right after the switch, and every `checkpoint_every` steps. It stays after the
    run, whose result the same call then returns at once. Weights that are NaN or infinite are never written over it: the run stops,
    and the last good one and the one before it (`checkpoint.before.safetensors`) stay, with what grows with the epochs beside them (`checkpoint.grown.jsonl`). Of the model, and of a `loss_fn` that is a module, the state
    dict goes on, and so do all random numbers: torch's, numpy's, Python's, and those of generators that are
    attributes of the loaders, their data sets and samplers, the model or the loss, or of their parts. Generators
    elsewhere (global ones, in closures) do not, nor what else a sampler or a data set remembers from epoch to epoch,
    nor what is drawn in persistent workers. In several processes the first one writes, for all: as many go on to the
    same result, another number with the same model, optimizer, schedule and ranks and a note in the report, if all
    batches of a step together stay as large.

    Returns a `Result`; its model is `model` itself. If nothing could be factorized the trained full-rank model is
    returned with a `NothingFactorizedWarning`. Raises before touching anything: `ValueError` or `TypeError` for an
    empty loader or a bad option, `CheckpointError` for a checkpoint that is damaged or of another run, `TraceError`,
    `NothingToFactorizeError`, `NonFiniteWeightError`, `OSError` for a folder that cannot be written or is in use. On the way,
    `NonFiniteWeightError` for weights that diverge, which says what to go on from. Source: Cuttlefish Alg. 1 (Wang et al., MLSys 2023).
    """
    options = RunOptions.of(
        model,
        loader,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        val_loader=val_loader,
        loss_fn=loss_fn,
        optimizer=optimizer,
        scheduler=scheduler,
        scheduler_per=scheduler_per,
        device=device,
        amp=amp,
        policy=policy,
        include=include,
        exclude=exclude,
        seed=seed,
        progress=progress,
        logger=logger,
        output_dir=output_dir,
        resume=resume,
        checkpoint_every=checkpoint_every,
    )
    return train_lowrank(options, Team.of(model))


def train_lowrank(options: RunOptions, team: Team) -> Result:
    """`auto_lowrank` with its options in one record, in the processes of a `team`; the first one writes the results."""
    keeper = FileKeeper(options, team) if options.resume else Keeper(options, team)
    trainer = Trainer(options, team, keeper)
    output = options.output
    if output is None:
        return trainer.run()
    with ExitStack() as held_meanwhile:
        # What is refused is refused before the training.
        team.agree(lambda: _take(output, [*RESULTS, *keeper.files], held_meanwhile))
        check_storable(uncompiled(options.model))
        result = trainer.run()
        if team.is_first:
            write_somewhere(result, output, options.steps_per_epoch)
    return result


def _take(output: Path, names: list[str], until: ExitStack) -> None:
    try_places(output, names)
    until.enter_context(held(output))


def write_somewhere(result: Result, output: Path, steps_per_epoch: int) -> Path | None:
    """Write the results of a run to its folder; where that fails, to another one, which a warning names. Returns the one that
    has them.
    """
    try:
        write_run(result, output, steps_per_epoch)
    except Exception as error:  # whatever it is: hours of training would go with it
        found = f"the results of the run could not be written to {output} ({type(error).__name__}: {error})"
    else:
        return output
    fallback = None
    try:
        fallback = Path(tempfile.mkdtemp(prefix="fxrank-"))
        write_run(result, fallback, steps_per_epoch)
        found += f"; they are in {fallback}. Copy them from there"
    except Exception as error:
        fallback = None
        found += f", nor to a temporary folder ({type(error).__name__}: {error}). The result that is returned has them: save its model yourself"
    warnings.warn(f"{found}.", stacklevel=4)
    return fallback


def write_run(result: Result, output_dir: str | os.PathLike[str], steps_per_epoch: int) -> None:
    """Write model, plan, report, page and figure of a run to a folder."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save(result.model, folder)
    put(folder / REPORT, result.report.save)
    put(folder / "report.txt", lambda partial: partial.write_text(f"{result.report}\n", encoding="utf-8"))
    try:
        html = result.report.to_html(folder.name)
    except Exception as error:  # it shows what the other files hold, and must not cost them
        log.warning("no page of the run: %s. `fxrank report %s` writes it from %s", error, folder, REPORT)
    else:
        put(folder / PAGE, lambda partial: partial.write_text(html, encoding="utf-8"))
    curves = {name: curve for name, curve in result.curves.items() if name != "steps"}
    if curves:
        try:
            put(folder / FIGURE, lambda partial: _draw(result, curves, steps_per_epoch, partial))
        except ImportError:
            log.warning("no figure of the rank curves: matplotlib is not installed (pip install fxrank[figures])")


def _draw(result: Result, curves: dict[str, list[Any]], steps_per_epoch: int, path: Path) -> None:
    with path.open("wb") as file:
        figure(curves, result.curves["steps"], result.plan, steps_per_epoch, file)


__all__ = ["Result", "auto_lowrank"]
