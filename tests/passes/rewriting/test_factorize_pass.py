"""The rewrites on graphs, the driver that runs them, and the installation in the module tree."""

import copy
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import fxrank
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.rewriting.driver import Pass, Refused
from fxrank.passes.rewriting.factorize import Factorize, Merge
from fxrank.passes.rewriting.install import install, pairs_in
from fxrank.passes.tracing.compare import largest_difference
from fxrank.passes.tracing.trace import trace

# float32, two convolutions of a few dozen products.
ROUNDING = 1e-5


class Small(nn.Module):
    """One layer of every kind; `body` is called twice, the second time on the first's output with a branch around."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.body(torch.relu(self.body(x)))
        return self.head(x.mean((2, 3)))


class Nested(nn.Module):
    """The same inside two containers, with the layer registered under a second name."""

    def __init__(self):
        super().__init__()
        self.outer = nn.ModuleDict({"inner": nn.Sequential(Small(), nn.Linear(2, 2))})
        self.alias = self.outer["inner"][0].body

    def forward(self, x):
        return self.outer["inner"](x)


def images(n=2):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def code(gm):
    lines = [line.split("#")[0].split(";")[0].strip() for line in gm.code.splitlines()]
    return [line for line in lines if line and not line.startswith("def")]


def calls(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]


def rewritten(rank=4, extra_bn=False, model=None, path="body"):
    model = (Small() if model is None else model).eval()
    gm = trace(model, images())
    pair = make_pair(model.get_submodule(path), rank, extra_bn=extra_bn)
    return model, gm, pair, Factorize(pairs={path: pair})(gm)


BEFORE = [
    "stem = self.stem(x)",
    "body = self.body(stem)",
    "relu = torch.relu(body)",
    "body_1 = self.body(relu)",
    "add = stem + body_1",
    "mean = add.mean((2, 3))",
    "head = self.head(mean)",
    "return head",
]
AFTER = [
    "stem = self.stem(x)",
    "body_u = self.body.u(stem)",
    "body_v = self.body.v(body_u)",
    "relu = torch.relu(body_v)",
    "body_u_1 = self.body.u(relu)",
    "body_v_1 = self.body.v(body_u_1)",
    "add = stem + body_v_1",
    "mean = add.mean((2, 3))",
    "head = self.head(mean)",
    "return head",
]
# fx gives no name twice in one graph.
MERGED = [
    "stem = self.stem(x)",
    "body_2 = self.body(stem)",
    "relu = torch.relu(body_2)",
    "body_3 = self.body(relu)",
    "add = stem + body_3",
    "mean = add.mean((2, 3))",
    "head = self.head(mean)",
    "return head",
]


def test_golden_graph():
    assert code(trace(Small().eval(), images())) == BEFORE
    _, gm, _, result = rewritten()
    assert result.graph_module is gm
    assert result.modified
    assert result.refused == {}
    assert code(gm) == AFTER


def test_golden_graph_with_extra_norm():
    _, gm, _, _ = rewritten(extra_bn=True)
    assert code(gm)[1:4] == [
        "body_u = self.body.u(stem)",
        "body_norm = self.body.norm(body_u)",
        "body_v = self.body.v(body_norm)",
    ]


def test_nothing_to_do_leaves_the_graph_as_it_came():
    gm = trace(Small(), images())
    for pairs in ({}, {"nowhere": make_pair(nn.Linear(2, 2), 1)}):
        before, nodes = gm.code, list(gm.graph.nodes)
        result = Factorize(pairs=pairs)(gm)
        assert result == (gm, False, {})
        assert gm.code == before
        assert list(gm.graph.nodes) == nodes
    assert not Merge(dense={})(gm).modified
    assert not Merge(dense={"body": nn.Conv2d(4, 4, 3)})(gm).modified


@pytest.mark.parametrize("rank", [4, 2, 1])
def test_numbers_agree_and_both_views_share_the_pair(rank):
    model, gm, pair, _ = rewritten(rank)
    dense = copy.deepcopy(model)
    assert gm.get_submodule("body") is pair
    assert model.body is not pair
    install(model, {id(model.body): pair})
    assert torch.equal(gm(images(3)), model(images(3)))
    if rank == 4:
        assert largest_difference(dense(images()), gm(images())) <= ROUNDING
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    assert torch.equal(gm(images()), model(images()))


@pytest.mark.parametrize("path", ["outer.inner.0.body", "alias"])
def test_a_nested_layer_with_two_names(path):
    model = Nested()
    x = images()
    expected = model(x)
    gm = trace(model, x)
    pair = make_pair(model.get_submodule(path), 4)
    layer = model.get_submodule(path)
    paths = install(model, {id(layer): pair})
    assert sorted(paths) == ["alias", "outer.inner.0.body"]
    assert model.alias is model.outer["inner"][0].body is layer
    assert type(layer) is type(pair) and layer.u is pair.u and layer.v is pair.v
    result = Factorize(pairs=dict.fromkeys(paths, layer))(gm)
    assert result.modified
    assert torch.equal(gm(x), model(x))
    assert largest_difference(expected, gm(x)) <= ROUNDING


def test_metadata_is_kept_and_the_middle_has_its_own_shape():
    before = {n.name: dict(n.meta) for n in trace(Small().eval(), images()).graph.nodes}
    _, gm, _, _ = rewritten(rank=2)
    for node in gm.graph.nodes:
        if str(node.target).startswith("body."):
            assert node.meta["nn_module_stack"]
            channels = 2 if node.target == "body.u" else 4
            assert tuple(node.meta["val"].shape) == (2, channels, 4, 4)
            assert node.meta["val"].dtype is torch.float32
        elif node.name in before:
            assert set(node.meta) == set(before[node.name])
    torch.fx.passes.shape_prop.ShapeProp(gm).propagate(images())
    for node in gm.graph.nodes:
        if node.op == "call_module":
            assert node.meta["tensor_meta"].shape == node.meta["val"].shape


def test_an_unbatched_input_and_keywords_go_to_the_first_factor():
    class Keyword(Small):
        def forward(self, x):
            return self.body(input=self.stem(x))

    model = Keyword()
    x = images()[0]
    gm = trace(model, x)
    pair = make_pair(model.body, 2)
    Factorize(pairs={"body": pair})(gm)
    assert code(gm)[1:] == ["body_u = self.body.u(input = stem)", "body_v = self.body.v(body_u)", "return body_v"]
    assert tuple(gm.graph.find_nodes(op="call_module", target="body.u")[0].meta["val"].shape) == (2, 4, 4)
    assert Merge(dense={"body": pair.dense_layer()})(gm).modified
    assert code(gm)[1:] == ["body_1 = self.body(input = stem)", "return body_1"]


def test_torchs_pass_manager_takes_both_passes():
    model = Small()
    pair = make_pair(model.body, 2)
    gm = trace(model, images())
    result = PassManager(passes=[Factorize(pairs={"body": pair})])(gm)
    assert result.modified
    assert calls(result.graph_module) == ["stem", "body.u", "body.v", "body.u", "body.v", "head"]
    result = PassManager(passes=[Merge(dense={"body": pair.dense_layer()}), Factorize()])(result.graph_module)
    assert result.modified
    assert calls(result.graph_module) == ["stem", "body", "body", "head"]
    assert not PassManager(passes=[Factorize()])(gm).modified


@pytest.mark.parametrize("extra_bn", [False, True], ids=["plain", "extra_bn"])
def test_merge_is_the_inverse(extra_bn):
    model, gm, pair, _ = rewritten(extra_bn=extra_bn)
    if extra_bn:
        with torch.no_grad():
            pair.norm.running_mean.normal_()
            pair.norm.running_var.uniform_(0.5, 2)
            pair.norm.weight.normal_()
            pair.norm.bias.normal_()
    expected = gm(images())
    dense = pair.dense_layer()
    result = Merge(dense={"body": dense})(gm)
    assert result.modified
    assert result.refused == {}
    assert code(gm) == MERGED
    assert gm.get_submodule("body") is dense
    assert type(dense) is type(model.body)
    assert largest_difference(expected, gm(images())) <= ROUNDING
    again = Merge(dense={"body": dense})(gm)
    assert not again.modified


class InARow(Small):
    def forward(self, x):
        return self.body(self.body(self.stem(x)))


def test_two_calls_in_a_row_stay_two_calls():
    _, gm, pair, _ = rewritten(model=InARow())
    expected = gm(images())
    Merge(dense={"body": pair.dense_layer()})(gm)
    assert calls(gm) == ["stem", "body", "body"]
    assert largest_difference(expected, gm(images())) <= ROUNDING


def test_merge_refuses_a_call_whose_middle_is_used_elsewhere_and_merges_the_other():
    _, gm, pair, _ = rewritten(model=InARow())
    first = gm.graph.find_nodes(op="call_module", target="body.u")[0]
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ((output.args[0], first),)
    gm.recompile()
    expected = gm(images())
    result = Merge(dense={"body": pair.dense_layer()})(gm)
    assert result.refused == {"body_v": "body_u, between the factors of 'body', is used elsewhere too"}
    assert calls(gm) == ["stem", "body.u", "body.v", "body"]
    assert result.modified
    assert largest_difference(expected, gm(images())) <= ROUNDING


def test_a_second_run_changes_nothing():
    _, gm, pair, _ = rewritten()
    before = gm.code
    result = Factorize(pairs={"body": pair})(gm)
    assert not result.modified
    assert gm.code == before


def test_passes_are_frozen_and_say_whether_they_are_exact():
    one = Factorize(pairs={})
    with pytest.raises(FrozenInstanceError):
        one.pairs = {}
    assert one.exact
    assert one == Factorize(pairs={})


@dataclass(frozen=True)
class SwapSides(Pass):
    """Changes arguments only; refuses sums."""

    def rewrite(self, gm, node):
        if str(node.target) == "<built-in function add>":
            return Refused("a sum has no sides")
        if str(node.target) != "<built-in function sub>":
            return False
        node.args = node.args[::-1]
        return False  # a lie, which the driver does not ask for


class Difference(nn.Module):
    def forward(self, x):
        return (x - 2 * x) + x


def test_the_driver_measures_the_change_itself_and_collects_refusals():
    gm = fx.symbolic_trace(Difference())
    expected = -gm(torch.ones(2)) + 2
    result = SwapSides()(gm)
    assert result.modified
    assert result.refused == {"add": "a sum has no sides"}
    assert torch.equal(gm(torch.ones(2)), expected)
    assert not SwapSides()(fx.symbolic_trace(nn.Identity())).modified


def test_the_model_itself_cannot_be_replaced():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"the model is itself that layer \(Linear\)\. Wrap it: torch\.nn\.Sequential"):
        install(layer, {id(layer): make_pair(layer, 1)})


class Aside(nn.Module):
    """Layers held in plain containers besides their registration: fx and the forward go through those."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.row = [self.a, {"middle": (self.b, "b")}]
        self.row.append(self.row)
        self.plain = [1, 2]
        self.same = (1, (2, 3))
        object.__setattr__(self, "last", self.c)

    def forward(self, x):
        return self.last(self.row[1]["middle"][0](self.row[0](x)))


