"""Models that were built in `torch.inference_mode()`, and fxrank called in it: torch lets nobody train or write into such weights."""

import copy

import pytest
import torch
from torch import nn

import fxrank

X = torch.randn(6, 8)


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def made_inside():
    with torch.inference_mode():
        return model()


def attached(one):
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    policy = fxrank.Pufferfish(E=1, ratio=0.25)
    session = fxrank.LowRankSession.attach(
        one, optimizer, example_inputs=X, total_steps=2, steps_per_epoch=1, policy=policy
    )
    return session, optimizer


def trained(one, session, optimizer):
    for _ in range(2):
        optimizer.zero_grad()
        one(X).sum().backward()
        optimizer.step()
    return session.phase


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_what_does_not_train_works(training, inside, tmp_path):
    built = made_inside().train(training)
    state = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    with torch.inference_mode(inside):
        gm = fxrank.trace(built, X)
        assert gm.whole and gm.notes == []
        assert fxrank.profile(built, X).stacks
        small = fxrank.factorize(built, X, rank=4)
        fxrank.save(small, tmp_path / "small")
        fxrank.load(built.eval(), tmp_path / "small")
        whole = fxrank.merge(built)
        assert all(p.is_inference() is inside for p in small.parameters())
    with torch.inference_mode():
        exact = small.eval()(X)
        assert torch.equal(built(X), exact)
        # a product of two factors in float32
        assert torch.allclose(whole(X), exact, atol=1e-5)
        assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items() if "running" in name)


def test_nothing_moves():
    for built in (made_inside(), model()):
        state = {name: tensor.clone() for name, tensor in built.state_dict().items()}
        with torch.inference_mode():
            fxrank.trace(built, X)
        fxrank.trace(built, X)
        assert all(torch.equal(tensor, state[name]) for name, tensor in built.state_dict().items())


def test_a_session_says_that_it_cannot_train_and_how_it_could():
    with pytest.raises(
        ValueError,
        match=r"made outside of torch.inference_mode\(\); '0.weight' was made in it. Build the model outside, or train a copy",
    ):
        attached(made_inside())
    built = copy.deepcopy(made_inside())
    assert trained(built, *attached(built)) == "low-rank"


def test_a_part_that_is_not_trained_may_be_made_inside():
    both = model()
    with torch.inference_mode():
        both[0] = nn.Linear(8, 16).requires_grad_(False)
    assert trained(both, *attached(both)) == "low-rank"


def test_a_session_may_begin_inside():
    built = model()
    with torch.inference_mode():
        session = attached(built)
    assert trained(built, *session) == "low-rank"
    assert not any(p.is_inference() for p in built.parameters())
