"""A ResNet of timm, without pretrained weights, with timm's optimizer, scheduler and average of the weights.

python examples/timm_model.py    (needs timm and scikit-learn)
"""

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import fxrank
from fxrank.demo import digits

EPOCHS = 6
NAME, OPTIONS = "test_resnet", {"in_chans": 1, "num_classes": 10}


def upscaled(images):
    """Scans of 8×8 pixels, `(N, 1, 8, 8)`, as 16×16."""
    return F.interpolate(images, scale_factor=2, mode="bilinear")


torch.manual_seed(0)
train, val = digits()
model = timm.create_model(NAME, **OPTIONS)
optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS * len(train), warmup_t=len(train), t_in_epochs=False)
average = ModelEmaV3(model, decay=0.95)

images, _ = next(iter(train))
session = fxrank.LowRankSession.attach(
    model,
    optimizer,
    example_inputs=upscaled(images),
    total_steps=EPOCHS * len(train),
    steps_per_epoch=len(train),
    policy=fxrank.Cuttlefish(objective="size"),  # leave it out, and pairs must be faster as well
    followers=[average],  # goes through the switch with the model
)
step = 0
for epoch in range(EPOCHS):
    for images, labels in train:
        loss = F.cross_entropy(model(upscaled(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        scheduler.step_update(step)
        average.update(model)
    print(f"epoch {epoch + 1:2}: loss {loss.item():.4f}, {session.phase}")
print(session.finish())

images, labels = next(iter(val))
small = average.module.eval()
with torch.no_grad():
    accuracy = (small(upscaled(images)).argmax(1) == labels).float().mean()
count = sum(p.numel() for p in small.parameters())
print(f"validation accuracy of the average {accuracy:.2%}, {count:,} parameters")

# Dense again, its weights fit the class as timm has it: a checkpoint like any other.
plain = timm.create_model(NAME, **OPTIONS).eval()
plain.load_state_dict(fxrank.merge(small).state_dict())
with torch.no_grad():
    difference = (plain(upscaled(images)) - small(upscaled(images))).abs().max()
print(f"largest difference of the merged model's outputs {difference:.1e}")
