"""`fxrank.register_pair`: a pair for a layer class that is nobody's but the user's, all the way."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from exact import full, randn
from nets import SOON, sgd, train
from rolled import LowRankRolledLinear, RolledLinear, RolledNet
from torch import nn

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.registry import PAIRS, forms, make_pair
from fxrank.passes.tracing.compare import largest_difference
from fxrank.switch.apply_plan import apply_plan

ROUNDING = 1e-12  # float64, sums of 16 products


@pytest.fixture
def registered():
    fxrank.register_pair(RolledLinear, LowRankRolledLinear)
    yield
    del PAIRS[RolledLinear]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return RolledNet().double()


def test_without_a_pair_its_weight_is_a_raw_parameter(model):
    layers = discover(fxrank.trace(model, randn(2, 12)), model)
    assert [a.kind for a in layers] == ["parameter"] * 4
    small = full(model, randn(2, 12))
    assert largest_difference(model(x := randn(3, 12)), small(x)) <= ROUNDING


@pytest.mark.usefixtures("registered")
class TestRegistered:
    def test_it_is_a_layer_of_the_graph(self, model):
        gm = fxrank.trace(model, randn(2, 12))
        assert [str(n.target) for n in gm.graph.nodes if n.op == "call_module"] == ["l0", "l1", "l2", "l3"]
        layers = discover(gm, model)
        assert [(a.name, a.kind, a.full_rank, a.macs) for a in layers[:2]] == [
            ("l0", "rolled_linear", 12, 2 * 12 * 16),
            ("l1", "rolled_linear", 16, 2 * 16 * 16),
        ]

    def test_factorize_and_merge(self, model):
        x = randn(3, 12)
        small = full(model, x)
        assert isinstance(small.l1, LowRankRolledLinear) and small.l1.shift == 3
        assert largest_difference(model(x), small(x)) <= ROUNDING
        back = fxrank.merge(small)
        assert type(back.l1) is RolledLinear and back.l1.shift == 3
        assert largest_difference(model(x), back(x)) <= ROUNDING
        assert list(back.state_dict()) == list(model.state_dict())
        cut = fxrank.factorize(model, x, rank=3)
        error = pair_error(model.l1, cut.l1)
        assert error.spectral <= error.bound + ROUNDING
        targets = [str(n.target) for n in fxrank.trace(cut, x).graph.nodes if n.op == "call_module"]
        assert targets == ["l0", "l1.u", "l1.v", "l2.u", "l2.v", "l3"]

    def test_gradients(self, model):
        x = randn(3, 12)
        small = full(model, x)
        model(x).square().sum().backward()
        small(x).square().sum().backward()
        u, v, g = small.l1.u.weight, small.l1.v.weight, model.l1.weight.grad
        assert largest_difference(v.T @ g, u.grad) <= ROUNDING
        assert largest_difference(g @ u.T, v.grad) <= ROUNDING
        assert largest_difference(model.l1.bias.grad, small.l1.v.bias.grad) <= ROUNDING

    def test_profile(self, model):
        measured = fxrank.profile(model, randn(2, 12))
        (stack,) = measured.stacks
        assert (stack.names, stack.kind) == (("l1", "l2"), "rolled_linear")
        assert stack.flops == 2 * 2 * 16 * 16 and stack.pair_flops == 2 * 2 * 4 * 32
        assert stack.dense_ms > 0 and stack.pair_ms > 0

    def test_auto_lowrank(self, model):
        data = [(randn(8, 12), torch.randint(4, (8,))) for _ in range(4)]
        result = fxrank.auto_lowrank(
            model, data, epochs=4, policy=SOON, optimizer=sgd(model), device="cpu", progress=False
        )
        assert result.plan.R == {"l1": 4, "l2": 4} and result.plan.layer("l1").kind == "rolled_linear"
        assert isinstance(model.l1, LowRankRolledLinear)
        assert [row["phase"] for row in result.history][-1] == "low-rank"

    def test_the_momentum_is_projected(self, model):
        optimizer = sgd(model)
        batch = randn(8, 12), torch.randint(4, (8,))
        session = fxrank.LowRankSession.attach(
            model, optimizer, example_inputs=batch, policy=SOON, total_steps=4, steps_per_epoch=1
        )
        train(model, optimizer, 1, batch)
        weight = model.l1.weight.detach().clone()
        momentum = optimizer.state[model.l1.weight]["momentum_buffer"].clone()
        gradients = []
        model.l1.weight.register_hook(lambda g: gradients.append(g.clone()))
        train(model, optimizer, 1, batch)  # the switch is made inside
        assert session.phase == "low-rank"
        group = optimizer.param_groups[0]
        momentum = group["momentum"] * momentum + gradients[0] + group["weight_decay"] * weight
        u, v = model.l1.u.weight, model.l1.v.weight
        assert largest_difference(v.T @ momentum, optimizer.state[u]["momentum_buffer"]) <= ROUNDING
        assert largest_difference(momentum @ u.T, optimizer.state[v]["momentum_buffer"]) <= ROUNDING

    def test_save_and_load(self, model, tmp_path):
        small = fxrank.factorize(model, randn(2, 12), rank=3)
        fxrank.save(small, tmp_path)
        torch.manual_seed(1)
        again = fxrank.load(RolledNet().double(), tmp_path)
        assert torch.equal(again(x := randn(2, 12)), small(x))
        program = (
            "import fxrank, rolled\n"
            "try: fxrank.load(rolled.RolledNet().double(), 'small')\n"
            "except fxrank.PlanMismatchError as error: print(error)\n"
            "fxrank.register_pair(rolled.RolledLinear, rolled.LowRankRolledLinear)\n"
            "print(type(fxrank.load(rolled.RolledNet().double(), 'small').l1).__name__)"
        )
        program = program.replace("'small'", repr(str(tmp_path)))
        environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
        )
        refused, loaded = done.stdout.splitlines()
        assert "'l1' is RolledLinear with weight (), the plan has rolled_linear with (16, 16)" in refused
        assert refused.endswith("If rolled_linear is a kind of your own, call fxrank.register_pair first.")
        assert loaded == "LowRankRolledLinear"

    def test_the_same_again_is_nothing_new_and_another_is_refused(self):
        class Another(LowRankRolledLinear):
            pass

        fxrank.register_pair(RolledLinear, LowRankRolledLinear)
        text = "a form has one pair class; 'channel' of RolledLinear is LowRankRolledLinear, got Another. Give it another name: form=…."
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            fxrank.register_pair(RolledLinear, Another)
        fxrank.register_pair(RolledLinear, Another, form="another")
        assert "another" in forms()
        layer = RolledLinear(6, 4, 1)
        assert type(make_pair(layer, 2, form="another")) is Another
        with pytest.raises(fxrank.RankError, match="a rank must be in 1 … 4"):
            make_pair(layer, 5, form="another")


class Incomplete(fxrank.FactorPair):
    kind = "incomplete"

    def make_layers(self, dense, place, extra_bn):
        return RolledLinear(1, 1, 0), None, RolledLinear(1, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((F.linear, LowRankRolledLinear), TypeError, "dense_class must be a subclass of Module; got builtin_function_or_method. Call register_pair(MyLayer, MyPair)."),
        ((RolledLinear(2, 2, 0), LowRankRolledLinear), TypeError, "dense_class must be a subclass of Module; got RolledLinear. Call"),
        ((RolledLinear, RolledLinear), TypeError, "pair_class must be a subclass of FactorPair; got RolledLinear. Call"),
        ((RolledLinear, Incomplete), TypeError, "a pair class must define kind, geometry, make_layers and empty_dense; Incomplete lacks geometry, empty_dense. See fxrank.FactorPair."),
        ((RolledLinear, LowRankRolledLinear, "auto"), ValueError, "a form's name must be an identifier other than 'auto'; got 'auto'."),
        ((RolledLinear, LowRankRolledLinear, "two words"), ValueError, "a form's name must be an identifier other than 'auto'; got 'two words'."),
    ],
    ids=["function", "object", "no pair", "incomplete", "auto", "words"],
)  # fmt: skip
def test_what_is_refused(arguments, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        fxrank.register_pair(*arguments)
    assert RolledLinear not in PAIRS


# -- classes of other shapes


@pytest.fixture
def register():
    """`fxrank.register_pair`, undone after the test."""
    before = {cls: dict(forms_there) for cls, forms_there in PAIRS.items()}
    yield fxrank.register_pair
    PAIRS.clear()
    PAIRS.update(before)


class Transposed(nn.Module):
    """`x @ weight`, the weight `(in, out)`."""

    def __init__(self, width, other):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, other, dtype=torch.float64) / width**0.5)

    def forward(self, x):
        return x @ self.weight


class LowRankTransposed(fxrank.FactorPair):
    kind, geometry = "transposed", ()

    @classmethod
    def unroll(cls, dense, tensor):
        return tensor.mT[None]

    def fold_dense(self, matrix):
        return matrix[0].mT

    @classmethod
    def uses(cls, dense, input_shape, output_shape):
        return (torch.Size(output_shape[:-1]).numel(),) * 3

    def make_layers(self, dense, place, extra_bn):
        n, m = self.dense_shape
        return nn.Linear(n, self.rank, bias=False, **place), None, nn.Linear(self.rank, m, bias=False, **place)

    def empty_dense(self, place):
        return Transposed(*self.dense_shape)


class ReadsIt(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Transposed(6, 6), Transposed(6, 6), Transposed(6, 4)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.c(x + x @ self.b.weight)


def test_a_weight_that_lies_otherwise_is_right_where_it_is_read(register):
    register(Transposed, LowRankTransposed)
    model, x = ReadsIt(), randn(3, 6)
    small = full(model, x)
    assert type(small.b) is LowRankTransposed
    assert largest_difference(model.b.weight, small.b.weight) <= ROUNDING
    assert largest_difference(model(x), small(x)) <= ROUNDING
    assert largest_difference(model(x), fxrank.merge(small)(x)) <= ROUNDING
    assert fxrank.plan_of(small).layer("a").macs == 3 * 36


class GainConv(nn.Conv2d):
    """A kernel, and a learned gain of each channel."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = nn.Parameter(1 + torch.rand(self.out_channels, 1, 1, 1, dtype=torch.float64))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.scale, self.bias)


