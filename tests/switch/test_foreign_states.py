"""States, groups and names of optimizers as people write and wrap them: timm's, containers, Lookahead, named parameters."""

import pytest
import torch
import torch.nn.functional as F
from nets import mlp, train, vectors
from torch import nn

import fxrank
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.moments import NoProjectionError, projected
from fxrank.switch.optimizer import swap_parameters


def attach(model, optimizer, total=8, **policy):
    """A session that makes the switch after two steps."""
    policy = {"E": 2, "ratio": 0.25, "frobenius_decay": "auto"} | policy
    return fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=vectors()[0],
        total_steps=total,
        steps_per_epoch=1,
        policy=fxrank.Pufferfish(**policy),
    )


# -- state


@pytest.mark.parametrize(("width", "kept"), [(96, True), (64, False)])
@pytest.mark.parametrize("name", ["adafactor", "cadafactor"])
def test_rows_and_columns_of_factors_that_are_too_small_for_them_start_fresh(name, width, kept):
    create = pytest.importorskip("timm.optim").create_optimizer_v2
    model, smallest = mlp(width=width), 16
    options = {"betas": (0.9, 0.99)} if name == "cadafactor" else {}
    optimizer = create(model, opt=name, lr=0.01, min_dim_size_to_factor=smallest, **options)
    session = attach(model, optimizer)  # of rank 24, and of rank 16, which timm does not take for large enough
    train(model, optimizer, 2)
    u = optimizer.state.get(model[2].u.weight, {})
    assert ("exp_avg_sq_row" in u) == kept
    train(model, optimizer, 4)
    note = "optimizer state 'exp_avg_sq_row' of Adafactor has no known projection; its factors start fresh"
    assert session.notes == ([] if kept else [f"2: {note}", f"4: {note}"])


@pytest.mark.parametrize("name", ["adafactor", "adafactorbv"])
def test_means_over_other_dimensions_of_convolutions_start_fresh(name):
    create = pytest.importorskip("timm.optim").create_optimizer_v2
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.Conv2d(40, 40, 3), nn.Conv2d(40, 48, 3), nn.Flatten(), nn.Linear(192, 4)
    )
    x, y = torch.randn(4, 3, 8, 8), torch.randint(4, (4,))
    optimizer = create(model, opt=name, lr=0.01)
    session = fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=x,
        total_steps=6,
        steps_per_epoch=1,
        policy=fxrank.Pufferfish(E=2, ratio=0.5),
    )
    train(model, optimizer, 5, (x, y))
    assert set(session.finish().R) == {"1", "2"}
    assert all("has no known projection" in note for note in session.notes) and len(session.notes) == 2


class Lists(torch.optim.SGD):
    """Keeps its momentum in a container, as Kron keeps its preconditioners."""

    box = list

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                (buffer,) = self.state[p].setdefault("Q", self.box([torch.zeros_like(p)]))
                p.sub_(buffer.mul_(0.9).add_(p.grad), alpha=group["lr"])


@pytest.mark.parametrize("box", [list, tuple])
def test_containers_of_tensors_are_not_copied_to_both_factors(box):
    model = mlp()
    optimizer = type("Boxes", (Lists,), {"box": staticmethod(box)})(model.parameters(), lr=0.01)
    session = attach(model, optimizer, frobenius_decay=None)
    train(model, optimizer, 6)
    assert session.notes == [
        f"{name}: optimizer state 'Q' of Boxes has no known projection; its factors start fresh" for name in "24"
    ]
    assert optimizer.state[model[2].u.weight]["Q"][0].shape == model[2].u.weight.shape


def test_nested_containers_and_plain_ones():
    pair = fxrank.factorize(mlp(), vectors()[0], rank=0.25)[2]
    shape = torch.Size((16, 16))
    for value in ({"a": [torch.ones(2)]}, [(), {"b": torch.ones(16, 16)}]):
        with pytest.raises(NoProjectionError, match=r"^deep$"):
            projected({"deep": value}, shape, pair)
    u, v = projected({"seen": [1], "step": 3, "nothing": None}, shape, pair)
    assert u == v == {"seen": [1], "step": 3, "nothing": None}
    assert u["seen"] is not v["seen"]


