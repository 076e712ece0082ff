"""Train a small CNN on real scans of digits: full-rank first, low-rank once its ranks have settled. Then save it, and load it.

python examples/images.py
"""

import tempfile

import torch

import fxrank
from fxrank.demo import DigitsNet, digits

EPOCHS = 5

torch.manual_seed(0)
train, val = digits()  # any loaders of (inputs, targets) do
model = DigitsNet(width=16)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * len(train))

result = fxrank.auto_lowrank(
    model,
    train,
    epochs=EPOCHS,
    val_loader=val,
    optimizer=optimizer,
    scheduler=scheduler,
    scheduler_per="batch",
    # Size alone counts here. Without this line a layer stays dense where its pair is not faster on your device.
    policy=fxrank.Cuttlefish(objective="size"),
)
print(result.report)  # every layer with its rank and the reason, then the totals

model.eval()
images, labels = next(iter(val))
with tempfile.TemporaryDirectory() as folder:
    fxrank.save(model, folder)  # model.safetensors and plan.json
    loaded = fxrank.load(DigitsNet(width=16), folder)  # into a freshly built dense model
loaded.eval()
with torch.no_grad():
    assert torch.equal(loaded(images), model(images))
    print(f"loaded again: {(loaded(images).argmax(1) == labels).float().mean():.2%} of the validation images are read")