class Gained(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * self.scale, self.bias)


class LowRankGainConv(fxrank.LowRankConv2d):
    def make_layers(self, dense, place, extra_bn):
        first, norm, second = super().make_layers(dense, place, extra_bn)
        second.__class__ = Gained
        second.scale = dense.scale
        return first, norm, second

    def empty_dense(self, place):
        dense = super().empty_dense(place)
        dense.__class__ = GainConv
        dense.scale = self.v.scale
        return dense


@pytest.mark.parametrize("frozen", ["weight", "scale"])
def test_a_class_with_a_forward_of_its_own_holds_its_weight_as_it_says(register, frozen):
    register(GainConv, LowRankGainConv)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), GainConv(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3)).double()
    model[1].get_parameter(frozen).requires_grad_(False)
    x = randn(2, 3, 9, 9)
    small = full(model, x)
    assert type(small[1]) is LowRankGainConv
    assert largest_difference(model(x), small(x)) <= 10 * ROUNDING  # sums of 72
    assert largest_difference(model(x), fxrank.merge(small)(x)) <= 10 * ROUNDING
    # Each keeps its own flag: what the pair shares with the layer is not the weight.
    assert small[1].v.scale.requires_grad is (frozen != "scale")
    assert small[1].u.weight.requires_grad is (frozen != "weight")


