"""Averages that are lists of tensors beside `model.parameters()`, as diffusers' `EMAModel` and `torch_ema` keep them."""

import re

import pytest
import torch
from nets import ConvNet, Tied, images, mlp, train, vectors
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxrank

DECAY = 0.9
HALFWAY = fxrank.Pufferfish(E=5, ratio=0.25)


class Shadow:
    """What diffusers' `EMAModel` does, without its schedule."""

    def __init__(self, parameters):
        self.shadow_params = [p.clone().detach() for p in parameters]
        self.temp_stored_params = None

    @torch.no_grad()
    def step(self, parameters):
        for mine, theirs in zip(self.shadow_params, list(parameters), strict=True):
            mine.lerp_(theirs, 1 - DECAY)

    def to(self, dtype):
        self.shadow_params = [p.to(dtype) for p in self.shadow_params]  # another list


class Listed(Shadow):
    """The bare list is given."""


def attach(model, optimizer, x, follower, policy=HALFWAY):
    return fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=10, steps_per_epoch=1, policy=policy, followers=[follower]
    )


def run(model, batch, average, policy=HALFWAY, trained=False):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    session = attach(
        model, optimizer, batch[0], average.shadow_params if isinstance(average, Listed) else average, policy
    )
    for _ in range(10):
        train(model, optimizer, 1, batch)
        average.step(p for p in model.parameters() if p.requires_grad or not trained)
    return session


def weight_normed():
    model = mlp()
    model[2] = nn.utils.parametrizations.weight_norm(model[2])
    return model


@pytest.mark.parametrize("kind", [Shadow, Listed])
@pytest.mark.parametrize("make", [mlp, ConvNet, Tied, weight_normed])
def test_a_list_goes_on_as_the_module_of_the_same_average_does(make, kind):
    batch = images() if make is ConvNet else vectors()
    one, other = make(), make()
    average, module = kind(one.parameters()), AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    module.n_averaged += 1  # else its first update copies
    session = run(one, batch, average)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    attach(other, optimizer, batch[0], module)
    for _ in range(10):
        train(other, optimizer, 1, batch)
        module.update_parameters(other)
    assert session.phase == "low-rank" and session.plan.R
    expected = list(module.module.parameters())
    assert len(average.shadow_params) == len(expected)
    for mine, theirs, own in zip(average.shadow_params, expected, one.parameters(), strict=True):
        assert type(mine) is torch.Tensor and mine.shape == own.shape and mine.data_ptr() != own.data_ptr()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)  # lerp and lerp of lists round alike, or nearly


def test_a_list_of_those_that_train():
    model, batch = mlp(), vectors()
    for name in ("0.weight", "4.weight", "4.bias"):
        model.get_parameter(name).requires_grad_(False)
    average = Shadow(p for p in model.parameters() if p.requires_grad)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n.startswith("0.w")}
    session = run(model, batch, average, trained=True)
    assert session.plan.R == {"2": 4, "4": 4}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [a.shape for a in average.shadow_params] == [p.shape for p in trained]
    assert torch.equal(model[0].weight, frozen["0.weight"])


def test_a_list_that_was_moved_meanwhile_is_found():
    model, batch = mlp(), vectors()
    average = Shadow(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = attach(model, optimizer, batch[0], average)
    average.to(torch.float64)
    train(model, optimizer, 5, batch)
    assert session.phase == "low-rank"
    assert [a.shape for a in average.shadow_params] == [p.shape for p in model.parameters()]
    assert {a.dtype for a in average.shadow_params} == {torch.float64}


def test_lists_that_do_not_fit_are_refused_before_anything_is_attached():
    model, batch = mlp(), vectors()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    text = "must have a tensor of the same shape for each of the model's 8 parameters, or for each that trains; got "
    for follower, got in (
        (Shadow(mlp(width=8).parameters()), "shadow_params of 8"),
        (Shadow(list(model.parameters())[1:]), "shadow_params of 7"),
    ):
        with pytest.raises(ValueError, match=re.escape(text + got)):
            attach(model, optimizer, batch[0], follower)
    for follower in (object(), {}, [], "ema"):
        with pytest.raises(TypeError, match=r"a follower must be a module .*, or hold a list of tensors"):
            attach(model, optimizer, batch[0], follower)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("kind", ["torch_ema", "diffusers"])
def test_the_real_ones(kind):
    model, batch = mlp(), vectors()
    if kind == "torch_ema":
        average = pytest.importorskip("torch_ema").ExponentialMovingAverage(model.parameters(), DECAY)
    else:
        average = pytest.importorskip("diffusers.training_utils").EMAModel(model.parameters(), DECAY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attach(model, optimizer, batch[0], average)
    for _ in range(10):
        train(model, optimizer, 1, batch)
        (average.update if kind == "torch_ema" else average.step)(model.parameters())
    average.store(model.parameters())
    average.copy_to(model.parameters())
    assert torch.isfinite(model(batch[0])).all()
    average.restore(model.parameters())
    assert isinstance(model[2], fxrank.LowRankLinear)