def test_layers_held_aside_are_replaced_too():
    model = Aside()
    x = torch.randn(2, 4)
    expected, plain, same = model(x), model.plain, model.same
    with pytest.warns(UserWarning, match="break-even"):
        small = fxrank.factorize(model, x, rank=1.0, include="*")
    assert small.row[0] is small.a
    assert small.row[1]["middle"] == (small.b, "b")
    assert small.row[2] is small.row
    assert small.last is small.c
    assert set(pairs_in(small)) == {"a", "b", "c"}
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert largest_difference(expected, small(x)) <= ROUNDING
    assert model.row[0] is model.a
    install(model, {id(model.a): make_pair(model.a, 1)})
    assert model.plain is plain
    assert model.same is same
    assert model.row[1]["middle"][0] is model.b


def test_hooks_of_the_layer_go_on_and_can_still_be_removed():
    model = Small()
    seen = []
    handles = [
        model.body.register_forward_hook(lambda module, args, output: seen.append(("forward", tuple(output.shape)))),
        model.body.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True),
        model.body.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward")),
    ]
    install(model, {id(model.body): make_pair(model.body, 2)})
    model(images()).sum().backward()
    assert seen == ["before", ("forward", (2, 4, 4, 4))] * 2 + ["backward"] * 2
    for handle in handles:
        handle.remove()
    model(images()).sum().backward()
    assert len(seen) == 6


def test_other_modules_keep_their_identity():
    model = Nested()
    before = dict(model.named_modules(remove_duplicate=False))
    install(model, {id(model.alias): make_pair(model.alias, 2)})
    after = dict(model.named_modules(remove_duplicate=False))
    pairs = {p for p in after if p.startswith(("alias", "outer.inner.0.body"))}
    assert {p: m for p, m in before.items() if p not in pairs} == {p: m for p, m in after.items() if p not in pairs}


def test_graphs_of_factorized_models_can_be_traced_by_torch_too():
    small = fxrank.factorize(Small(), images(), rank=0.5)
    gm = fx.symbolic_trace(small)
    assert calls(gm) == ["stem", "body.u", "body.v", "body.u", "body.v", "head"]
    assert torch.equal(gm(images()), small(images()))
