"""`fxrank.diff`: the rewrite, read back from what was rewritten."""

import re

import pytest
import torch
from nets import HALFWAY, ConvNet, Net, Tied, clusters, images, mlp, snapshot, vectors
from places import ROOT
from torch import nn

import fxrank
from fxrank.passes.pairs.linear import LowRankLinear

X, IMAGES = vectors()[0], images()[0]
MLP = """\
Sequential: 2 of 4 layers are pairs
    layer        kind    form     rank     weights      parameters    MACs
    0            linear                    16x12               192   1,536
-   2            linear                    16x16               256   2,048
+   2            linear  channel  4 of 16  4x16 16x4           128   1,024
-   4            linear                    16x16               256   2,048
+   4            linear  channel  4 of 16  4x16 16x4           128   1,024
    6            linear                    4x16                 64     512
-   whole model                                                820   6,144
+   whole model                                                564   4,096

--- graph before
+++ graph after
@@ -4,1 +4,2 @@
-_2 = 2(_1)  # 8x16
+_2_u = 2.u(_1)  # 8x4
+_2_v = 2.v(_2_u)  # 8x16
@@ -6,1 +7,2 @@
-_4 = 4(_3)  # 8x16
+_4_u = 4.u(_3)  # 8x4
+_4_v = 4.v(_4_u)  # 8x16"""


class Sent(nn.Module):
    """`(N, 12)` to `(N, 4)` through a layer in code that asks for data, and one whose weight code reads."""

    def __init__(self):
        super().__init__()
        self.a, self.asked, self.read, self.b = (
            nn.Linear(12, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )

    def forward(self, x):
        x = self.a(x)
        if float(x.detach().sum()) > 1e9:
            x = 2 * x
        return self.b(torch.tanh(self.asked(x)) @ self.read.weight.mT.contiguous())


def without_bias():
    return nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(3)))


def encoder():
    return nn.Sequential(nn.Linear(12, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4))


MODELS = {
    "mlp": (mlp, X, {}),
    "gauge": (mlp, X, {"form": "gauge"}),
    "spatial": (ConvNet, IMAGES, {"form": "spatial"}),
    "norm between": (ConvNet, IMAGES, {"extra_bn": True}),
    "gained bias": (without_bias, X, {"calibration": [X + 1]}),
    "tied": (Tied, X, {}),
    "attention": (encoder, torch.randn(2, 5, 12), {"form": "qkv"}),
    "sent": (Sent, X, {}),
}


def lines(diff, sign):
    return [line for line in diff.nodes if line.startswith(sign)]


def test_the_text_of_a_small_model():
    assert str(fxrank.diff(fxrank.factorize(mlp(), X, 0.25), X)) == MLP


