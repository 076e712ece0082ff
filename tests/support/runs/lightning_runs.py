"""`lightning.Trainer` on a small network."""

import lightning as L
import torch
import torch.nn.functional as F
from nets import SOON, mlp, vectors
from torch.utils.data import DataLoader, TensorDataset

from fxrank.integrations.lightning import LowRankCallback


class Classifier(L.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        self.net = mlp(seed)
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.ndim > 1]
        biases = [p for p in self.parameters() if p.ndim == 1]
        optimizer = torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": weights}], lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


def loader(shuffle=True):
    x, y = vectors()  # eight rows
    return DataLoader(TensorDataset(x.repeat(3, 1), y.repeat(3)), batch_size=4, shuffle=shuffle)


def trainer_of(folder, callback=None, **options):
    """12 optimizer steps: 4 epochs of 3, each of two batches of 4."""
    saver = L.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    callback = LowRankCallback(SOON) if callback is None else callback
    settings = {"max_epochs": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    return L.Trainer(
        callbacks=[saver, callback],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(settings | options),
    ), callback
