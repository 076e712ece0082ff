"""Models whose forwards do something to gradients: switch them off, reverse, invent or take them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """What the models below share; each does something to gradients between its layers."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.middle(self.body(x)))

    def middle(self, h):
        return h


# -- gradients switched off and on


class SwitchedOff(Net):
    def forward(self, x):
        with torch.no_grad():
            h = self.body(x)
        return self.head(h)


class SwitchedByFlag(Net):
    frozen = True

    def forward(self, x):
        with torch.set_grad_enabled(not self.frozen):
            h = self.body(x)
        return self.head(h)


class SwitchedInPlace(Net):
    def forward(self, x):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        h = self.body(x)
        torch.set_grad_enabled(before)
        return self.head(h)


class Inference(Net):
    def forward(self, x):
        with torch.inference_mode():
            h = self.body(x).argmax(1)
        return self.head(F.one_hot(h, 6).float()) + self.head(self.body(x))


class Quiet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)


class DecoratedPart(Net):
    def __init__(self):
        super().__init__()
        self.quiet = Quiet()

    def middle(self, h):
        return self.quiet(h) + h


class OnInsideOff(Net):
    def __init__(self):
        super().__init__()
        self.third = nn.Linear(6, 6)

    def forward(self, x):
        with torch.no_grad():
            h = self.body(x)
            with torch.enable_grad():
                h = self.third(h)
            h = h + self.body(h).softmax(-1)
        return self.head(h) + self.head(self.third(x))


class WrittenWithout(Net):
    def middle(self, h):
        with torch.no_grad():
            mask = torch.zeros_like(h)
            mask[:, ::2] = h[:, ::2]
        h = h + mask
        with torch.no_grad():
            h *= 2
        return h


class OfAllRows(Net):
    """A statistic of what it gets."""

    def middle(self, h):
        with torch.no_grad():
            scale = h.abs().amax(-1, keepdim=True)
        return h / scale


class ReadsWeightWithout(Net):
    def middle(self, h):
        with torch.no_grad():
            weight = self.body.weight * 2
        return F.linear(h, weight, self.body.bias)


class Detached(Net):
    def middle(self, h):
        return h.detach() * h + h.data


class ThroughRound(Net):
    """A straight-through estimator, as most write it."""

    def middle(self, h):
        return h + (h.round() - h).detach()


# -- functions with a backward of their own


class Reverse(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Identity(Reverse):
    @staticmethod
    def forward(ctx, x):
        return x


class Sign(Reverse):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Parts(Function):
    """Two results, and an argument that is no tensor."""

    @staticmethod
    def forward(ctx, x, y, factor):
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return x * y * factor, x + y

    @staticmethod
    def backward(ctx, product, total):
        x, y = ctx.saved_tensors
        return product * y + 3 * total, product * x, None


class Apart(Function):
    """In the newer way, without `ctx` in the forward."""

    @staticmethod
    def forward(x, power=2):
        return x**power

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.sin(), None


class Half(Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):
        return x * 1

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        return gradient / 2


taken = {function: function.apply for function in (Reverse, Sign, Apart, Half, Identity)}
"""The bound methods, as many keep them."""


def calling(name, apply):
    class Calls(Net):
        def middle(self, h):
            return apply(h)

    Calls.__name__ = name
    return Calls


Reversed = calling("Reversed", lambda h: Reverse.apply(h))
CalledInANest = calling("CalledInANest", lambda h: Parts.apply(h, h.exp(), 0.5)[0] + Parts.apply(h, h, factor)[1])
factor = 2.0


class GivenWeight(Net):
    def middle(self, h):
        return F.linear(h, Sign.apply(self.body.weight), self.body.bias)


# -- checkpoints


class Checkpointed(Net):
    reentrant = False

    def middle(self, h):
        return checkpoint(self.body, h, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class FromTheStart(Net):
    """This kind of checkpoint has gradients only where an input has one."""

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=True))


class FromTheStartMadeToNeed(Net):
    def forward(self, x):
        return self.head(checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=True))


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.body.requires_grad_(False)

    def middle(self, h):
        if not h.requires_grad:
            assert h.grad_fn is None and h.is_leaf and h.grad is None
            h.requires_grad_()
        assert h.requires_grad
        return checkpoint(self.head, h[:, :6], use_reentrant=True) @ self.head.weight


class AsksForGradients(Net):
    def middle(self, h):
        return h * 2 if h.requires_grad and torch.is_grad_enabled() else h * 2 + 0


EXACT = [
    SwitchedOff,
    SwitchedByFlag,
    SwitchedInPlace,
    Inference,
    DecoratedPart,
    OnInsideOff,
    WrittenWithout,
    OfAllRows,
    ReadsWeightWithout,
    Detached,
    ThroughRound,
    Reversed,
    CalledInANest,
    *(calling(f.__name__, lambda h, f=f: f.apply(h)) for f in (Identity, Sign, Apart, Half)),
    GivenWeight,
    Checkpointed,
    Reentrant,
    FromTheStart,
    FromTheStartMadeToNeed,
    Frozen,
    AsksForGradients,
]


# -- what no graph can do: one node, with the reason


class Energy(Net):
    """The derivative of an output is an output."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.head(self.body(x).tanh()).sum(1)
            return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Force(Net):
    """The same, that relies on being called with gradients."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.head(self.body(x).tanh()).sum(1)
        return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Hooked(Net):
    def middle(self, h):
        if h.requires_grad:
            h.register_hook(lambda gradient: -gradient)
        return h


class Mapped(Net):
    def forward(self, x):
        return torch.func.vmap(lambda row: self.head(self.body(row)))(x)


class Derived(Net):
    def forward(self, x):
        slope = torch.func.jvp(lambda h: self.body(h).tanh(), (x,), (torch.ones_like(x),))[1]
        return self.head(slope)


class OfFunctional(Net):
    def forward(self, x):
        return self.head(self.body(x)) + torch.func.grad(lambda h: self.body(h).square().sum())(x)[:, :4]


class WeightsByHand(Net):
    """A penalty of all parameters: the list has the parameters themselves."""

    def middle(self, h):
        return h + sum(p.square().sum() for p in self.parameters())


NO_GRAPH = [
    (Energy, "grad"),
    (Force, "grad"),
    (Hooked, "is of its gradient"),
    (Mapped, ""),
    (Derived, ""),
    (OfFunctional, ""),
    (WeightsByHand, "reads elsewhere than in the attributes of their modules"),
    *(
        (calling(f"Taken{f.__name__}", lambda h, f=f: taken[f](h)), f"autograd.Function {f.__name__}, whose backward")
        for f in (Reverse, Sign, Apart, Half)
    ),
    (calling("TakenIdentity", lambda h: taken[Identity](h)), "gradients do not come by Identity, as the model's do"),
]