def test_without_an_example_it_is_the_table():
    assert str(fxrank.diff(fxrank.factorize(mlp(), X, 0.25))) == MLP.partition("\n\n")[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_both_models(name):
    build, x, options = MODELS[name]
    torch.manual_seed(0)
    dense = build()
    small = fxrank.factorize(dense, x, 0.25, **options)
    before = snapshot(small)
    diff, plan = fxrank.diff(small, x), fxrank.plan_of(small)
    assert snapshot(small) == before
    assert diff.parameters == tuple(sum(p.numel() for p in model.parameters()) for model in (dense, small))
    assert diff.macs == (
        sum(layer.macs for layer in plan.layers),
        sum(layer.pair_macs if layer.factorized else layer.macs for layer in plan.layers),
    )
    for layer, decision in zip(diff.layers, plan.layers, strict=True):
        assert (layer.name, layer.rank, layer.now.macs) == (
            decision.name,
            decision.rank,
            decision.pair_macs if decision.factorized else decision.macs,
        )
        if decision.factorized:
            assert layer.after.parameters == decision.pair_parameters
            pair = small.get_submodule(layer.name)
            assert layer.after.shapes == (pair.u.weight.shape, pair.v.weight.shape)
            assert layer.form == decision.form


def test_what_a_pair_has_beside_its_factors():
    for name, beside in [("norm between", "norm"), ("gained bias", "bias")]:
        build, x, options = MODELS[name]
        diff = fxrank.diff(fxrank.factorize(build(), x, 0.25, **options), x)
        assert {layer.beside for layer in diff.layers if layer.after} == {(beside,)}
        assert f"channel, {beside}" in str(diff)
    small = fxrank.factorize(ConvNet(), IMAGES, 0.25, extra_bn=True)
    assert "+conv3_norm = conv3.norm(conv3_u)  # 4x4x4x4" in fxrank.diff(small, IMAGES).nodes


def test_only_calls_of_pairs_change_and_each_call_does():
    """Not the nodes that take what a pair gives, though they read another node."""
    nodes = fxrank.diff(fxrank.factorize(Tied(), X, 0.25), X)
    assert [line.partition("(")[0] for line in lines(nodes, "-")] == [
        "-a = a",
        "-b = b",
        "-twice = twice",
        "-twice_1 = twice",
    ]
    assert len(lines(nodes, "+")) == 8


def test_pairs_that_follow_each_other():
    nodes = fxrank.diff(fxrank.factorize(without_bias(), X, 0.25, include="*"), X).nodes
    assert "+_1_u = 1.u(_0_v)  # 8x3" in nodes and "-_1 = 1(_0)  # 8x12" in nodes
    assert nodes[0] == "@@ -2,3 +2,6 @@"


def test_what_is_in_no_graph_and_what_has_no_node_is_named():
    diff = fxrank.diff(fxrank.factorize(Sent(), X, 0.25), X)
    assert "in asked, which is traced by itself:" in diff.nodes
    assert lines(diff, "+") == [
        "+whole_model_u = whole_model.u(input_0)  # 8x4",
        "+whole_model_v = whole_model.v(whole_model_u)  # 8x16",
    ]
    assert any(note.startswith("not in one graph: Sent: ") for note in diff.notes)
    build, x, options = MODELS["attention"]
    diff = fxrank.diff(fxrank.factorize(build(), x, 0.25, **options), x)
    assert diff.notes[-1].endswith("by itself: 1.self_attn.in_proj_weight, 1.self_attn.out_proj")
    assert str(diff).endswith(diff.notes[-1])


def test_the_graph_of_a_training_has_the_nodes_that_came_and_none_that_went():
    x, y = clusters()
    loader = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 48, 8)]
    result = fxrank.auto_lowrank(Net(), loader, epochs=2, policy=HALFWAY, progress=False, device="cpu")
    diff = fxrank.diff(result.model, loader[0])
    there = {node.name for node in result.graph_module.graph.nodes}
    come, gone = ({line[1:].partition(" = ")[0] for line in lines(diff, sign)} for sign in "+-")
    assert come == {"body_u", "body_v"} and come <= there
    assert gone == {"body"} and not gone & there
    assert diff.parameters == (result.report.parameters_before, result.report.parameters_after)
    assert diff.macs == (result.report.macs_before, result.report.macs_after)
    # and that graph can be read: its modules, its code
    printed = str(result.graph_module)
    assert re.search(r"\(body\): LowRankConv2d\(\s+conv2d \(16, 16, 3, 3\), rank=4\s+\(u\): Conv2d\(16, 4", printed)
    assert "body_v = self.body.v(body_u);  body_u = None" in result.graph_module.code
    assert result.graph_module.code in printed


def test_a_pair_that_was_put_in_by_hand_has_no_known_multiply_adds():
    model = mlp()
    model[2] = LowRankLinear(model[2], 4)
    small = fxrank.factorize(model, X, 0.25, include="4")
    diff = fxrank.diff(small)
    assert diff.macs == (None, None) and diff.parameters == (820, 564)
    assert re.search(r"\+   2 .* 128 +-$", str(diff), re.MULTILINE)


def test_in_a_notebook_it_is_the_same_text():
    diff = fxrank.diff(fxrank.factorize(Net(), IMAGES[:, :2, :6, :6], 0.25), IMAGES[:, :2, :6, :6])
    page = diff._repr_html_()
    assert page.startswith("<pre>") and page.endswith("</pre>")
    assert "\x1b" not in str(diff)
    plain = re.sub(r"</?(?:span|pre)[^>]*>", "", page)
    assert plain == str(diff)
    assert page.count("#22863a") == sum(line.startswith("+") for line in str(diff).splitlines())


def test_what_is_written_in_angle_brackets_is_escaped():
    class Odd(nn.Sequential):
        pass

    Odd.__name__ = "Odd<b>"
    page = fxrank.diff(fxrank.factorize(Odd(*mlp()), X, 0.25))._repr_html_()
    assert "Odd&lt;b&gt;" in page and "<b>" not in page


def test_what_is_refused():
    with pytest.raises(ValueError, match="only a model that fxrank has rewritten has a plan; this Sequential has none"):
        fxrank.diff(mlp())
    small = fxrank.factorize(mlp(), X, 0.25)
    with pytest.raises(fxrank.TraceError, match="Check that the example fits the model"):
        fxrank.diff(small, torch.randn(3, 13))
    small[2] = nn.Linear(16, 16)
    with pytest.raises(fxrank.PlanMismatchError, match="'2' has none, the plan one of rank 4"):
        fxrank.diff(small)
    small[2] = LowRankLinear(small[2], 3)
    with pytest.raises(fxrank.PlanMismatchError, match="'2' has one of rank 3, the plan one of rank 4"):
        fxrank.diff(small)


def test_the_page_shows_what_its_example_prints(capsys):
    page = (ROOT / "docs/one-shot.md").read_text(encoding="utf-8")
    code, shown = re.search(
        r"## Read the rewrite\n.*?```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL
    ).groups()
    exec(code, {})
    assert capsys.readouterr().out == shown
