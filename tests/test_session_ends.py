"""`LowRankSession` where something else has happened in between: another dtype, another session, too many steps, no pair."""

import pytest
import torch
from nets import ConvNet, attach, images, sgd, train

import fxrank


def test_a_model_that_changes_its_dtype_after_attaching_is_calibrated_in_it():
    model, (x, y) = ConvNet(), images()
    optimizer = sgd(model)
    policy = fxrank.Pufferfish(E=2, ratio=0.25, extra_bn=True)
    session = attach(model, optimizer, policy, x, steps_per_epoch=1)
    model.double()
    losses = train(model, optimizer, 6, (x.double(), y))
    assert session.finish().R == {"conv2": 2, "conv3": 4}
    assert model.conv2.norm.weight.dtype == torch.float64 and losses[-1] < losses[0]


def test_a_layer_that_another_session_has_switched_is_named():
    model, batch = ConvNet(), images()
    policy = fxrank.Pufferfish(E=2, ratio=0.25)
    optimizers = [sgd(model), sgd(model)]
    for optimizer in optimizers:
        attach(model, optimizer, policy, batch[0], steps_per_epoch=1)
    train(model, optimizers[0], 2, batch)
    with pytest.raises(
        fxrank.PlanMismatchError, match="a layer must be dense until its own session switches it; 'conv2' is"
    ):
        train(model, optimizers[1], 2, batch)


def test_a_run_without_any_pair_is_saved_like_any_other(tmp_path):
    model, batch = ConvNet(), images()
    optimizer = sgd(model)
    session = attach(model, optimizer, fxrank.FullRank(), batch[0])
    train(model, optimizer, 3, batch)
    assert session.finish() is fxrank.plan_of(model)
    fxrank.save(model, tmp_path)
    again = fxrank.load(ConvNet(1), tmp_path)
    assert torch.equal(again.eval()(batch[0]), model.eval()(batch[0]))


def test_more_steps_than_announced_are_saved_and_gone_on_with():
    model, batch = ConvNet(), images()
    optimizer = sgd(model)
    policy = fxrank.Pufferfish(E=2, ratio=0.25)
    session = attach(model, optimizer, policy, batch[0], total_steps=4, steps_per_epoch=1)
    train(model, optimizer, 6, batch)
    state = session.state_dict()
    fresh = ConvNet(1)
    again = attach(fresh, sgd(fresh), policy, batch[0], total_steps=4, steps_per_epoch=1, state=state)
    assert again.clock.step == 6 and again.plan == session.plan
