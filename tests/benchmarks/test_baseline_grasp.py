"""GraSP: its scores against the Hessian itself, and what it keeps."""

import math

import pytest
import torch
import torch.nn.functional as F
from digit_tasks import digits, perceptron
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.baselines.base import CPU
from benchmarks.baselines.grasp import GraSP, at_temperature, keep_lowest, scores
from benchmarks.real_runs import evaluate
from benchmarks.subjects.jobs import size
from benchmarks.subjects.text_models import CharTransformer

NAMES = ["0", "2"]


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch(seed, count=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=g).double(), torch.randint(2, (count,), generator=g)


def loss_at(model, theta, batches, loss_fn=F.cross_entropy):
    """The mean loss with the two weights taken from one vector."""
    shapes = [model[0].weight.shape, model[2].weight.shape]
    parts = [p.view(s) for p, s in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
    given = {"0.weight": parts[0], "2.weight": parts[1]}
    losses = [loss_fn(torch.func.functional_call(model, given, x), y) for x, y in batches]
    return torch.stack(losses).mean()


def theta_of(model):
    return torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()])


def flat(found):
    return torch.cat([found[name].flatten() for name in NAMES])


@pytest.mark.parametrize("count", [1, 3])
def test_scores_are_those_of_the_whole_hessian(count):
    model, batches = tiny(), [batch(i) for i in range(count)]
    theta = theta_of(model)
    hessian = torch.autograd.functional.hessian(lambda t: loss_at(model, t, batches), theta)
    gradient = torch.autograd.functional.jacobian(lambda t: loss_at(model, t, batches), theta)
    found = scores(model, NAMES, batches, F.cross_entropy)
    assert found["0"].shape == (4, 3)
    torch.testing.assert_close(flat(found), -theta * (hessian @ gradient), rtol=1e-10, atol=1e-14)


def test_scores_say_how_the_gradient_grows_without_a_weight():
    """`-θ ⊙ H g` is half of what a small step towards zero adds to ‖g‖² (eq. 6), here by a difference."""
    model, batches = tiny(), [batch(0)]
    theta, small = theta_of(model), 1e-5
    found = flat(scores(model, NAMES, batches, F.cross_entropy))

    def squared(t):
        t = t.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(model, t, batches), t)
        return float(gradient.square().sum())

    for i in range(len(theta)):
        step = torch.zeros_like(theta)
        step[i] = -small * theta[i]
        grown = (squared(theta + step) - squared(theta - step)) / (2 * small) / 2
        assert float(found[i]) == pytest.approx(grown, rel=1e-4, abs=1e-9)


def test_the_temperature_divides_the_logits():
    model, batches = tiny(), [batch(0)]
    found = scores(model, NAMES, batches, at_temperature(F.cross_entropy, 200.0))
    again = scores(model, NAMES, batches, lambda logits, y: F.cross_entropy(logits / 200, y))
    assert torch.equal(flat(found), flat(again))
    assert not torch.equal(flat(found), flat(scores(model, NAMES, batches, at_temperature(F.cross_entropy, 1))))
    assert at_temperature(None, 1) is None
    with pytest.raises(
        ValueError, match=r"got temperature=200 and a task whose model makes its own loss. Set temperature=1"
    ):
        at_temperature(None, 200.0)


def test_scoring_leaves_the_model_and_the_random_numbers_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    scores(model, NAMES, [batch(0)], F.cross_entropy)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), drawn)


def test_gradient_and_hessian_see_the_same_dropout():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, y = batch(0, 50)
    found = scores(model, NAMES, [(x, y)], F.cross_entropy)
    torch.manual_seed(0)
    dropped = F.dropout(torch.ones(50, 4, dtype=torch.float64))

    class Kept(nn.Module):
        def forward(self, h):
            return h * dropped

    fixed = nn.Sequential(model[0], Kept(), model[2])
    torch.testing.assert_close(flat(found), flat(scores(fixed, NAMES, [(x, y)], F.cross_entropy)))


def test_attention_has_scores():
    model = CharTransformer(5, 8, 12, 6, 1, 0.0)
    tokens = torch.randint(5, (2, 8))
    found = scores(model, ["blocks.0.qkv"], [(tokens, tokens)], None)
    assert found["blocks.0.qkv"].abs().sum() > 0


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_the_highest_scores_go(values, data):
    found = {str(i): torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    total = sum(map(len, values))
    pruned = data.draw(st.integers(0, total - 1))
    masks = keep_lowest(found, pruned)
    kept = torch.cat([found[n][masks[n] == 1] for n in found])
    gone = torch.cat([found[n][masks[n] == 0] for n in found])
    assert (len(kept), len(gone)) == (total - pruned, pruned)
    assert not len(gone) or kept.max() <= gone.min()


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"must leave some of the 6 weights .* asks for 6 fewer. Raise share"):
        keep_lowest({"a": torch.zeros(2, 3)}, 6)
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        GraSP(share=1.0)


def test_masks_are_kept_through_the_training_and_the_share_is_met():
    task = digits(perceptron, images=1024, decay=0.01)
    found = GraSP().sized(0.3)(task, 4, 0)
    total = size(found.model)
    zeros = sum(int((m.weight == 0).sum()) for m in found.model if isinstance(m, nn.Linear))
    assert found.remaining == total - zeros == round(0.3 * total)
    # the very weights that the scores of the fresh model leave out
    fresh = task.build(0)
    seen = [next(iter(task.loaders(0)[0]))]
    expected = keep_lowest(
        scores(fresh, ["1", "3", "5"], seen, at_temperature(F.cross_entropy, 200.0)), total - round(0.3 * total)
    )
    for name, mask in expected.items():
        assert torch.equal((found.model.get_submodule(name).weight != 0).float(), mask)
    assert found.facts["empty"] == []
    assert 0 < found.facts["score_seconds"] < found.seconds
    assert evaluate(found.model, task.loaders(0)[1], CPU)[1] > 0.7
    assert not math.isnan(found.seconds)
