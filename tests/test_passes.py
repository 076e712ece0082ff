"""The rewrites on graphs, and the modules they put in."""

import ast
import copy
import importlib
import inspect
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import fxrank
import fxrank.passes
from fxrank.passes.calibrate import calibrate
from fxrank.passes.factorize import Factorize, Merge, install
from fxrank.passes.factors import LowRankConv2d, LowRankLinear, make_pair
from fxrank.passes.trace import trace
from fxrank.passes.verify import largest_difference, output_difference, pair_error


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.body(torch.relu(self.body(x)))
        return self.head(x.mean((2, 3)))


def code(gm):
    lines = [line.split("#")[0].split(";")[0].strip() for line in gm.code.splitlines()]
    return [line for line in lines if line and not line.startswith("def")]


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def rewritten(rank=4, extra_bn=False):
    model = Small().eval()
    gm = trace(model, X)
    pair = make_pair(model.body, rank, extra_bn=extra_bn)
    return model, gm, pair, Factorize(pairs={"body": pair})(gm)


def test_golden_graph():
    _, gm, _, result = rewritten()
    assert result.modified
    calls = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    assert calls == ["stem", "body.u", "body.v", "body.u", "body.v", "head"]
    assert code(gm) == [
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


def test_values_metadata_and_several_call_sites():
    model, gm, pair, _ = rewritten(rank=2)
    for node in gm.graph.nodes:
        if str(node.target) == "body.u":
            assert tuple(node.meta["val"].shape) == (2, 2, 4, 4)
            assert node.meta["nn_module_stack"]
    reference = copy.deepcopy(model)
    install(reference, {id(reference.body): pair})
    assert torch.equal(gm(X), reference(X))


def test_nothing_to_do_is_not_modified():
    gm = trace(Small(), X)
    before = gm.code
    result = Factorize(pairs={})(gm)
    assert result.graph_module is gm
    assert not result.modified
    assert gm.code == before
    again = Factorize(pairs={"nowhere": make_pair(nn.Linear(2, 2), 1)})(gm)
    assert not again.modified


def test_torchs_pass_manager_takes_the_pass():
    model = Small()
    gm = trace(model, X)
    result = PassManager(passes=[Factorize(pairs={"body": make_pair(model.body, 2)})])(gm)
    assert result.modified
    assert "body.u" in {str(n.target) for n in result.graph_module.graph.nodes}


@pytest.mark.parametrize("extra_bn", [False, True])
def test_merge_is_the_way_back(extra_bn):
    _model, gm, pair, _ = rewritten(extra_bn=extra_bn)
    if extra_bn:
        with torch.no_grad():
            pair.norm.running_mean.normal_()
            pair.norm.running_var.uniform_(0.5, 2)
            pair.norm.weight.normal_()
            pair.norm.bias.normal_()
    expected = gm(X)
    result = Merge(dense={"body": pair.to_dense()})(gm)
    assert result.modified
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_module"] == ["stem", "body", "body", "head"]
    assert isinstance(gm.get_submodule("body"), nn.Conv2d)
    assert largest_difference(expected, gm(X)) <= 1e-5  # float32, two convolutions


def test_merge_refuses_a_value_that_is_used_elsewhere():
    _, gm, pair, _ = rewritten()
    node = next(iter(gm.graph.find_nodes(op="call_module", target="body.u")))
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ((output.args[0], node),)
    gm.recompile()
    result = Merge(dense={"body": pair.to_dense()})(gm)
    assert "between the factors of 'body', is used elsewhere too" in next(iter(result.refused.values()))


GEOMETRIES = [
    {"stride": (2, 1)},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": (2, 0), "padding_mode": "reflect"},
    {"groups": 2},
    {"groups": 4, "bias": False},
    {"kernel_size": 1, "stride": 2},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_geometry_peers_get_wrong(options):
    """Depthwise, circular padding, uneven strides, dilation, 'same': each is silently wrong in some published tool."""
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3} | options).requires_grad_(False).eval()
    rank = LowRankConv2d.full_rank_of(conv)
    pair = make_pair(conv, rank)
    x = torch.randn(2, 4, 9, 9, dtype=conv.weight.dtype)
    assert pair(x).shape == conv(x).shape
    assert largest_difference(conv(x), pair(x)) <= (1e-12 if conv.weight.dtype == torch.float64 else 1e-5)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(pair, name) == getattr(conv, name)
    assert pair.weight.dtype == conv.weight.dtype
    assert largest_difference(conv.weight, pair.weight) <= 1e-5
    assert pair.bias is conv.bias
    assert not pair.training
    assert not any(p.requires_grad for p in pair.parameters())
    back = pair.to_dense()
    assert type(back) is nn.Conv2d
    assert largest_difference(conv(x), back(x)) <= 1e-5


def test_bfloat16_layers_have_pairs_of_their_dtype():
    linear = nn.Linear(8, 6).bfloat16()
    pair = make_pair(linear, 6)
    assert pair.u.weight.dtype is torch.bfloat16
    assert pair(torch.randn(3, 8).bfloat16()).dtype is torch.bfloat16
    # two roundings to 8 bits of mantissa
    assert largest_difference(linear.weight, pair.weight) <= 3e-2


