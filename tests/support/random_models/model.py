"""A whole model of parts: a stem, parts on one stream after the other, a head, and the ways that models take inputs and return outputs."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from random_models.drawn import PARTS, SIDE, TOKENS, Draw

VOCABULARY = 11
ROUTES = [
    ("vectors",),
    ("tokens",),
    ("tokens", "vectors"),
    ("images", "vectors"),
    ("images", "tokens"),
    ("images", "tokens", "vectors"),
]


class Outputs(NamedTuple):
    scores: torch.Tensor
    features: torch.Tensor


@dataclass
class Answer:
    scores: torch.Tensor
    features: torch.Tensor


OUTPUTS = {
    "tensor": lambda scores, features: scores,
    "tuple": lambda scores, features: (scores, features),
    "list": lambda scores, features: [scores, {"features": features}],
    "dict": lambda scores, features: {"scores": scores, "rest": {"features": features, "nothing": None}},
    "namedtuple": Outputs,
    "dataclass": Answer,
}


class Residual(nn.Module):
    """The part in a residual branch, behind a norm or not."""

    def __init__(self, draw, part, width, images):
        super().__init__()
        self.norm = nn.GroupNorm(1, width) if images else nn.LayerNorm(width)
        self.part, self.drop = part, nn.Dropout(draw.choice([0, 0.1]))
        self.before = draw.flip()

    def forward(self, x):
        if self.before:
            return x + self.drop(self.part(self.norm(x)))
        return self.norm(x + self.drop(self.part(x)))


class Model(nn.Module):
    """Drawn by `draw`. `streams` are those that it goes through; its parts are named in `names`."""

    def __init__(self, draw):
        super().__init__()
        width = draw.choice([4, 6, 8])
        self.width = width
        self.streams = draw.choice(ROUTES)
        self.takes = "ids" if self.streams[0] == "tokens" and draw.flip() else self.streams[0]
        self.way, self.returns = draw.choice(["plain", "keyword", "batch", "two"]), draw.choice(sorted(OUTPUTS))
        self.stem = {
            "ids": lambda: nn.Embedding(VOCABULARY, width),
            "tokens": lambda: nn.Linear(3, width),
            "vectors": lambda: nn.Linear(3, width),
            "images": lambda: nn.Conv2d(3, width, 3, padding=1),
        }[self.takes]()
        self.names = []
        self.stages = nn.ModuleList(self._stage(draw, stream) for stream in self.streams)
        self.act = draw.choice([nn.Tanh(), nn.GELU(), nn.Identity()])
        tied = self.takes == "ids" and draw.flip()
        self.head = nn.Linear(width, VOCABULARY if tied else 3, bias=draw.flip())
        if tied:
            self.head.weight = self.stem.weight

    def _stage(self, draw, stream):
        stage = nn.ModuleList()
        for _ in range(draw.randint(1, 2)):
            cls = draw.choice(PARTS[stream])
            self.names.append(cls.__name__)
            part = cls(draw, self.width)
            stage.append(Residual(draw, part, self.width, stream == "images") if draw.flip(0.4) else part)
        return stage

    def forward(self, x, scale=None):
        x = self.stem(x["inputs"][0] if self.way == "batch" else x)
        for stream, stage in zip(self.streams, self.stages, strict=True):
            x = to_stream(x, stream)
            for part in stage:
                x = self.act(part(x))
        scores = self.head(x)
        if scale is not None:
            scores = scores * scale[:, None] if scores.ndim == 2 else scores * scale[:, None, None]
        return OUTPUTS[self.returns](scores, x)

    def example(self, rows, seed=0):
        """One call's inputs as a user gives them to fxrank, of so many rows."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {"tokens": (TOKENS, 3), "vectors": (3,), "images": (3, SIDE, SIDE)}
        if self.takes == "ids":
            x = torch.randint(VOCABULARY, (rows, TOKENS), generator=generator)
        else:
            x = torch.randn(rows, *shapes[self.takes], generator=generator, dtype=torch.float64)
        scale = 1 + torch.rand(rows, generator=generator, dtype=torch.float64)
        return {
            "plain": x,
            "keyword": {"x": x, "scale": scale},
            "batch": ({"inputs": [x]},),
            "two": (x, scale),
        }[self.way]


def to_stream(x, stream):
    """The hidden value as another stream: the first pixels of an image as tokens, and the mean of either as a vector."""
    if stream == "tokens" and x.ndim == 4:
        return x.flatten(2)[..., :TOKENS].transpose(1, 2)
    if stream == "vectors" and x.ndim > 2:
        return x.mean((2, 3)) if x.ndim == 4 else x.mean(1)
    return x


def build(seed):
    """The model of this seed, in float64 and in training mode."""
    draw = Draw(seed)
    torch.manual_seed(seed)
    model = Model(draw).double()
    if draw.flip(0.2):  # fine-tuning: some of it is frozen
        for parameter in model.stem.parameters():
            parameter.requires_grad_(False)
        draw.choice(list(model.stages)).requires_grad_(False)
    return model.train(draw.flip(0.7))
