"""BatchNorm measured again: the statistics of all inputs together, and nothing else changed."""

import pytest
import torch
from torch import nn

from fxrank.passes.calibration.batchnorm import measure_batchnorms
from fxrank.passes.errors import CalibrationError


def calls(*inputs):
    return lambda: [((x,), {}) for x in inputs]


@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.BatchNorm1d(3), ()), (nn.BatchNorm2d(3), (4, 5)), (nn.BatchNorm3d(3), (2, 2, 2))]
)
def test_each_position_counts_once_whatever_the_batches(norm, shape):
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(n, 3, *shape, generator=generator) * scale + 100 for n, scale in ((8, 1.0), (3, 5.0), (1, 2.0))
    ]
    assert measure_batchnorms(norm, calls(*batches)) == 1
    everything = torch.cat(batches).movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(norm.running_mean, everything.mean(0))
    torch.testing.assert_close(norm.running_var, everything.var(0), rtol=1e-4, atol=0)


def test_nothing_else_of_the_model_is_moved():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    )
    model[4] = nn.BatchNorm1d(3, track_running_stats=False)
    model.train()
    model[1].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    assert measure_batchnorms(model, calls(torch.ones(4, 3).cumsum(0), torch.zeros(2, 3))) == 2
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"{i}.running_{what}" for i in (1, 3) for what in ("mean", "var")}
    assert [m.training for m in model.modules()] == modes
    assert model[1].momentum == 0.3
    assert torch.equal(state, torch.get_rng_state())
    assert not model[1]._forward_pre_hooks


def test_a_layer_that_is_not_reached_keeps_its_statistics():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.used(x)

    model = Skips()
    measure_batchnorms(model, calls(torch.randn(5, 3) + 2))
    assert model.used.running_mean.abs().min() > 0
    assert model.unused.running_mean.abs().max() == 0


def test_statistics_that_are_not_finite_are_refused_and_none_is_set():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    bad = torch.randn(4, 3)
    bad[0, 1] = torch.nan
    with pytest.raises(CalibrationError, match="those of '0' are not"):
        measure_batchnorms(model, calls(torch.randn(5, 3), bad))
    assert all(torch.equal(m.running_var, torch.ones(3)) for m in model)
    assert model.training
