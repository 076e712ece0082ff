"""An extra BatchNorm between the factors must not move the function."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxrank
from fxrank.passes.rewriting.calibrate import calibrate
from fxrank.passes.rewriting.install import pairs_in
from fxrank.passes.tracing.compare import output_difference

# Two normalizations in a row; without calibration the difference is of order 0.2.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-10}


def network(dtype=torch.float32):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(32, 2),
    ).to(dtype)


def images(dtype=torch.float32):
    return 3 + 2 * torch.randn(16, 3, 8, 8, dtype=dtype)


def rewritten(model, x):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ranks at or above break-even")
        return fxrank.factorize(model, x, rank=1.0, extra_bn=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_function_does_not_jump(training, dtype):
    model, x = network(dtype), images(dtype)
    model.train()
    model(x)
    model.train(training)
    small = rewritten(model, x)
    norms = [pair.norm for pair in pairs_in(small).values()]
    assert [type(n) for n in norms] == [nn.BatchNorm2d] * 2
    assert output_difference(model, small, x) <= ROUNDING[dtype]
    if not training:  # the statistics are set, so any other batch passes unchanged too
        assert output_difference(model, small, images(dtype)) <= ROUNDING[dtype]
    if training:
        for norm in norms:
            norm.reset_parameters()
        assert output_difference(model, small, x) > 0.05


def test_a_layer_calibrated_in_train_mode_is_calibrated_for_eval_mode():
    model, x = network(), images()
    small = rewritten(model.train(), x)
    model.eval()
    small.eval()
    assert output_difference(model, small, x) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_other_buffers_random_state_gradients_and_hooks_are_untouched(training):
    model, x = network(), images()
    model.train()
    model(x)
    small = rewritten(model.train(training), x)
    assert all(torch.equal(a, b) for a, b in zip(model[1].buffers(), small[1].buffers(), strict=True))
    before, state = copy.deepcopy(small.state_dict()), torch.random.get_rng_state()
    norms = [pair.norm for pair in pairs_in(small).values()]
    with torch.no_grad():
        for norm in norms:
            norm.weight.zero_()
    calibrate(norms, small, lambda: small(x))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in small.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    assert all(norm.num_batches_tracked == 0 for norm in norms)
    assert list(before) == list(small.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_buffers_and_hooks_are_put_back_when_the_model_fails():
    small = rewritten(network().train(), images())
    before = [b.clone() for b in small[1].buffers()]
    norms = [pair.norm for pair in pairs_in(small).values()]

    def fail():
        small(images())
        raise RuntimeError("as asked")

    with pytest.raises(RuntimeError, match="as asked"):
        calibrate(norms, small, fail)
    assert all(torch.equal(a, b) for a, b in zip(small[1].buffers(), before, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


def test_without_norms_nothing_happens():
    model = network()
    before = copy.deepcopy(model.state_dict())
    calibrate([], model, lambda: model(images()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class TiedConvs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, dilation=2))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.first(x)))))


def test_each_place_of_a_tied_weight_has_a_norm_of_its_own_that_starts_as_the_identity():
    """And what is merged after some training is what was trained: the two products are no longer one."""
    model, x = TiedConvs().double(), images(torch.float64)
    small = fxrank.factorize(model, x, rank={"a": 4}, extra_bn=True)
    without = fxrank.factorize(model, x, rank={"a": 4})
    assert [norm.running_var.eq(1).any().item() for norm in (small.a.norm, small.b.norm)] == [False, False]
    for mode in (True, False):
        assert output_difference(small.train(mode), without.train(mode), x) <= ROUNDING[torch.float64]
    small.train()
    for _ in range(3):
        small(2 * x + 1)
    merged = fxrank.merge(small.eval())
    assert output_difference(small, merged, x) <= ROUNDING[torch.float64]
    tied = fxrank.merge(without)
    assert tied.a.weight is tied.b.weight
