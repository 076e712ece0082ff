"""EB Train: masks of BatchNorms' scales, their distance, and that the thinner network is the masked one."""

import copy
import itertools
import sys

import pytest
import torch
from digit_tasks import ResDigits, VggDigits, digits, needs_torch_pruning, perceptron
from torch import nn

from benchmarks.baselines import early_bird
from benchmarks.baselines.base import CPU, Run
from benchmarks.baselines.early_bird import EarlyBird, distance, largest, masks, silence, size_with, streams, thin
from benchmarks.real_runs import evaluate
from benchmarks.subjects.jobs import size

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
MODELS = {"res": ResDigits, "vgg": VggDigits, "perceptron": lambda: perceptron(norm=True)}


def random_model(make, seed=0):
    """A network whose BatchNorms are anything but the identity."""
    torch.manual_seed(seed)
    model = make()
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor, low in ((m.weight, -1.0), (m.bias, -1.0), (m.running_mean, -1.0), (m.running_var, 0.5)):
                tensor.data.uniform_(low, 2.0)
    return model


# -- masks


def test_the_smallest_scales_of_all_streams_go_but_never_a_whole_stream():
    scales = [torch.tensor([0.5, 0.1, 0.9]), torch.tensor([0.01, 0.02]), torch.tensor([0.3])]
    assert [m.tolist() for m in masks(scales, 0)] == [[True] * 3, [True] * 2, [True]]
    assert [m.tolist() for m in masks(scales, 3)] == [[True, False, True], [False, True], [True]]
    assert [m.tolist() for m in masks(scales, 6)] == [[False, False, True], [False, True], [True]]


def test_the_distance_is_the_share_of_channels_that_differ():
    one = [torch.tensor([True, False, True, True]), torch.tensor([True])]
    other = [torch.tensor([True, True, False, True]), torch.tensor([True])]
    assert distance(one, one) == 0
    assert distance(one, other) == distance(other, one) == pytest.approx(2 / 5)


# -- thinner networks


def test_channels_around_shortcuts_stay():
    needs_torch_pruning()
    model = ResDigits()
    names = {id(m): name for name, m in model.named_modules()}
    found = {names[id(s.norm)] for s in streams(model, (IMAGES, None))}
    assert found == {f"layer{i}.{j}.bn1" for i in (1, 2) for j in (0, 1)}


@pytest.mark.parametrize("name", MODELS)
def test_the_thinner_network_computes_what_the_masked_one_did(name):
    needs_torch_pruning()
    for seed, share in ((0, 0.3), (1, 0.7)):
        model = random_model(MODELS[name], seed)
        found = streams(model, (IMAGES, None))
        scales = [s.scales for s in found]
        kept = masks(scales, int(share * sum(map(len, scales))))
        masked, other = copy.deepcopy(model), copy.deepcopy(model)
        silence(streams(masked, (IMAGES, None)), kept)
        before = size(model)
        expected = size_with(model, found, kept)
        thin(model, found, kept, (IMAGES, None))
        assert size(model) == expected < before
        assert [s.norm.num_features for s in found] == [int(k.sum()) for k in kept]
        got, wanted, dense = (m.eval()(IMAGES) for m in (model, masked, other))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # sums in another order
        assert not torch.allclose(got, dense, rtol=1e-2, atol=1e-2)


def test_masks_leave_as_many_channels_as_a_size_allows():
    needs_torch_pruning()
    model = random_model(VggDigits)
    found = streams(model, (IMAGES, None))
    scales = [s.scales for s in found]
    sizes = [size_with(model, found, masks(scales, k)) for k in range(sum(map(len, scales)) + 1)]
    assert sizes[0] == size(model)
    assert all(b <= a for a, b in itertools.pairwise(sizes))
    for limit in (0.9 * sizes[0], 0.5 * sizes[0], sizes[20], sizes[-1]):
        left = size_with(model, found, largest(model, found, limit))
        assert left == max(s for s in sizes if s <= limit)
    with pytest.raises(ValueError, match=r"leaves at least one channel of each BatchNorm.* Raise share"):
        largest(model, found, sizes[-1] - 1)


