"""`torch.compile` before, during and after the switch; factored weights inside a whole graph."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from nets import ConvNet, Tied, images, mlp, train, vectors
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DataParallel

import fxrank
from fxrank.passes.pairs.reading.factored_weight import CompiledWeight
from fxrank.passes.pairs.reading.products import factored

# Torch's own, where the input of a compiled part comes out of one that is not.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X, Y = vectors()
HALFWAY = fxrank.Pufferfish(E=5, ratio=0.25)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_place(model, counter):
    model.compile(backend=counter)
    return model


def wrapped(model, counter):
    return torch.compile(model, backend=counter)


def wrapped_part(model, counter):
    part = nn.Sequential(model[2], model[3], model[4])
    model[2], model[3], model[4] = torch.compile(part, backend=counter), nn.Identity(), nn.Identity()
    return model


def wrapped_layers(model, counter):
    for i in (0, 2, 4, 6):
        model[i] = torch.compile(model[i], backend=counter)
    return model


def watched(model, optimizer, x=X, policy=HALFWAY):
    return fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=10, steps_per_epoch=1, policy=policy
    )


def run(model, batch=None, attached=None):
    """Ten steps, switch after the fifth; plan and final weights."""
    batch = vectors() if batch is None else batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = watched(model if attached is None else attached, optimizer, batch[0])
    compiled = []
    for _ in range(10):
        train(model, optimizer, 1, batch)
        compiled.append(COUNTER.frame_count)
    return session.finish(), compiled


OLD = torch.__version__.startswith("2.8.")
COUNTER = CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("make", [mlp, ConvNet, Tied])
@pytest.mark.parametrize("compiled", [wrapped, in_place])
@pytest.mark.parametrize("attach_inner", [False, True])
def test_a_compiled_model_is_compiled_once_more_at_the_switch(make, compiled, attach_inner):
    if OLD and make is mlp and compiled is in_place:
        pytest.skip("torch 2.8 does not compile a bare nn.Sequential in place")
    COUNTER.clear()
    batch = images() if make is ConvNet else vectors()
    model = make()
    plan, counts = run(compiled(model, COUNTER), batch, model if attach_inner else None)
    assert counts == [1] * 5 + [2] * 5
    plain = make()
    expected, _ = run(plain, batch)
    assert plan == expected  # names without a prefix
    assert fxrank.plan_of(model) == plan
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        # float32: the compiler may add up in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("compiled", "before", "names"),
    [(wrapped_part, 1, ["2.0", "2.2"]), (wrapped_layers, 3, ["2", "4"])],
)
def test_parts_that_are_compiled_by_themselves(compiled, before, names):
    COUNTER.clear()
    model = compiled(mlp(), COUNTER)
    plan, counts = run(model)
    assert [*plan.R] == names
    assert counts[4] == before and counts[-1] == before + 1  # equal layers share their code
    plain = mlp()
    run(plain)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    dense = fxrank.merge(model)
    assert type(dense.get_submodule(names[0])) is nn.Linear
    torch.testing.assert_close(dense(X), plain(X), rtol=1e-4, atol=1e-5)


def test_every_function_takes_a_compiled_model(tmp_path):
    counter = CompileCounterWithBackend("eager")
    dense = torch.compile(mlp(), backend=counter)
    small = fxrank.factorize(dense, X, rank=0.25)
    assert type(small) is nn.Sequential
    assert fxrank.trace(dense, X).whole
    assert fxrank.profile(dense, X, probe_ratio=0.25).stacks[0].names == ("2", "4")
    assert counter.frame_count == 0  # nothing was run through the compiler for that
    compiled = torch.compile(small, backend=counter)
    assert fxrank.plan_of(compiled) == fxrank.plan_of(small)
    assert type(fxrank.merge(compiled)[2]) is nn.Linear
    fxrank.save(compiled, tmp_path)
    target = torch.compile(mlp(1), backend=counter)
    assert fxrank.load(target, tmp_path) is target
    assert torch.equal(target(X), small(X))
    assert fxrank.plan_of(target) == fxrank.plan_of(small)


def test_the_one_call_takes_a_compiled_model():
    model = torch.compile(mlp(), backend="eager")
    result = fxrank.auto_lowrank(
        model, [(X, Y)] * 2, epochs=6, policy=fxrank.Pufferfish(E=2, ratio=0.25), progress=False
    )
    assert result.model is model
    assert result.plan.R == {"2": 4, "4": 4}
    assert fxrank.plan_of(model) == result.plan


@pytest.mark.parametrize("whole", [False, True], ids=["optimizer.step", "training step"])
def test_a_compiled_step_is_compiled_once_more_at_the_switch(whole):
    runs, counts, counter = [], [], CompileCounterWithBackend("eager")
    for compiled in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), weight_decay=0.1, foreach=False)
        policy = dataclasses.replace(HALFWAY, lr_scale=0.5)
        watched(model, optimizer, policy=policy)

        def step(optimizer=optimizer, model=model):
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
            optimizer.zero_grad()

        if compiled and whole:
            step = torch.compile(step, backend=counter)
        elif compiled:
            optimizer.step = torch.compile(optimizer.step, backend=counter)
        for _ in range(10):
            step()
            counts.append(counter.frame_count)
        runs.append([p.detach().clone() for p in model.parameters()])
    parts = 2 if whole else 1  # what is before the session's hooks, and the step itself
    assert counts == [0] * 10 + [parts] * 5 + [2 * parts] * 5
    for mine, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_wrappers_in_wrappers():
    session = fxrank.LowRankSession.attach(
        torch.compile(DataParallel(model := mlp()), backend="eager"),
        torch.optim.SGD(model.parameters(), lr=0.1),
        example_inputs=X,
        total_steps=10,
        policy=fxrank.SpectralInit(ratio=0.25),
    )
    assert session.plan.R == {"2": 4, "4": 4}
    assert model[2].rank == 4


# -- factored weights


W = torch.Generator().manual_seed(3)
FACTORED = {
    "linear": lambda x, w: F.linear(x, w),
    "linear by name": lambda x, w: F.linear(x, weight=w, bias=None),
    "linear with bias": lambda x, w: F.linear(x, w, torch.ones(20)),
    "matmul": lambda x, w: torch.matmul(x, w.t()),
    "x @ w": lambda x, w: x @ w.T,
    "w @ x": lambda x, w: (w @ x.T).T,
    "w @ vector": lambda x, w: w @ x[0],
    "vector @ w": lambda x, w: x[0] @ w.mT,
    "method": lambda x, w: x.matmul(w.transpose(0, 1)),
    "chunk": lambda x, w: sum(F.linear(x, part) for part in w.chunk(2)),
    "slice": lambda x, w: F.linear(x, w[:8]) @ torch.ones(8, 3) + (x @ w[10:13].T),
    "einsum": lambda x, w: torch.einsum("ni,oi->no", x, w),
    "addmm": lambda x, w: torch.addmm(torch.ones(20), x, w.t()),
    "looks": lambda x, w: F.linear(x, w) / w.shape[1] + w.size(0) + w.ndim + len(w) + w.dim() + w.size()[0],
    "cast": lambda x, w: F.linear(x.double(), w.double()).to(w.dtype),
    "detach": lambda x, w: F.linear(x, w.detach()) + F.linear(x, w.data) + x.sum(),
}
STACKED = {
    "bmm": lambda x, w: torch.bmm(x.expand(3, *x.shape), w.mT),
    "x @ w": lambda x, w: x @ w.transpose(1, 2),
    "w @ x": lambda x, w: w @ x.T,
    "one": lambda x, w: x @ w[0].T + x @ w[2].t(),
    "unbind": lambda x, w: sum(F.linear(x, part) for part in w.unbind()),
    "einsum": lambda x, w: torch.einsum("ni,goi->gno", x, w),
}
NUMBERS = {
    "arithmetic": lambda x, w: F.linear(x, 2 * w + 1 - w / 3),
    "softmax": lambda x, w: F.linear(x, w.softmax(-1)),
    "norm": lambda x, w: F.linear(x, w) / w.norm() + w.mean(),
    "stack": lambda x, w: F.linear(x, torch.stack([w, w]).sum(0)),
}
CASES = {
    **{f"matrix, {n}": (f, 1) for n, f in (FACTORED | NUMBERS).items()},
    **{f"stack, {n}": (f, 3) for n, f in STACKED.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_factored_weights_are_compiled_into_one_graph(name, monkeypatch):
    how, groups = CASES[name]
    u, v = (torch.randn(groups, *s, generator=W, requires_grad=True) for s in ((4, 12), (20, 4)))
    shape = (20, 12) if groups == 1 else (groups, 20, 12)

    def out(x, u, v):
        return how(x, factored(u, v, shape))

    expected = how(X, (v @ u).reshape(shape))
    wanted = torch.autograd.grad(expected.square().sum(), (u, v), allow_unused=True) if expected.requires_grad else ()
    if name.removeprefix("matrix, ") not in NUMBERS:
        monkeypatch.setattr(CompiledWeight, "dense", None)
    result = torch.compile(out, backend="aot_eager", fullgraph=True)(X, u, v)
    # float32: by factors, sums come in another order
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    if wanted:
        found = torch.autograd.grad(result.square().sum(), (u, v), allow_unused=True)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-2)


class Raw(nn.Module):
    """`how(x, w)` with a raw weight, between two layers; `(N, 12)` to `(N, 4)`."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 4)
        self.w = nn.Parameter(torch.randn(16, 16) / 4)
        self.how = how

    def forward(self, x):
        return self.last(torch.tanh(self.how(torch.tanh(self.first(x)), self.w)))