class WithoutBias(LowRankTransposed):
    """Its second layer has no such attribute at all."""

    def make_layers(self, dense, place, extra_bn):
        n, m = self.dense_shape
        first, second = Transposed(n, self.rank), Transposed(self.rank, m)
        return first.to(**place), None, second.to(**place)

    def fold_u(self, u):
        return u[0].mT

    def unfold_u(self, tensor):
        return tensor.mT[None]

    def fold_v(self, v):
        return v[0].mT

    def unfold_v(self, tensor):
        return tensor.mT[None]


def test_a_pair_without_any_bias(register, tmp_path):
    register(Transposed, WithoutBias)
    model, x = ReadsIt(), randn(3, 6)
    with pytest.raises(fxrank.NothingToFactorizeError, match="it is used as a whole, by matmul"):
        fxrank.factorize(model, x, rank=2)  # its pair does not multiply when it is read
    small = fxrank.factorize(model, x, rank=2, include="b")
    assert largest_difference(small(x), fxrank.merge(small)(x)) <= ROUNDING
    fxrank.save(small, tmp_path)
    assert largest_difference(small(x), fxrank.load(ReadsIt(), tmp_path)(x)) == 0


def test_another_form_of_a_class_that_has_one_is_given_where_it_is_asked_for(register):
    class Mine(fxrank.LowRankLinear):
        pass

    register(nn.Linear, Mine, form="mine")
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)).double(), randn(3, 8)
    assert type(fxrank.factorize(model, x, rank=2)[1]) is fxrank.LowRankLinear
    small = fxrank.factorize(model, x, rank=2, form="mine")
    assert type(small[1]) is Mine and fxrank.plan_of(small).layer("1").form == "mine"
    again = fxrank.factorize(model, x, rank=fxrank.plan_of(small))
    assert type(again[1]) is Mine
    policy = fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", latest=0.0, round_to=1)
    for form, kind in (("auto", fxrank.LowRankLinear), ("mine", Mine)):
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)).double()
        chosen = dataclasses.replace(policy, form=form)
        with fxrank.LowRankSession.attach(net, sgd(net), example_inputs=x, total_steps=2, policy=chosen):
            assert type(net[1]) is kind


