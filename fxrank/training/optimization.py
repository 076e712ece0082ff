"""What steps the weights: the optimizer with its schedule and its loss scaling, the user's or the default."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from fxrank.training.options import RunOptions, Scheduler


@dataclass(frozen=True)
class Optimization:
    """One optimizer, its scheduler, if any, which is stepped per `"epoch"` or `"batch"`, and its gradients' scaler."""

    optimizer: Optimizer
    scheduler: Scheduler | ReduceLROnPlateau | None
    scheduler_per: str
    scaler: torch.amp.GradScaler

    @classmethod
    def of(cls, options: RunOptions, device: torch.device) -> "Optimization":
        """As the options say; without an optimizer AdamW, with warm-up and cosine per batch."""
        optimizer, scheduler, per = options.optimizer, options.scheduler, options.scheduler_per
        if optimizer is None:
            optimizer, scheduler = _default_optimizer(options.model, options.total_steps)
            per = "batch"
        scaler = torch.amp.GradScaler(device.type, enabled=options.amp is torch.float16)
        return cls(optimizer, scheduler, per, scaler)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def after_batch(self) -> None:
        """Step a scheduler that goes by batches."""
        if self.scheduler is not None and self.scheduler_per == "batch":
            self.scheduler.step()  # type: ignore[call-arg]

    def after_epoch(self, loss: float | None) -> None:
        """Step a scheduler that goes by epochs; `loss` is what one looks at that waits for a plateau, which stays where it
        is if there is none.
        """
        if self.scheduler is None or self.scheduler_per != "epoch":
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if loss is not None:
                self.scheduler.step(loss)
        else:
            self.scheduler.step()


def _default_optimizer(model: nn.Module, total_steps: int) -> tuple[Optimizer, LambdaLR]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.05)
    warmup = max(1, total_steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

    return optimizer, LambdaLR(optimizer, factor)