def test_activations_that_move_zero_are_refused():
    needs_torch_pruning()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 3))
    found = streams(model, (IMAGES, None))
    with pytest.raises(ValueError, match="a channel with γ = β = 0 must do nothing to the output"):
        thin(model, found, masks([s.scales for s in found], 4), (IMAGES, None))


def test_models_without_batchnorm_are_refused():
    with pytest.raises(
        ValueError, match=r"EB Train ranks channels by the scales of the BatchNorms .* Sequential has none"
    ):
        streams(perceptron(), (IMAGES, None))


def test_the_library_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"torch-pruning, which is not installed. pip install 'fxrank\[runs\]'"
    ):
        streams(VggDigits(), (IMAGES, None))


# -- the training


def trained(task, method, epochs, monkeypatch):
    """What it has come to, its run, and the optimizer's numbers as the ticket was drawn."""
    runs, at_ticket = [], {}

    class Watched(Run):
        def __init__(self, *given):
            super().__init__(*given)
            runs.append(self)

        def adopt(self, names):
            super().adopt(names)
            at_ticket.update(step=self.step, rate=self.optimizer.param_groups[0]["lr"], state=len(self.optimizer.state))

    monkeypatch.setattr(early_bird, "Run", Watched)
    return method(task, epochs, 0), runs[0], at_ticket


def test_training_goes_on_with_the_thinner_network(monkeypatch):
    needs_torch_pruning()
    task = digits(VggDigits, images=1024)
    found, run, at_ticket = trained(task, EarlyBird(threshold=0.0, latest=0.5).sized(0.4), 4, monkeypatch)
    assert found.facts["ticket_epoch"] == 2 and not found.facts["settled"] and len(found.facts["distances"]) == 1
    assert at_ticket["step"] == 2 * run.per_epoch
    assert at_ticket["rate"] > 0.02  # the schedule goes on from where it was, to its end
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert found.remaining == size(found.model) <= 0.4 * found.dense_parameters
    assert found.share > 0.3
    assert found.facts["channels"] == [16, 16, 8]
    assert sum(found.facts["kept"]) < 40
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {id(p) for p in found.model.parameters()}
    assert evaluate(found.model, task.loaders(0)[1], CPU)[1] > 0.6


def test_a_ticket_is_drawn_when_masks_have_settled(monkeypatch):
    needs_torch_pruning()
    task = digits(VggDigits)
    found, _, _ = trained(task, EarlyBird(threshold=1.1, latest=0.9), 4, monkeypatch)
    assert (found.facts["ticket_epoch"], found.facts["settled"]) == (2, True)
    found, _, _ = trained(task, EarlyBird(threshold=1.1, latest=0.9, queue=2), 4, monkeypatch)
    assert (found.facts["ticket_epoch"], found.facts["settled"]) == (3, True)


def test_scales_are_pushed_towards_zero(monkeypatch):
    needs_torch_pruning()
    task = digits(VggDigits)
    sums = []
    for sparsity in (0.0, 0.3):
        _, run, _ = trained(task, EarlyBird(sparsity=sparsity, latest=0.6), 2, monkeypatch)
        sums.append(
            sum(float(m.weight.detach().abs().mean()) for m in run.model.modules() if isinstance(m, nn.BatchNorm2d))
        )
    assert sums[1] < sums[0]


def test_options_out_of_bounds():
    with pytest.raises(ValueError, match="share and latest must be between 0 and 1, queue at least 1"):
        EarlyBird(queue=0)
    with pytest.raises(ValueError, match="draws its ticket after an epoch and trains on; got epochs=1"):
        EarlyBird()(digits(VggDigits), 1, 0)