def test_the_value_between_is_that_of_the_pairs_own_layers(register):
    """In a layer with channels in the middle, too, whose pair says nothing of it."""

    class Grown(nn.Conv2d):
        pass

    class LowRankGrown(fxrank.LowRankConv2d):
        kind = "grown"

    register(Grown, LowRankGrown)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Grown(8, 8, 3, stride=2, padding=2), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 9, 7)
    gm = fxrank.trace(model, x)
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank=2))
    apply_plan(model, plan, gm=gm)
    (middle,) = (n for n in gm.graph.nodes if n.target == "1.u")
    sizes = []
    model[1].u.register_forward_hook(lambda m, inputs, out: sizes.append(tuple(out.shape)))
    model(x)
    assert [tuple(middle.meta["val"].shape)] == sizes


def test_layers_that_lack_what_the_pair_needs_have_none_and_say_so(register):
    class Bare(nn.Module):
        def __init__(self, **held):
            super().__init__()
            for name, value in held.items():
                setattr(self, name, value)

        def forward(self, x):
            return x * self.weight

    class LowRankBare(LowRankTransposed):
        kind, geometry = "bare", ("width",)

    register(Bare, LowRankBare)
    for layer, text in (
        (Bare(weight=nn.Parameter(torch.randn(4, 4))), "Bare has no factor pair without the attribute 'width'"),
        (Bare(width=4, weight=nn.Parameter(torch.randn(4)), more=nn.Parameter(torch.randn(2, 2))), "'weight' of two"),
    ):
        model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4))
        layers = discover(fxrank.trace(model, torch.randn(4, 4)), model)
        assert any(text in (a.reason or "") for a in layers), [a.reason for a in layers]


def test_all_forms_of_a_layer_have_one_kind(register):
    class Other(fxrank.LowRankLinear):
        kind = "other"

    text = "all forms of a layer have one kind, which plans call it by; Linear is 'linear' in LowRankLinear and 'other' in Other. Give them the same."
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        register(nn.Linear, Other, form="other")
    assert "other" not in forms()
    for bad in (3, None):
        with pytest.raises(ValueError, match=f"a form's name must be an identifier other than 'auto'; got {bad}"):
            register(nn.Linear, fxrank.LowRankLinear, form=bad)
    with pytest.raises(TypeError, match="kind must be a name and geometry a tuple of names; got 3 and"):
        register(RolledLinear, type("Numbered", (LowRankRolledLinear,), {"kind": 3}))
