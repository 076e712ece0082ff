"""A layer class of your own gets factor pairs: tell fxrank what the two thin layers are, and how the dense one is made again.

python examples/own_layer.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from fxrank.demo import digits


class EqualLinear(nn.Module):
    """A linear layer `(…, in)` to `(…, out)` with an equalized learning rate, as StyleGAN has it: the weight is scaled when it is used."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.gain = (2 / in_features) ** 0.5
        self.weight = nn.Parameter(torch.randn(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x):
        return F.linear(x, self.gain * self.weight, self.bias)


class LowRankEqualLinear(fxrank.FactorPair):
    """`EqualLinear(in, r)`, which scales as the dense layer does, then `Linear(r, out)`."""

    kind = "equal_linear"  # what plans and tables call the layer
    geometry = ("in_features", "out_features", "gain")  # what the pair takes over from it

    def make_layers(self, dense, place, extra_bn):
        """The two layers, without bias (the dense layer's own bias goes to the second), on the device and of the dtype in `place`."""
        first = EqualLinear(self.in_features, self.rank, bias=False, **place)
        return first, None, nn.Linear(self.rank, self.out_features, bias=False, **place)

    def empty_dense(self, place):
        """The dense layer again, without bias and without numbers: for `merge` and `load`."""
        return EqualLinear(self.in_features, self.out_features, bias=False, **place)

    # With these two the factors know the data. Without them they are made of the weight alone.

    @classmethod
    def side(cls, dense):
        """What is watched of the layer while the model runs."""
        return "inputs"

    @classmethod
    def seen(cls, dense, side, input, output):
        """The vectors that the weight itself is multiplied with in one call, `(…, groups, in)`; there is one group here."""
        return dense.gain * input.unsqueeze(-2)


fxrank.register_pair(EqualLinear, LowRankEqualLinear)


class Net(nn.Module):
    """`(N, 1, 8, 8)` images to 10 classes."""

    def __init__(self, width=256):
        super().__init__()
        self.layers = nn.ModuleList([EqualLinear(64, width), EqualLinear(width, width), EqualLinear(width, width)])
        self.head = EqualLinear(width, 10)

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


torch.manual_seed(0)
train, val = digits()
policy = fxrank.Cuttlefish(objective="size")  # leave it out, and pairs must be faster as well
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
result = fxrank.auto_lowrank(
    model, train, epochs=12, val_loader=val, optimizer=optimizer, scheduler=scheduler, policy=policy
)
print(result.report)
print(model)

images, _ = next(iter(val))
dense = fxrank.merge(model)  # of EqualLinear layers again
with torch.no_grad():
    print(f"largest difference of the merged model's outputs {(dense(images) - model(images)).abs().max():.1e}")
