"""Loggers for `auto_lowrank(..., logger=…)` and `LowRankSession.attach(..., logger=…)`."""

import os
from typing import Any

from fxrank.loggers import Logger


class TensorBoardLogger:
    """Scalars and texts in a folder that TensorBoard reads."""

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, writer: Any = None) -> None:
        """`writer` is a `SummaryWriter` of yours, which stays yours to close; else one is made for `folder`.

        Raises `ValueError` unless one of the two is given, `ImportError` if tensorboard is not installed.
        """
        if (folder is None) == (writer is None):
            raise ValueError(
                f"a TensorBoardLogger writes to a folder or through a writer; got folder={folder!r}, writer={writer!r}. Pass one of them."
            )
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(os.fspath(folder))  # type: ignore[arg-type]
        self.writer, self._own = writer, folder is not None

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def event(self, step: int, text: str) -> None:
        self.writer.add_text("fxrank", text, step)

    def close(self) -> None:
        """Write out what is pending; close the writer if it was made here."""
        self.writer.close() if self._own else self.writer.flush()


class WandbLogger:
    """Values and events of a Weights & Biases run.

    `run` is a run of yours, or None for the current one (`wandb.init` must have been called). The optimizer step goes
    along as the value `fxrank/step`, the x-axis of all of fxrank's curves, so that the run's own step counter is left
    alone.
    """

    def __init__(self, run: Any = None) -> None:
        """Raises `ValueError` if there is no run, `ImportError` if wandb is not installed."""
        if run is None:
            import wandb

            run = wandb.run
            if run is None:
                raise ValueError("a WandbLogger needs a run; there is none. Call wandb.init first, or pass run=.")
        self.run = run
        for names in ("fxrank/step", "stable_rank/*", "rank/*"):
            run.define_metric(names, step_metric=None if names == "fxrank/step" else "fxrank/step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"fxrank/step": step, **values})

    def event(self, step: int, text: str) -> None:
        self.run.summary["fxrank/events"] = [*self.run.summary.get("fxrank/events", []), f"step {step}: {text}"]


__all__ = ["Logger", "TensorBoardLogger", "WandbLogger"]