def test_channels_last_is_kept():
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    pair = make_pair(conv, 4)
    assert pair.u.weight.is_contiguous(memory_format=torch.channels_last)
    assert pair.to_dense().weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 6, 6)
    assert largest_difference(make_pair(nn.Conv2d(4, 6, 3), 4)(x) * 0 + pair(x), pair(x)) == 0
    assert pair_error(conv, pair).relative <= pair_error(conv, pair).relative_bound + 1e-6


def test_pair_errors():
    with pytest.raises(
        fxrank.RankError, match=re.escape("a rank must be in 1 … 3, the full rank of the layer; got 0.")
    ):
        make_pair(nn.Linear(5, 3), 0)
    with pytest.raises(fxrank.RankError, match="got 4"):
        make_pair(nn.Linear(5, 3), 4)
    with pytest.raises(TypeError, match=re.escape("only Linear, Conv2d have a factor pair; got Conv1d.")):
        make_pair(nn.Conv1d(1, 1, 1), 1)
    with pytest.raises(ValueError, match="form must be one of 'channel'; got 'diagonal'"):
        make_pair(nn.Linear(2, 2), 1, form="diagonal")
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the model is itself that layer"):
        install(layer, {id(layer): make_pair(layer, 1)})


def test_subclasses_are_not_mistaken_for_their_base():
    class Standardized(nn.Conv2d):
        pass

    with pytest.raises(TypeError, match="got Standardized"):
        make_pair(Standardized(1, 1, 1), 1)


@pytest.mark.parametrize("training", [False, True])
def test_calibrated_extra_norm_does_not_move_the_function(training):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    x = torch.randn(16, 3, 8, 8)
    net.train()
    net(x)
    net.train(training)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ranks at or above break-even")
        small = fxrank.factorize(net, x, rank=1.0, extra_bn=True)
    assert isinstance(small[3].norm, nn.BatchNorm2d)
    assert all(torch.equal(a, b) for a, b in zip(net[1].buffers(), small[1].buffers(), strict=True))
    assert small[3].norm.num_batches_tracked == 0
    # float32 through two normalizations; without calibration the difference is of order 0.2
    assert output_difference(net, small, x) <= 1e-4
    before = torch.random.get_rng_state()
    calibrate([small[3].norm], small, lambda: small(x))
    assert torch.equal(before, torch.random.get_rng_state())


def test_largest_difference():
    assert largest_difference((torch.ones(2), 3), (torch.ones(2), 3)) == 0
    assert largest_difference(torch.tensor([2.0, 0]), torch.tensor([2.0, 1])) == 0.5
    assert largest_difference(torch.tensor([1]), torch.tensor([2])) == float("inf")
    with pytest.raises(ValueError, match="one shape"):
        largest_difference(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="one structure"):
        largest_difference([torch.ones(2)], torch.ones(2))


ROOT = Path(fxrank.__file__).parent


def modules_of(package):
    return [
        importlib.import_module(f"{package.__name__}.{m.name}")
        for m in pkgutil.iter_modules(package.__path__)
        if m.name != "__main__"
    ]


def test_every_class_of_the_passes_is_imported_under_one_name():
    for module in modules_of(fxrank.passes):
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if "passes" in cls.__module__.split(".") and not cls.__module__.startswith("torch."):
                assert cls.__module__.startswith("fxrank.passes.")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def test_arrows_run_one_way():
    for path in (ROOT / "passes").glob("*.py"):
        for name in imports_of(path):
            assert not name.startswith("fxrank") or name.startswith("fxrank.passes."), f"{path.name} imports {name}"
    graph = {
        p.stem: {
            n.split(".")[1] for n in imports_of(p) if n.startswith("fxrank.") and not n.startswith("fxrank.passes")
        }
        for p in ROOT.glob("*.py")
        if p.stem != "__init__"
    }
    for path in ROOT.glob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            assert "fxrank" not in set(imports_of(path)), path.name
    reached = {name: set(uses) for name, uses in graph.items()}
    for _ in graph:
        for name in graph:
            reached[name] |= {far for near in set(reached[name]) for far in reached.get(near, ())}
    assert not [name for name in graph if name in reached[name]], "an import circle"


def test_low_rank_linear_names():
    pair = make_pair(nn.Linear(6, 4), 2)
    assert isinstance(pair, LowRankLinear)
    assert (pair.in_features, pair.out_features, pair.rank) == (6, 4, 2)
    assert list(pair.state_dict()) == ["u.weight", "v.weight", "v.bias"]
    assert "linear (4, 6), rank=2" in repr(pair)


def test_graph_modules_of_factorized_models_can_be_traced_by_torch_too():
    small = fxrank.factorize(Small(), X, rank=0.5)
    assert isinstance(fx.symbolic_trace(small), fx.GraphModule)
