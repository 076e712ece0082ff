"""A LightningModule, made low-rank by a callback of the Trainer.

python examples/lightning_module.py    (needs lightning and scikit-learn)
"""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fxrank
from fxrank.integrations.lightning import LowRankCallback

EPOCHS = 8


class Classifier(lightning.LightningModule):
    """A perceptron for `(N, 64)` pixels of digits."""

    def __init__(self, width=256):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        return self.head(self.body(images))

    def training_step(self, batch, index):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch, index):
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


lightning.seed_everything(0, verbose=False)
images, labels = load_digits(return_X_y=True)  # 1,797 real scans of 8×8 pixels
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
train, val = random_split(data, [0.8, 0.2])
train, val = DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=512)
callback = LowRankCallback(
    fxrank.Cuttlefish(objective="size")
)  # leave the policy out, and pairs must be faster as well
trainer = lightning.Trainer(
    max_epochs=EPOCHS,
    callbacks=[callback],
    accelerator="cpu",
    logger=False,
    enable_model_summary=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
module = Classifier()
trainer.fit(module, train, val)
print(callback.plan)
print(f"validation accuracy {float(trainer.callback_metrics['accuracy']):.2%}")
print(
    f"{sum(p.numel() for p in module.parameters()):,} parameters; before: {sum(p.numel() for p in Classifier().parameters()):,}"
)