def raw(how):
    small = fxrank.factorize(Raw(how), X, rank=4)
    assert fxrank.plan_of(small).R == {"w": 4}
    return small


RAW = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: torch.matmul(x, w),
    "x @ w": lambda x, w: x @ w,
    "w @ x": lambda x, w: (w @ x.T).T,
    "chunk": lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(2)], -1),
    "looks": lambda x, w: F.linear(x, w).to(w.dtype) / w.shape[1] + w.size(0) + len(w),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_weights_are_compiled_into_one_graph(name, monkeypatch):
    small = raw(RAW[name])
    twin = copy.deepcopy(small)
    F.cross_entropy(twin(X), Y).backward()
    monkeypatch.setattr(CompiledWeight, "dense", None)
    F.cross_entropy(torch.compile(small, backend="aot_eager", fullgraph=True)(X), Y).backward()
    for mine, theirs in zip(small.parameters(), twin.parameters(), strict=True):
        # float32: the compiler may add up in another order
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["x @ w", "w @ x"])
def test_where_the_compiler_cannot_tell_the_operands_apart_python_multiplies(name):
    x = torch.randn(16, 12)  # as many rows as the weight is wide
    small = raw(RAW[name])
    # float32 sums
    torch.testing.assert_close(torch.compile(small, backend="aot_eager")(x), small(x), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"x @ w or w @ x\? Both are square; write torch.matmul"):
        torch.compile(small, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("training", [True, False])
def test_attention_is_compiled_into_one_graph(training, monkeypatch):
    model = nn.Sequential(
        nn.Linear(12, 16), nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), nn.Linear(16, 4)
    )
    x = torch.randn(3, 5, 12)
    small = fxrank.factorize(model, x, rank=0.25).train(training)
    assert "1.self_attn.in_proj_weight" in fxrank.plan_of(small).R
    expected = small(x)
    monkeypatch.setattr(CompiledWeight, "dense", None)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)  # float32 sums


