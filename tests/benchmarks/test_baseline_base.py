"""The loop, the masks and the layers that the baselines share."""

import pytest
import torch
import torch.nn.functional as F
from digit_tasks import ResDigits, digits, perceptron
from torch import nn
from torch.nn.utils import prune

from benchmarks.baselines.base import Run, Sizeable, Trained, prunable, remaining, settle, weight_layers
from benchmarks.baselines.registry import BASELINES
from benchmarks.subjects import tasks
from benchmarks.subjects.jobs import size
from benchmarks.subjects.text_models import LstmLanguageModel, Translator


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def test_a_run_is_the_tasks_own_training():
    task = digits()
    run = Run(task, task.build(0), 2, 0)
    run.train()
    model, (loader, _) = task.build(0), task.loaders(0)
    torch.manual_seed(0)
    optimizer = task.optimizer(model)
    scheduler, _ = task.schedule(optimizer, 16)
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    assert (run.step, run.total, run.per_epoch) == (16, 16, 8)
    assert same(state(run.model), state(model))


def test_hooks_come_in_their_order():
    task = digits(perceptron)
    run, told = Run(task, task.build(0), 2, 0), []
    weight = run.model[1].weight
    before = weight.detach().clone()
    run.before_step.append(
        lambda: told.append(("before", run.step, torch.equal(weight, before), weight.grad is not None))
    )
    run.after_step.append(lambda: told.append(("after", run.step, torch.equal(weight, before))))
    run.after_epoch.append(lambda: told.append(("epoch", run.step)))
    run.train()
    assert told[:2] == [("before", 0, True, True), ("after", 1, False)]
    assert [t for t in told if t[0] == "epoch"] == [("epoch", 8), ("epoch", 16)]
    assert told.index(("epoch", 8)) == told.index(("after", 8, False)) + 1


def test_a_run_in_parts_is_the_same_run():
    task = digits(perceptron)
    whole, parts = (Run(task, task.build(0), 2, 0) for _ in range(2))
    whole.train()
    for until in (3, 3, 11, None):
        parts.train(until)
    assert same(state(whole.model), state(parts.model))


def test_rewinding_gives_back_everything_but_the_momentum():
    task = digits()
    run = Run(task, task.build(0), 2, 0)
    run.train(until=5)
    early, there = run.snapshot(), state(run.model)
    rate = run.optimizer.param_groups[0]["lr"]
    run.train()
    assert not same(state(run.model), there)
    run.rewind(early)
    assert same(state(run.model), there)  # BatchNorm's statistics too
    assert (run.step, run.optimizer.param_groups[0]["lr"], len(run.optimizer.state)) == (5, rate, 0)
    rates = []
    run.after_step.append(lambda: rates.append(run.optimizer.param_groups[0]["lr"]))
    run.train()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule, _ = tasks.cosine(other, 16)
    assert rates == [pytest.approx(0.05 * schedule.lr_lambdas[0](step)) for step in range(6, 17)]
    assert same(early.numbers, there)  # training on has not written into what was kept


def test_a_schedule_by_the_epoch_hears_of_the_validation_loss():
    task = digits(perceptron, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-6), schedule=tasks.plateau)
    run, rates = Run(task, task.build(0), 3, 0), []
    run.after_epoch.append(lambda: rates.append(run.optimizer.param_groups[0]["lr"]))
    run.train()  # nothing gets better
    assert rates == pytest.approx([1e-6, 2.5e-7, 6.25e-8], rel=1e-6)
    assert run.model.training


def test_a_model_with_other_parameters_goes_on():
    task = digits(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 10)))
    run = Run(task, task.build(0), 2, 0)
    run.train(until=4)
    first, kept = run.model[1].weight, run.optimizer.state[run.model[1].bias]["momentum_buffer"]
    names = {id(p): name for name, p in run.model.named_parameters()}
    run.model[1].weight = nn.Parameter(first.detach().clone())
    before = run.model[1].weight.detach().clone()
    run.adopt(names)
    assert first not in run.optimizer.state
    assert run.optimizer.state[run.model[1].bias]["momentum_buffer"] is kept
    run.train()
    assert not torch.equal(run.model[1].weight, before)


def test_layers_are_those_that_are_called_in_the_order_of_the_calls():
    task = digits()
    model = task.build(0)
    before = state(model)
    found = weight_layers(model, next(iter(task.loaders(0)[0])))
    assert same(state(model), before)
    names = list(found)
    assert names[0] == "conv1" and names[-1] == "linear"
    assert names[-4:-1] == ["layer2.0.shortcut.0", "layer2.1.conv1", "layer2.1.conv2"]
    assert all(model.get_submodule(name) is layer for name, layer in found.items())
    assert not any(m._forward_hooks for m in model.modules())


def test_shared_weights_and_weights_that_other_code_reads_are_no_layers():
    model = Translator(20, 8, 8, 2, 1, 0.1)
    found = weight_layers(
        model, (torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8))
    )
    assert {name.rpartition(".")[2] for name in found} == {"linear1", "linear2"}  # no head, no out_proj of attention
    task = digits(lambda: LstmLanguageModel(20, 8, 0.0))
    run = Run(task, task.build(0), 1, 0)
    run.task = type("Words", (), {"loaders": lambda self, seed: ([(torch.ones(2, 4, dtype=torch.long),) * 2], None)})()
    with pytest.raises(
        ValueError, match=r"IMP prunes weights of Linear and convolutional layers .* LstmLanguageModel calls none"
    ):
        prunable(run, "IMP")


def test_what_remains_is_what_no_mask_holds():
    model = ResDigits()
    layers = {"conv1": model.conv1, "linear": model.linear}
    whole = size(model)
    for layer in layers.values():
        prune.l1_unstructured(layer, "weight", amount=10)
    assert remaining(model) == whole - 20
    settle(layers)
    assert remaining(model) == size(model) == whole
    assert [int((layer.weight == 0).sum()) for layer in layers.values()] == [10, 10]
    assert Trained(model, whole, whole / 4, 1.0).share == 0.25


def test_baselines_by_name():
    assert {name for name, one in BASELINES.items() if isinstance(one, Sizeable)} == {"imp", "grasp", "early-bird"}
    for one in BASELINES.values():
        assert " at 0x" not in repr(one)  # another in every process: no ledger would ever be gone on with
