"""A trace changes Python and torch for its own thread only: others compute meanwhile, or wait until it is their turn."""

import builtins
import logging
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.fx import _symbolic_trace
from torch.nn.modules import transformer
from torch.utils import checkpoint

import fxrank
from fxrank.passes.tracing.patches import _CHECKPOINT_GENERATORS, _FACTORIES
from fxrank.passes.tracing.trace import trace


class Everything(nn.Module):
    """Asks and calls all that a trace replaces, and draws no random number."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        assert isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter)
        x = x + torch.zeros(x.shape[1], 1) + torch.arange(x.shape[1]).unsqueeze(1) / math.sqrt(x.shape[-1])
        x = checkpoint.checkpoint(self.first, x, use_reentrant=False)
        x = checkpoint.checkpoint(self.last, x, use_reentrant=True)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        return self.encoder(x, mask)


def made(kind=Everything, *args, seed=0):
    """A model that comes of its own generator, as a bystander's must: a trace puts torch's own back."""
    with torch.device("meta"):
        model = kind(*args)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


def losses_of_training(steps):
    model, generator = made(seed=1), torch.Generator().manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        x = torch.empty(2, 5, 8).normal_(generator=generator).requires_grad_()
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def listing(gm):
    return {mode: [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in g.nodes] for mode, g in gm.graphs.items()}


def everything_patched():
    """All that a trace replaces, as it is now."""
    found = {"isinstance": builtins.isinstance, "hint": transformer._detect_is_causal_mask}
    found |= {name: getattr(torch, name) for name in _FACTORIES}
    found |= {f"math.{name}": value for name, value in vars(math).items()}
    found |= {f"Module.{name}": vars(nn.Module)[name] for name in ("__call__", "__getattr__")}
    names = ("CheckpointFunction", *(name for name in _CHECKPOINT_GENERATORS if hasattr(checkpoint, name)))
    found |= {name: getattr(checkpoint, name) for name in names}
    found |= {f"fx.{name}": value for name, value in vars(_symbolic_trace).items()}
    found["opaque"] = any(name == "_assert_is_none" for _, name in _symbolic_trace._wrapped_fns_to_patch)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    return {name: id(value) for name, value in found.items()} | {"log": (log.disabled, tuple(log.filters))}


@pytest.fixture(autouse=True)
def _leaves_no_patch():
    trace(Everything(), torch.randn(2, 5, 8))  # what torch imports and remembers at its first trace is no patch
    before = everything_patched()
    yield
    assert everything_patched() == before


class Meets(nn.Module):
    """Has something done by another thread, and waits for it, in the middle of a trace."""

    def __init__(self, meet):
        super().__init__()
        self.before, self.meet, self.after = Everything(), meet, nn.Linear(8, 8)

    def forward(self, x):
        x = self.before(x)
        self.meet()
        return self.after(x) + torch.zeros(x.shape[0], 1, 1)


@pytest.mark.parametrize("compiler", [False, True], ids=["alone", "beside the compiler"])
def test_a_bystander_trains_as_if_alone_and_so_does_the_trace(compiler):
    if compiler:  # it wraps what traces, from its first use on
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    x = torch.randn(2, 5, 8)
    expected = listing(trace(Meets(lambda: None), x))
    training, losses = losses_of_training(1000), []
    with ThreadPoolExecutor(1) as pool:
        model = Meets(lambda: losses.append(pool.submit(next, training).result()))
        for _ in range(10):
            assert listing(trace(model, x, verify=False)) == expected
    assert len(losses) >= 10 and losses == list(losses_of_training(len(losses)))


def test_a_bystander_that_waits_for_nobody():
    steps, x, traced = 30, torch.randn(2, 5, 8), made(seed=3)
    alone, expected = list(losses_of_training(steps)), listing(trace(traced, x))
    traces, runs, enough = [], [], threading.Event()

    def train():
        while len(runs) < 3 or not enough.is_set():
            runs.append(list(losses_of_training(steps)))

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        try:
            while len(traces) < 10 or (len(runs) < 3 and not training.done()):
                traces.append(listing(trace(traced, x)))
        finally:
            enough.set()
        training.result()
    assert all(losses == alone for losses in runs)
    assert all(found == expected for found in traces)


def test_two_threads_that_trace_take_turns():
    x, models = torch.randn(2, 5, 8), [made(seed=4), made(nn.Sequential, nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))]
    expected = [listing(trace(model, x)) for model in models]
    start = threading.Barrier(2)

    def traces(model):
        start.wait()
        return [listing(trace(model, x)) for _ in range(15)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(traces, models))
    assert found == [[expected[0]] * 15, [expected[1]] * 15]


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.linear(x) * math.sqrt(x.shape[-1])
        raise KeyboardInterrupt if self.training else ValueError("no")


@pytest.mark.parametrize(("training", "error"), [(True, KeyboardInterrupt), (False, fxrank.TraceError)])
def test_an_error_leaves_nothing_patched(training, error):
    before = everything_patched()
    with pytest.raises(error):
        trace(Fails().train(training), torch.randn(2, 8))
    assert everything_patched() == before


class TracesAnother(nn.Module):
    """What a forward does that builds a part of itself when it is first called."""

    def __init__(self, other, tell):
        super().__init__()
        self.linear, self.others, self.tell = nn.Linear(8, 8), [other], tell

    def forward(self, x):
        self.tell(listing(trace(self.others[0], torch.ones(2, 5, 8))))
        return self.linear(x) + torch.zeros(x.shape[0], 1, 1)


def test_a_trace_in_a_trace():
    other = made(seed=5)
    expected = listing(trace(other, torch.ones(2, 5, 8)))
    found = []
    gm = trace(TracesAnother(other, found.append), torch.randn(2, 5, 8), verify=False)
    assert found == [expected]
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "call_module", *["call_function"] * 4, "output"]
    assert torch.zeros in [n.target for n in gm.graph.nodes]


def test_a_stand_in_that_somebody_took_along_is_the_function_itself_after_the_trace():
    taken = []

    class Takes(nn.Module):
        def forward(self, x):
            taken[:] = [torch.zeros, isinstance, math.sqrt, nn.Module.__call__, checkpoint.CheckpointFunction]
            return x * 2

    trace(Takes(), torch.randn(2, 3), verify=False)
    zeros, asks, sqrt, call, function = taken
    assert zeros is not torch.zeros and zeros(2).tolist() == [0, 0]
    assert asks(3, int) and not asks(3, str) and sqrt(4) == 2
    assert call(nn.Flatten(), torch.ones(2, 3, 4)).shape == (2, 12)
    assert issubclass(function, checkpoint.CheckpointFunction)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_bystanders_checkpointed_function_is_computed_again_in_its_backward(reentrant):
    """While another thread is in the middle of a trace, whose own checkpoints are plain calls."""
    inside, go_on, calls = threading.Event(), threading.Event(), []

    class Waits(nn.Module):
        def forward(self, x):
            inside.set()
            go_on.wait(20)
            return x * 2

    def counted(x):
        calls.append(len(calls))
        return x.sin()

    with ThreadPoolExecutor(1) as pool:
        tracing = pool.submit(trace, Waits(), torch.randn(2, 3), verify=False)
        try:
            assert inside.wait(10)
            x = torch.randn(3, requires_grad=True)
            checkpoint.checkpoint(counted, x, use_reentrant=reentrant).sum().backward()
        finally:
            go_on.set()
        tracing.result()
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, x.detach().cos())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_process_that_another_thread_forks_is_forked_at_once_and_can_trace(moment):
    inside, go_on = threading.Event(), threading.Event()
    originals = {name: getattr(torch, name) for name in ("zeros", "randn")} | {"isinstance": builtins.isinstance}

    class Waits(nn.Module):
        def forward(self, x):
            inside.set()
            go_on.wait(20)
            return x * 2

    def in_child():
        assert builtins.isinstance is originals["isinstance"]
        assert torch.zeros is originals["zeros"] and torch.randn is originals["randn"]
        trace(nn.Sequential(nn.ReLU()), torch.randn(2, 3), verify=False)

    with ThreadPoolExecutor(1) as pool:
        tracing = pool.submit(trace, Waits(), torch.randn(2, 3), verify=False) if moment == "while" else None
        try:
            assert tracing is None or inside.wait(10)
            child = os.fork()  # the traced forward ends only after it
            if child == 0:
                code = 1
                try:
                    in_child()
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            go_on.set()
        if tracing is not None:
            tracing.result()
    assert torch.zeros is originals["zeros"] and builtins.isinstance is originals["isinstance"]
