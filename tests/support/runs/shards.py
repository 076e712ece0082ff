"""A model in shards as people shard them, and an ordinary loop; for tests in several processes."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import fxrank

PUFFERFISH = fxrank.Pufferfish(E=4, K=0, ratio=0.25)
STEPS = 10


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Embedding, two blocks, a head: as such models are sharded, each block a unit, the rest in the root's."""

    def __init__(self):
        super().__init__()
        self.inlet = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.inlet(x)[:, None].expand(-1, 3, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def shard(model, **options):
    for block in getattr(model, "blocks", ()):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def loop(model, optimizer, steps, part):
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(part[0]), part[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(model, name):
    options = {"SGD": {"momentum": 0.9, "weight_decay": 0.01}, "AdamW": {"weight_decay": 0.1}}.get(name, {})
    return getattr(torch.optim, name)(model.parameters(), lr=0.01, **options)


def wholes(model):
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.state_dict().items()}


def attach(model, optimizer, x, policy=PUFFERFISH, **options):
    return fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=STEPS, steps_per_epoch=1, policy=policy, **options
    )