# -- wrappers that share the groups


def test_timms_lookahead_goes_on_with_the_state_of_the_optimizer_inside():
    create = pytest.importorskip("timm.optim").create_optimizer_v2
    model = mlp()
    optimizer = create(model, opt="lookahead_adamw", lr=0.01, weight_decay=0.1)
    session = attach(model, optimizer, total=20, E=8)
    train(model, optimizer, 8)
    inside = optimizer._base_optimizer
    assert session.clock.step == 8 and session.phase == "low-rank" and session.notes == []
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == {id(p) for p in inside.state} and not optimizer.state
    pair = model[2]
    u = inside.state[pair.u.weight]
    assert u["step"] == 8 and u["exp_avg"].abs().sum() > 0
    # the slow weights were those of two steps ago; the product of the factors' is near
    slow = inside.state[pair.v.weight]["lookahead_slow_buff"] @ u["lookahead_slow_buff"]
    product = (pair.v.weight @ pair.u.weight).detach()
    assert 0 < float((slow - product).norm()) < 0.2 * float(product.norm())
    train(model, optimizer, 12)
    assert session.clock.step == 20 and inside.state[pair.u.weight]["step"] == 20


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware minimization as it is usually written."""

    def __init__(self, params, base, **options):
        super().__init__(params, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            old = [p.clone() for p in params]
            for p in params:
                p.add_(0.05 * p.grad)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, value in zip(params, old, strict=True):
                p.copy_(value)
        self.base_optimizer.step()


def test_a_sharpness_aware_optimizer_steps_once_and_keeps_its_moments():
    model, (x, y) = mlp(), vectors()
    optimizer = Sharp(model.parameters(), torch.optim.AdamW, lr=0.01)
    session = attach(model, optimizer)

    def closure():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()

    for step in range(6):
        closure()
        optimizer.step(closure)
        assert session.clock.step == step + 1
    assert session.notes == [] and optimizer.base_optimizer.state[model[2].u.weight]["step"] == 6


# -- named parameters


class Everything(nn.Module):
    """A convolution, a layer with weight norm, a raw parameter, a recurrent layer and two tied ones, all eligible."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.raw = nn.Parameter(torch.randn(16, 16) / 4)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.inner[2].weight = self.inner[0].weight
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.conv2(self.conv(x).relu()).relu().mean((2, 3))
        x = torch.tanh(self.norm(x)) @ self.raw
        return self.head(self.inner(self.rnn(x.unsqueeze(1))[0].squeeze(1)))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("groups", [1, 2])
def test_names_follow_the_parameters(groups, prefix):
    model, (x, y) = Everything(), (torch.randn(4, 3, 6, 6), torch.randint(4, (4,)))
    named = [(prefix + name, p) for name, p in model.named_parameters()]
    given = named
    if groups == 2:  # the extra norm joins the second, which has no decay
        given = [
            {"params": [(n, p) for n, p in named if p.ndim > 1]},
            {"params": [(n, p) for n, p in named if p.ndim == 1], "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(given, lr=0.01, weight_decay=0.1)
    session = fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=x,
        total_steps=6,
        steps_per_epoch=1,
        policy=fxrank.Pufferfish(E=2, ratio=0.25, extra_bn=True),
        include="*",
        exclude=["conv", "head"],
    )
    train(model, optimizer, 4, (x, y))
    assert len(session.finish().R) >= 5
    names = {id(p): prefix + name for name, p in model.named_parameters()}
    # Of tied layers, the pair's names are those of the first place; the other's bias keeps the name that it had.
    names[id(model.inner[2].v.bias)] = f"{prefix}inner.2.bias"
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)


def test_names_of_a_model_that_is_one_layer():
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model[0].named_parameters(), lr=0.1)  # named as if the layer were the model
    replacements = apply_plan(
        model, fxrank.plan_of(fxrank.factorize(model, torch.randn(2, 16), rank=0.25, include="*"))
    )
    assert swap_parameters(optimizer, replacements) == []
    assert optimizer.param_groups[0]["param_names"] == ["u.weight", "v.weight", "v.bias"]
