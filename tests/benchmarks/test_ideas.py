import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxrank
from benchmarks.subjects import cells
from benchmarks.subjects.ideas import (
    decay_as_dense,
    nearest_orthogonal,
    pairs_of,
    scaled_gradients,
    soft_switch,
    spectral_decay,
)
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


class Remembering:
    """What a logger is told of, and the model as it was at the last look at its ranks."""

    def __init__(self, idea_logger, model):
        self.told, self.model, self.dense = idea_logger, model, None

    def log(self, step, values):
        self.told.log(step, values)
        if any(name.startswith("stable_rank/") for name in values):
            self.dense = copy.deepcopy(self.model)

    def event(self, step, text):
        self.told.event(step, text)


def test_after_a_soft_switch_training_goes_on_from_the_dense_model_and_ends_with_the_pairs_alone():
    model, x = network(), batches(1)[0][0]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)  # nothing moves but what the idea does
    policy = Cuttlefish(target_params=0.8, speedup_threshold=None, latest=0.5)
    distances = []

    def loss(outputs, labels):
        if pairs_of(model) and model.training:
            with torch.no_grad():
                distances.append(float((model(x) - logger.dense(x)).norm()))
        return nn.functional.cross_entropy(outputs, labels)

    with soft_switch(0.25)(model, 16) as options:
        logger = Remembering(options["logger"], model)
        fxrank.auto_lowrank(
            *(model, batches()),
            epochs=2,
            optimizer=optimizer,
            policy=policy,
            loss_fn=loss,
            seed=0,
            progress=False,
            logger=logger,
        )
        (pair,) = pairs_of(model).values()
        alone = float((model(x) - logger.dense(x)).detach().norm())
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert distances[:5] == sorted(distances[:5]) and len(set(distances[:5])) == 5
    assert distances[4:] == pytest.approx([alone] * len(distances[4:]), rel=1e-4)
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


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_product_decays_as_the_dense_weight_did(kind):
    rate, decay = 0.1, 0.02
    dense = network()
    small = fxrank.factorize(dense, batches(1)[0][0], {"2": 11})
    fallen = []
    for model in (dense, small):
        layer = model[2]
        before = layer.weight.detach() @ torch.eye(24)
        optimizer = kind(model.parameters(), rate, weight_decay=decay)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with decay_as_dense(model, 1):
            optimizer.step()
        after = layer.weight.detach() @ torch.eye(24)
        fallen.append(float(after.norm() / before.norm()))
    assert fallen[0] == pytest.approx(1 - rate * decay, rel=1e-5)
    assert fallen[1] == pytest.approx(fallen[0], rel=1e-5)


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
    after = model[0].weight.detach().clone()
    both = nn.ModuleList([model, fxrank.factorize(network(), batches(1)[0][0], 0.25)])
    with spectral_decay(0.01, every=2)(both, 4):
        for _ in range(4):
            optimizer.step()
    assert torch.equal(model[0].weight, after)


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
