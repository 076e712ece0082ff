"""Sessions in several threads at once, each with its model: traces, switches and steps do not meet."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxrank


class Rows(Dataset):
    """What is loaded asks torch and Python all the time, as a transform does."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        assert isinstance(torch.zeros(2), torch.Tensor) and torch.is_grad_enabled()
        generator = torch.Generator().manual_seed(i)
        return torch.randn(8, generator=generator) + torch.arange(8) / torch.full((8,), 8.0), torch.tensor(i % 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.layers:
            with torch.no_grad():
                scale = x.abs().amax(-1, keepdim=True) + torch.ones(x.shape[0], 1)
            x = torch.tanh(layer(x / scale)) + x
        return self.head(x)


def made(seed):
    """Without torch's own generator, which another thread's trace puts back."""
    with torch.device("meta"):
        model = Net()
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def trained(seed, start=None, workers=0):
    """The losses of a run with a switch in its middle, with a trace at each epoch's end, and the plan."""
    model = made(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(Rows(), batch_size=6, num_workers=workers)
    if start is not None:
        start.wait()
    session = fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=torch.ones(6, 8),
        total_steps=16,
        steps_per_epoch=4,
        policy=fxrank.Pufferfish(E=2, K=0, ratio=0.25),
    )
    losses = []
    for _ in range(4):
        for x, target in loader:
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        gm = fxrank.trace(model, torch.ones(6, 8))
        assert gm.whole and gm.notes == []
    assert session.phase == "low-rank"
    return losses, session.plan.R


@pytest.mark.skipif(torch.accelerator.is_available(), reason="its random numbers are begun anew too")
def test_nothing_takes_torchs_locks_of_devices_that_are_not_there(monkeypatch):
    """A worker that a loader forks in another thread would find them shut, and wait for ever."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("torch.manual_seed takes them"))
    trained(1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_session_in_each_of_two_threads_is_as_alone(workers):
    alone = [trained(seed) for seed in (1, 2)]
    for _ in range(1 if workers else 4):
        start = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(trained, seed, start, workers) for seed in (1, 2)]
            assert [future.result() for future in futures] == alone


def test_one_thread_trains_while_others_factorize():
    alone, enough = trained(3), threading.Event()

    def factorizes(seed):
        model, count = made(seed), 0
        expected = fxrank.factorize(model, torch.ones(6, 8), rank=2)(torch.ones(2, 8))
        while not enough.is_set() or count < 3:
            assert torch.equal(fxrank.factorize(model, torch.ones(6, 8), rank=2)(torch.ones(2, 8)), expected)
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(factorizes, seed) for seed in (4, 5)]
        try:
            assert all(trained(3) == alone for _ in range(2))
        finally:
            enough.set()
        assert all(other.result() >= 3 for other in others)