def test_a_weight_that_is_read_from_outside():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.qkv, self.b = nn.Linear(12, 16), nn.Linear(16, 48), nn.Linear(48, 4)

        def forward(self, x):
            return self.b(F.linear(torch.tanh(self.a(x)), weight=self.qkv.weight, bias=self.qkv.bias))

    small = fxrank.factorize(Reader(), X, rank=0.25)
    assert fxrank.plan_of(small).R == {"qkv": 4}
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), small(X), rtol=1e-5, atol=1e-6)  # float32 sums


class Recurrent(nn.Module):
    """`(N, T, 12)` to `(N, T, 4)`."""

    def __init__(self, kind, width=16):
        super().__init__()
        self.a, self.b = nn.Linear(12, width), nn.Linear(width, 4)
        self.rnn = kind(width, width, 2, batch_first=True)

    def forward(self, x):
        return self.b(self.rnn(torch.tanh(self.a(x)))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)])
def test_recurrent_layers_are_compiled_around(kind):
    """torch leaves its own recurrent layers out of graphs; a factorized one is left out in the same way."""
    dense = Recurrent(kind)
    small = fxrank.factorize(dense, torch.randn(3, 5, 12), rank=0.25)
    assert "rnn.weight_hh_l0" in fxrank.plan_of(small).R
    compiled = {}
    for name, model in (("dense", dense), ("small", small)):
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=counter)
        for length in (5, 7, 9, 50):
            x = torch.randn(3, length, 12)
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-6)  # float32 sums
            run(x).sum().backward()
        compiled[name] = counter.frame_count
        called = {node.target for graph in counter.graphs for node in graph.graph.nodes}
        assert not called & {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
    # What is around it, and that once more for any length; around a dense RNN torch 2.8 and 2.14 compile nothing at all.
    assert compiled["small"] <= max(compiled["dense"], 1) <= 4


def test_wide_recurrent_layers_are_compiled_around():
    small = fxrank.factorize(Recurrent(nn.LSTM, 512), torch.randn(3, 5, 12), rank=0.25)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(small, backend=counter)
    for length in (5, 7, 9):
        x = torch.randn(3, length, 12)
        torch.testing.assert_close(run(x), small(x), rtol=1e-5, atol=1e-6)  # float32 sums
    assert counter.frame_count <= 4 and counter.op_count < 10  # the steps are not in it


def test_recurrent_layers_are_compiled_where_that_is_asked_for():
    # torch.onnx leaves its own way to take an LSTM apart in this cache; where a graph may have LSTMs, dense ones meet it too.
    torch.ops.aten.lstm.input._dispatch_cache.clear()
    x = torch.randn(3, 5, 12)
    small = fxrank.factorize(Recurrent(nn.LSTM), x, rank=0.25)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), small(x), rtol=1e-5, atol=1e-6)  # float32 sums
