"""Iterative magnitude pruning: what is masked, that it stays so, and what is rewound."""

import pytest
import torch
from digit_tasks import ResDigits, digits, perceptron
from torch.nn.utils import prune

from benchmarks.baselines import imp
from benchmarks.baselines.base import CPU, Run
from benchmarks.baselines.imp import IMP, prune_smallest
from benchmarks.real_runs import evaluate
from benchmarks.subjects.jobs import size


def masked():
    model = perceptron()
    layers = {str(i): model[i] for i in (1, 3, 5)}
    for layer in layers.values():
        prune.identity(layer, "weight")
    return model, layers


def flat(layers, name):
    return torch.cat([getattr(layer, name).detach().flatten() for layer in layers.values()])


def test_a_fifth_of_what_remains_is_masked_the_smallest_of_all_layers():
    _, layers = masked()
    total = len(flat(layers, "weight_mask"))
    values = torch.rand(total) + 0.1
    parts = values.split([layer.weight_orig.numel() for layer in layers.values()])
    for layer, part in zip(layers.values(), parts, strict=True):
        layer.weight_orig.data = part.view_as(layer.weight_orig)  # after the last call: `weight` knows nothing of it
    left = total
    for _ in range(3):
        prune_smallest(layers, 0.2)
        left -= round(0.2 * left)
        mask = flat(layers, "weight_mask").bool()
        assert int(mask.sum()) == left
        assert values[mask].min() > values[~mask].max()


def test_masked_weights_stay_zero_through_momentum_and_decay():
    task = digits(decay=0.1)
    run = Run(task, task.build(0), 2, 0)
    layers = {name: run.model.get_submodule(name) for name in ("conv1", "layer1.0.conv1", "linear")}
    for layer in layers.values():
        prune.identity(layer, "weight")
    run.train(until=4)  # there is momentum
    prune_smallest(layers, 0.5)
    masks = {name: layer.weight_mask.clone() for name, layer in layers.items()}
    run.after_step.append(lambda: run.model(torch.randn(2, 1, 8, 8)))
    for name, layer in layers.items():
        run.after_step.append(
            lambda name=name, layer=layer: seen.append(bool((layer.weight[masks[name] == 0] == 0).all()))
        )
    seen = []
    run.train()
    assert len(seen) == 3 * 12 and all(seen)
    assert all(torch.equal(layer.weight_mask, masks[name]) for name, layer in layers.items())
    for name, layer in layers.items():
        prune.remove(layer, "weight")
        assert torch.equal((layer.weight != 0).float(), masks[name])


def test_every_round_begins_with_the_early_weights_and_its_own_mask(monkeypatch):
    runs = []

    class Recording(Run):
        def __init__(self, *given):
            super().__init__(*given)
            self.began = []
            runs.append(self)

        def train(self, until=None):
            self.began.append((self.step, {name: x.clone() for name, x in self.model.state_dict().items()}))
            super().train(until)

    monkeypatch.setattr(imp, "Run", Recording)
    found = IMP(rounds=3, rewind=0.25)(digits(), 2, 0)
    (_, whole, *rounds) = runs[0].began
    assert [step for step, _ in (whole, *rounds)] == [4] * 4
    for _, numbers in rounds:
        for name, x in whole[1].items():
            assert name.endswith("_mask") or torch.equal(numbers[name], x), name
    kept = [sum(int(x.sum()) for name, x in numbers.items() if name.endswith("_mask")) for _, numbers in rounds]
    prunable = sum(x.numel() for name, x in whole[1].items() if name.endswith("_mask"))
    assert kept == [pytest.approx(prunable * 0.8**i, abs=2) for i in (1, 2, 3)]
    assert found.facts["rewound_to"] == 4


def test_what_is_left_is_counted_and_zero_in_the_model():
    task = digits()
    found = IMP(rounds=2, rewind=0.1)(task, 2, 0)
    weights = [
        m.weight
        for name, m in found.model.named_modules()
        if "conv" in name or "shortcut.0" in name or name == "linear"
    ]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert found.dense_parameters == size(found.model) == size(ResDigits())
    assert found.remaining == found.dense_parameters - zeros == found.facts["rounds"][-1]["remaining"]
    assert zeros == pytest.approx(0.36 * sum(w.numel() for w in weights), abs=2)
    assert not any("mask" in name or "orig" in name for name in found.model.state_dict())
    first, second = found.facts["rounds"]
    assert 0 < first["seconds"] < second["seconds"] <= found.seconds


def test_a_sparse_network_learns():
    task = digits(perceptron, images=1024)
    found = IMP(rounds=3)(task, 4, 0)
    assert found.share < 0.6
    assert evaluate(found.model, task.loaders(0)[1], CPU)[1] > 0.8


@pytest.mark.parametrize(("share", "rounds"), [(0.8, 1), (0.79, 2), (0.17, 8), (0.5, 4), (0.95, 1)])
def test_rounds_for_a_size(share, rounds):
    assert IMP().sized(share) == IMP(rounds=rounds)


def test_options_out_of_bounds():
    for options in ({"rounds": 0}, {"rate": 1.0}, {"rewind": 0.0}):
        with pytest.raises(ValueError, match="rounds must be at least 1, rate and rewind shares between 0 and 1"):
            IMP(**options)
