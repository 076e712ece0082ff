from dataclasses import replace

import pytest
import torch
from torch import nn

import fxrank
from benchmarks.subjects import cells
from benchmarks.subjects.ideas import nearest_orthogonal, pairs_of, scaled_gradients, soft_switch, spectral_decay
from benchmarks.subjects.jobs import JOBS
from benchmarks.subjects.rows import Setup
from fxrank import Cuttlefish


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def batches(number=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 12, generator=generator), torch.randint(4, (16,), generator=generator)) for _ in range(number)
    ]


def run(model, idea, rate=0.05):
    optimizer = torch.optim.SGD(model.parameters(), rate)
    policy = Cuttlefish(target_params=0.8, speedup_threshold=None, latest=0.5)
    with idea(model, 16) as options:
        return fxrank.auto_lowrank(
            model, batches(), epochs=2, optimizer=optimizer, policy=policy, seed=0, progress=False, **options
        )


def test_after_a_soft_switch_training_goes_on_from_the_dense_layer_and_ends_with_the_pair_alone(monkeypatch):
    gaps = []
    lerp = torch.lerp

    def seen(output, dense, alpha):
        mixed = lerp(output, dense, alpha)
        gaps.append((alpha, float((mixed - dense).detach().norm() / (output - dense).detach().norm())))
        return mixed

    monkeypatch.setattr(torch, "lerp", seen)
    model = network()
    run(model, soft_switch(0.25))
    (pair,) = pairs_of(model).values()
    alphas = [alpha for alpha, _ in gaps]
    assert alphas[0] == 1
    assert alphas == pytest.approx([1, 0.85355339, 0.5, 0.14644661])
    assert [gap for _, gap in gaps] == pytest.approx([1 - alpha for alpha in alphas], abs=1e-5)
    assert not pair._forward_hooks


def test_scaled_steps_do_not_depend_on_how_a_product_is_divided():
    products = []
    for scale in (1.0, 4.0):
        model = network()
        example = batches(1)[0]
        small = fxrank.factorize(model, example[0], 0.25)
        (pair,) = pairs_of(small).values()
        with torch.no_grad():
            pair.u.weight *= scale
            pair.v.weight /= scale
        nn.functional.cross_entropy(small(example[0]), example[1]).backward()
        lengths = [float(w.grad.norm()) for w in (pair.u.weight, pair.v.weight)]
        with scaled_gradients(small, 1):
            torch.optim.SGD(small.parameters(), 0.0).step()
        grads = pair.u.weight.grad, pair.v.weight.grad
        assert [float(g.norm()) for g in grads] == pytest.approx(lengths, rel=1e-4)
        change = pair.v.weight @ grads[0], grads[1] @ pair.u.weight
        products.append([c / c.norm() for c in change])
    for one, other in zip(*products, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_spectral_decay_takes_as_much_from_every_singular_value_before_the_switch_alone():
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 4))
    sigma = torch.linspace(0.5, 2.0, 32)
    with torch.no_grad():
        u, _ = torch.linalg.qr(torch.randn(32, 32))
        model[0].weight.copy_(u * sigma)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with spectral_decay(0.01, every=2)(model, 4):
        for _ in range(4):
            optimizer.step()
    fallen = torch.linalg.svdvals(model[0].weight.detach()).flip(0)
    torch.testing.assert_close(fallen, sigma - 0.04, atol=1e-3, rtol=0)
    after = fallen.clone()
    optimizer.step()
    optimizer.step()
    torch.testing.assert_close(torch.linalg.svdvals(model[0].weight.detach()).flip(0), after)


def test_the_nearest_orthogonal_matrix_is_the_polar_factor():
    matrix = torch.randn(20, 30, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(nearest_orthogonal(matrix), u @ vh, atol=1e-3, rtol=0)


@pytest.mark.parametrize("idea", [soft_switch(0.1), scaled_gradients, spectral_decay(1e-3)])
def test_an_idea_is_at_work_in_a_cell(tmp_path, idea):
    job = JOBS["wide-digits"]
    job = replace(job, epochs=4, options=dict(job.options) | {"width": 48})
    setup = Setup(Cuttlefish(target_params=0.5, speedup_threshold=None))
    plain, tried = (cells.train(job, given, 0, tmp_path, None) for given in (setup, replace(setup, idea=idea)))
    assert plain["factorized"] == tried["factorized"] > 0
    assert plain["validation_loss"] != tried["validation_loss"]
