"""A training loop of your own: attach a session, and change nothing else. The run is interrupted, and goes on from its checkpoint.

python examples/own_loop.py
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxrank

EPOCHS = 10
images, labels = load_digits(return_X_y=True)  # 1,797 real scans of 8×8 pixels
images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
held_out = torch.arange(len(images)) % 5 == 0


def train(checkpoint, interrupted_after=None):
    """Train from the start, or go on from `checkpoint` if the file is there. Returns the model."""
    torch.manual_seed(0)
    data = TensorDataset(images[~held_out], labels[~held_out])
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))

    # The one new line. In a `with` block it is finished at the end, and let go if the loop breaks off.
    with fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=images[:64],
        total_steps=EPOCHS * len(loader),
        steps_per_epoch=len(loader),
        policy=fxrank.Cuttlefish(objective="size"),  # leave it out, and pairs must be faster as well
    ) as session:
        begun = 0
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            session.load_state_dict(saved["session"])  # first: the model has the form of the saved weights then
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            torch.set_rng_state(saved["random"])
            begun = saved["epoch"]
            print(f"resumed after epoch {begun}, {session.phase}")

        for epoch in range(begun, EPOCHS):
            for x, y in loader:
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()  # the switch happens in here
                scheduler.step()
            print(f"epoch {epoch + 1:2}: loss {loss.item():.4f}, {session.phase}")
            states = {"session": session, "model": model, "optimizer": optimizer, "scheduler": scheduler}
            saved = {name: thing.state_dict() for name, thing in states.items()}
            torch.save(saved | {"random": torch.get_rng_state(), "epoch": epoch + 1}, checkpoint)
            if epoch + 1 == interrupted_after:
                raise KeyboardInterrupt
    return model


with tempfile.TemporaryDirectory() as folder:
    try:
        train(Path(folder, "run.pt"), interrupted_after=7)
    except KeyboardInterrupt:
        print("interrupted")
    resumed = train(Path(folder, "run.pt"))
    unbroken = train(Path(folder, "other.pt"))

assert all(map(torch.equal, resumed.parameters(), unbroken.parameters()))
print("the resumed run ended with the weights of one that was never interrupted, bit for bit")
print(fxrank.plan_of(resumed))
right = resumed(images[held_out]).argmax(1) == labels[held_out]
print(f"validation accuracy {right.float().mean():.2%}")
