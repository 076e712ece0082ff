"""What a run leaves for its page: spectra of what was cut, and of the pairs."""

import pytest
import torch
from nets import SOON, attach, mlp
from torch import nn

import fxrank
from fxrank.passes.model.weights import weight_of
from fxrank.passes.rewriting.install import pairs_in
from fxrank.passes.spectra.exact import singular_values
from fxrank.session import spectra
from fxrank.training.details import product_singular_values

IMAGES = torch.randn(2, 8, 6, 6)
MODELS = {
    "linear": (nn.Linear(12, 20), torch.randn(3, 12), "channel"),
    "gauge": (nn.Linear(12, 20), torch.randn(3, 12), "gauge"),
    "conv2d": (nn.Conv2d(8, 12, 3), IMAGES, "channel"),
    "spatial": (nn.Conv2d(8, 12, 3), IMAGES, "spatial"),
    "grouped": (nn.Conv2d(8, 12, 3, groups=2), IMAGES, "channel"),
    "transposed": (nn.ConvTranspose2d(8, 12, 3), IMAGES, "channel"),
    "lstm": (nn.LSTM(12, 16), torch.randn(4, 2, 12), "channel"),
    "embedding": (nn.Embedding(30, 12), torch.randint(0, 30, (2, 5)), "channel"),
}


class Around(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", MODELS)
def test_the_singular_values_of_a_pair_are_those_of_its_product(name):
    layer, x, form = MODELS[name]
    small = fxrank.factorize(Around(layer), x, rank=3, include="*", form=form)
    pairs = pairs_in(small)
    assert pairs
    for pair in pairs.values():
        dense = pair.dense_layer()
        whole = singular_values(type(pair).unroll(dense, weight_of(dense).detach()))
        found = product_singular_values(pair)
        # what is left of float32 rounding in the product, of its largest singular value
        assert torch.allclose(found, whole.mean(0)[: pair.rank], rtol=0, atol=1e-5 * float(whole.max()))
        assert float(whole.mean(0)[pair.rank :].abs().max()) < 1e-5 * float(whole.max())


def test_factors_without_a_product_or_without_numbers_have_none():
    model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12))
    small = fxrank.factorize(model, IMAGES, rank=3, include="*", extra_bn=True)
    (pair,) = pairs_in(small).values()
    assert product_singular_values(pair) is None
    (plain,) = pairs_in(fxrank.factorize(model, IMAGES, rank=3, include="*")).values()
    assert product_singular_values(plain) is not None
    plain.u.weight.data[0] = torch.nan
    assert product_singular_values(plain) is None


def test_what_was_cut_is_what_the_plan_says_of_the_weights(monkeypatch):
    def switched():
        model = mlp()
        session = attach(model, torch.optim.SGD(model.parameters(), 0.1), policy=SOON)
        session._switch("now")
        return session

    session = switched()
    assert session.spectra.keys() == session.plan.R.keys()
    for decision in session.plan.layers:
        if decision.factorized:
            cut = session.spectra[decision.name]
            assert cut["of"] == "weight" and cut["full_rank"] == decision.full_rank
            left_out = cut["left_out"][cut["ranks"].index(decision.rank)]
            assert left_out == pytest.approx(decision.truncation_error**2, rel=1e-3)  # written with four digits
    monkeypatch.setattr(spectra, "NUMBERS", 16 * 16 - 1)
    assert switched().spectra == {}
    monkeypatch.undo()
    monkeypatch.setattr(spectra, "WORK", 16**3)  # one layer's
    assert len(switched().spectra) == 1
