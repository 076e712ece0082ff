"""Random single layers and random small networks, drawn by hypothesis."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

MODES = ["zeros", "zeros", "reflect", "replicate", "circular"]


@st.composite
def linears(draw, dtype=torch.float64):
    """A Linear and an input shape `(…, in)`."""
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    layer = nn.Linear(inputs, outputs, bias=draw(st.booleans()), dtype=dtype)
    return layer, (*draw(st.lists(st.integers(1, 3), max_size=3)), inputs)


@st.composite
def convs(draw, dtype=torch.float64):
    """A Conv2d with any geometry, and an input shape it accepts, with or without a batch dimension."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 4))
    if draw(st.integers(0, 4)) == 0:  # depthwise, with or without a multiplier
        groups, outputs = inputs, inputs * draw(st.integers(1, 2))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["valid", "same"])))
    if padding == "same":
        stride = (1, 1)
    layer = nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(MODES)),
        dtype=dtype,
    )
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return layer, (*batch, inputs, draw(st.integers(6, 9)), draw(st.integers(6, 9)))


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


class Program(nn.Module):
    """A network from a list of instructions, `(N, 4, 6, 6)` to `(N, 3)`.

    Branches, residuals, concatenation, a module called several times, two modules with one weight, BatchNorm, functions.
    """

    def __init__(self, instructions):
        super().__init__()
        self.instructions = instructions
        self.stem = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
        self.parts = nn.ModuleDict()
        for i, (name, option) in enumerate(instructions):
            key = str(i)
            if name in ("conv", "residual"):
                self.parts[key] = nn.Conv2d(4, 4, option, padding=option // 2, bias=False, dtype=torch.float64)
            elif name == "concat":
                self.parts[key] = nn.Conv2d(8, 4, 1, dtype=torch.float64)
                self.parts[key + "b"] = nn.Conv2d(4, 4, 3, padding=1, groups=2, dtype=torch.float64)
            elif name == "norm":
                self.parts[key] = nn.BatchNorm2d(4, dtype=torch.float64)
            elif name == "positions":
                self.parts[key] = nn.Linear(6, 6, dtype=torch.float64)
            elif name == "tied":
                self.parts[key] = nn.Conv2d(4, 4, 3, padding=2, dilation=2, dtype=torch.float64)
                self.parts[key].weight = self.stem.weight
        if any(name == "shared" for name, _ in instructions):
            self.shared = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        x = self.stem(x)
        for i, (name, option) in enumerate(self.instructions):
            key = str(i)
            if name == "conv":
                x = self.parts[key](x)
            elif name == "residual":
                x = x + ACTIVATIONS["tanh"](self.parts[key](x))
            elif name == "concat":
                x = self.parts[key](torch.cat([x, self.parts[key + "b"](x)], 1))
            elif name in ("norm", "positions", "tied"):
                x = self.parts[key](x)
            elif name == "shared":
                x = self.shared(x)
            elif name == "function":
                x = ACTIVATIONS[option](x)
        return self.head(x.flatten(2).mean(-1))


INSTRUCTIONS = st.one_of(
    st.tuples(st.sampled_from(["conv", "residual"]), st.sampled_from([1, 3])),
    st.tuples(st.sampled_from(["concat", "norm", "positions", "shared", "tied"]), st.none()),
    st.tuples(st.just("function"), st.sampled_from(sorted(ACTIVATIONS))),
)


@st.composite
def programs(draw):
    """A `Program` and its input shape."""
    return Program(draw(st.lists(INSTRUCTIONS, min_size=1, max_size=6))), (draw(st.integers(2, 3)), 4, 6, 6)
