"""Small networks and an ordinary training loop, shared by the tests of the product."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

import fxrank

UNTIMED = fxrank.Cuttlefish(speedup_threshold=None, earliest=0.0, latest=0.5)
"""The default policy without timing, so that a run depends on nothing but its seed."""
SOON = fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", ratio=0.25, latest=0.5, epsilon=1e-9, round_to=1)
"""Switches half-way, at a quarter of the full rank; untimed too."""
HALFWAY = dataclasses.replace(SOON, epsilon=fxrank.Cuttlefish().epsilon)
"""The same, with the usual test for ranks that have settled before."""


def mlp(seed=0, width=16, dtype=torch.float32):
    """Four Linear layers, `(N, 12)` to `(N, 4)`; "2" and "4" are eligible, break-even `width / 2`."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 4),
    ).to(dtype)


class ConvNet(nn.Module):
    """`(N, 3, 8, 8)` to `(N, 4)`; conv2 (grouped) and conv3 are eligible."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(F.relu(self.conv3(x)).mean((2, 3)))


class Tied(nn.Module):
    """Two Linear layers with one weight (and their own biases), and one module called twice."""

    def __init__(self, seed=0, tied=True):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(12, 16)
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.twice = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        x = torch.tanh(self.b(torch.tanh(self.a(self.first(x)))))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


class SixLayers(nn.Module):
    """Six Linear layers; "l1" … "l4" are eligible."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for i, (n, m) in enumerate([(12, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 4)]):
            setattr(self, f"l{i}", nn.Linear(n, m))

    def forward(self, x):
        for i in range(6):
            x = torch.relu(getattr(self, f"l{i}")(x))
        return x


class Net(nn.Module):
    """`(N, 2, 6, 6)` to `(N, classes)`; only `body` is eligible."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, classes)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
"""Sizes of a tiny BERT, by the names of `transformers.BertConfig`."""


def vectors(n=8, seed=1, dtype=torch.float32):
    """Inputs `(n, 12)` and labels `(n,)` of 4 classes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=g).to(dtype), torch.randint(4, (n,), generator=g)


def images(n=4, seed=1):
    """Inputs `(n, 3, 8, 8)` and labels `(n,)` of 4 classes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(4, (n,), generator=g)


def clusters(count=48, classes=3):
    """Inputs `(count, 2, 6, 6)` around one mean for each class, and labels `(count,)`."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (count,), generator=generator)
    x = torch.randn(classes, 2, 6, 6, generator=generator)[y] + 0.3 * torch.randn(count, 2, 6, 6, generator=generator)
    return x, y


def batches(count=4, make=vectors):
    """A list of batches, a loader as good as any."""
    return [make(seed=i) for i in range(count)]


def train(model, optimizer, steps, batch=None, scheduler=None):
    """An ordinary loop; the losses."""
    x, y = vectors() if batch is None else batch
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def attach(model, optimizer, policy=SOON, x=None, **options):
    """A session of 10 steps, unless told otherwise."""
    x = vectors()[0] if x is None else x
    return fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, policy=policy, **({"total_steps": 10} | options)
    )


def snapshot(model):
    """Everything of a model that a refused call must leave alone, comparable with ==."""
    return {
        "types": {n: type(m).__name__ for n, m in model.named_modules()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "parameters": {n: id(p) for n, p in model.named_parameters()},
        "state": {n: (v.dtype, tuple(v.shape), v.flatten().tolist()) for n, v in model.state_dict().items()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "attributes": sorted(vars(model)),
    }


def settings_of(optimizer):
    """The same for an optimizer."""
    return {
        "groups": [
            {k: [id(p) for p in v] if k == "params" else v for k, v in g.items()} for g in optimizer.param_groups
        ],
        "state": {id(p): sorted(s) for p, s in optimizer.state.items()},
        "hooks": (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)),
    }
