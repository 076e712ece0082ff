"""`fxrank.register_pair`: a pair for a layer class that is nobody's but the user's, all the way."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from exact import full, randn
from nets import SOON, sgd, train
from rolled import LowRankRolledLinear, RolledLinear, RolledNet

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.registry import PAIRS, forms, make_pair
from fxrank.passes.tracing.compare import largest_difference

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
