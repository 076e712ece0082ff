"""A trained model, made smaller to a budget in one call with calibration data, and healed by a few more steps.

python examples/compress.py
"""

import torch
import torch.nn.functional as F

import fxrank
from fxrank.demo import DigitsNet, digits

torch.manual_seed(0)
train, val = digits()
val_images, val_labels = next(iter(val))


def fit(model, epochs, lr):
    """A plain training, of whatever model."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(train))
    for _ in range(epochs):
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            scheduler.step()


@torch.no_grad()
def describe(what, model):
    """Print accuracy and size."""
    accuracy = (model.eval()(val_images).argmax(1) == val_labels).float().mean()
    print(f"{what:<10} validation accuracy {accuracy:.2%}, {sum(p.numel() for p in model.parameters()):,} parameters")


model = DigitsNet(width=16)
fit(model, epochs=4, lr=0.1)

# A copy of a quarter of the parameters: which layers, and which ranks, so that what the model gives on these data changes least.
small = fxrank.factorize(
    model, val_images[:64], target_params=0.25, calibration=train, calibration_batches=8, form="auto"
)
print(fxrank.plan_of(small))
print(fxrank.plan_of(small).budget)
describe("trained", model)
describe("compressed", small)
fit(small, epochs=1, lr=0.02)
describe("healed", small)
