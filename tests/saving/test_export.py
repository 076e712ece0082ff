"""Factorized models on their way to other places: `torch.export`, ONNX run by onnxruntime, TorchScript traces."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import BERT, ConvNet, images, mlp, vectors
from torch import nn

import fxrank

# Torch's own: about its modules while it exports, that TorchScript is no longer developed, and that a trace keeps what Python
# decides by sizes; here by those of factors, which stay.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)


class Recurrent(nn.Module):
    """`(N, T, 12)` to `(N, T, 4)`."""

    def __init__(self, kind=nn.LSTM, width=16, layers=2):
        super().__init__()
        self.a, self.b = nn.Linear(12, width), nn.Linear(width, 4)
        self.rnn = kind(width, width, layers, batch_first=True)

    def forward(self, x):
        return self.b(self.rnn(torch.tanh(self.a(x)))[0])


class Raw(nn.Module):
    """Expert matrices, a raw matrix, and a weight read from outside; `(N, 12)` to `(N, 4)`."""

    def __init__(self):
        super().__init__()
        self.a, self.q, self.b = nn.Linear(12, 16), nn.Linear(16, 48), nn.Linear(48, 4)
        self.experts, self.w = nn.Parameter(torch.randn(3, 16, 16) / 4), nn.Parameter(torch.randn(48, 16) / 4)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        x = torch.bmm(x.expand(3, *x.shape), self.experts).mean(0)
        return self.b(F.linear(x, self.q.weight, self.q.bias) + F.linear(x, self.w))


class Bert(nn.Module):
    """A tiny BERT, `(N, L)` token numbers to `(N, L, 32)`."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        self.bert = transformers.BertModel(transformers.BertConfig(**BERT, max_position_embeddings=32))

    def forward(self, tokens):
        return self.bert(tokens).last_hidden_state


def encoder():
    return nn.Sequential(nn.Linear(12, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4))


def vit():
    return pytest.importorskip("timm").create_model("test_vit", num_classes=10)


D = torch.export.Dim.DYNAMIC
MODELS = {
    # a model, inputs, the same at other sizes, and the dimensions that may change
    "linear": (mlp, vectors(8)[0], vectors(5)[0], {0: D}),
    "convolutions": (ConvNet, images(4)[0], images(3)[0], {0: D}),
    "raw weights": (Raw, vectors(8)[0], vectors(5)[0], {0: D}),
    "attention": (encoder, torch.randn(3, 5, 12), torch.randn(4, 7, 12), {0: D, 1: D}),
    "vit": (vit, torch.randn(2, 3, 160, 160), torch.randn(3, 3, 160, 160), {0: D}),
    "bert": (Bert, torch.randint(50, (2, 8)), torch.randint(50, (3, 8)), {0: D}),
    # torch exports its recurrent layers for one length
    "LSTM": (Recurrent, torch.randn(3, 5, 12), torch.randn(4, 5, 12), {0: D}),
    "GRU": (lambda: Recurrent(nn.GRU), torch.randn(3, 5, 12), torch.randn(4, 5, 12), {0: D}),
    "wide LSTM": (lambda: Recurrent(width=512, layers=1), torch.randn(3, 5, 12), torch.randn(4, 5, 12), {0: D}),
}


@pytest.fixture(scope="module")
def small():
    made = {}

    def factorized(name):
        if name not in made:
            make, x, *_ = MODELS[name]
            torch.manual_seed(0)
            made[name] = fxrank.factorize(make().eval(), x, rank=0.25)
        return made[name], *MODELS[name][1:]

    return factorized


@pytest.mark.parametrize("name", MODELS)
def test_exported_programs_are_the_model(name, small):
    model, x, other, dims = small(name)
    program = torch.export.export(model, (x,), dynamic_shapes=(dims,))
    run = program.module()
    for inputs in (x, other):
        # the same operations; wide recurrent layers step by step in Python: float32 sums in another order
        torch.testing.assert_close(run(inputs), model(inputs), rtol=1e-5, atol=1e-6)
    names = set(program.state_dict)
    assert {f"{n}.{f}.weight" for n in fxrank.plan_of(model).R for f in "uv"} <= names
    if name in ("vit", "bert", "raw weights", "attention"):  # multiplied factor by factor: no dense weight is made
        shapes = {str(tuple(d.weight_shape)) for d in fxrank.plan_of(model).layers if d.factorized}
        values = [n.meta.get("val") for n in program.graph.nodes if n.op == "call_function"]
        assert not shapes & {str(tuple(value.shape)) for value in values if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", [n for n in MODELS if n != "GRU"])
def test_onnx_files_are_the_model(name, small):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, other, dims = small(name)
    exported = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(dims,), verbose=False)
    file = io.BytesIO()
    exported.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for inputs in (x, other):
        (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        # float32 sums of another library
        torch.testing.assert_close(torch.from_numpy(found), model(inputs), rtol=1e-3, atol=1e-5)


def test_an_export_does_not_change_what_is_compiled_later():
    """torch leaves behind how it took recurrent layers apart for ONNX, and `torch.compile` would meet it."""
    pytest.importorskip("onnxscript")
    make, x, other, dims = MODELS["LSTM"]
    small = fxrank.factorize(make(), x, rank=0.25)
    torch.onnx.export(small.eval(), (x,), dynamo=True, dynamic_shapes=(dims,), verbose=False)
    torch._dynamo.reset()
    small.train()
    compiled = torch.compile(small, backend="aot_eager")
    with warnings.catch_warnings(action="error", category=FutureWarning):  # what was left behind warns
        compiled(other).sum().backward()
    found = [p.grad.clone() for p in small.parameters()]
    small.zero_grad()
    small(other).sum().backward()
    for grad, p in zip(found, small.parameters(), strict=True):
        # float32 sums
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_torchscript_traces_are_the_model(name, small):
    model, x, other, _ = small(name)
    traced = torch.jit.trace(model, (x,))
    for inputs in (x, other):
        # float32 sums, as above
        torch.testing.assert_close(traced(inputs), model(inputs), rtol=1e-5, atol=1e-6)


def test_a_traced_recurrent_layer_takes_any_length(small):
    model, x, *_ = small("wide LSTM")
    longer = torch.randn(2, 9, 12)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(longer), model(longer), rtol=1e-5, atol=1e-6)


def test_a_merged_model_is_exported_too(small):
    model, x, *_ = small("LSTM")
    dense = fxrank.merge(model)
    torch.testing.assert_close(torch.export.export(dense, (x,)).module()(x), model(x), rtol=1e-5, atol=1e-6)
