"""`fully_shard` (FSDP2) on gloo: real shards in real processes, against one process that has the whole model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import vectors
from teams import team
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


def run(rank, size, name, policy, steps=STEPS, options=None):
    """The sharded run and, in the same process, its whole twin; plain data about both."""
    torch.manual_seed(0)
    twin = Net().double()
    model = shard(copy.deepcopy(twin), **(options or {}))
    x, y = vectors(32)
    x = x.double()
    ends = []
    for net, part in ((model, (x[rank::size], y[rank::size])), (twin, (x, y))):
        optimizer = optimizer_of(net, name)
        with fxrank.LowRankSession.attach(
            net, optimizer, example_inputs=part[0], total_steps=steps, steps_per_epoch=1, policy=policy
        ) as session:
            losses = loop(net, optimizer, steps, part)
        ends.append((losses, session, {k: v.detach() for k, v in wholes(net).items()}, optimizer))
    (_, session, mine, optimizer), (_, other, theirs, _) = ends
    assert list(mine) == list(theirs)
    worst = max(float((mine[k] - theirs[k]).abs().max()) for k in mine)
    inside = {id(p) for p in model.parameters()}
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    assert sorted(inside) == sorted(id(p) for g in optimizer.param_groups for p in g["params"])
    return {
        "R": session.plan.R,
        "switch": session.plan.switch_step,
        "worst": worst,
        "notes": session.notes,
        "other": (other.plan.R, other.plan.switch_step),
        "bytes": session.gradient_bytes,
        "plan": session.plan.to_json(),
        "graph": len(list(session.graph_module.graph.nodes)),
    }


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_shards_train_what_the_whole_model_would(name, size):
    ends = team(run, size, name, PUFFERFISH)
    for end in ends:
        assert end["worst"] < 1e-9  # float64; gradients are averaged in another order
        assert len(end["R"]) == 8 and (end["R"], end["switch"]) == end["other"] and end["switch"] == 4
        assert end["notes"] == [] and end["plan"] == ends[0]["plan"]
        assert end["bytes"]["low-rank"] < end["bytes"]["full-rank"]
