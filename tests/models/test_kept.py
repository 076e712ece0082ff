"""One-shot factorization that keeps a share of what the model gives."""

import re

import pytest
import torch
from nets import mlp, vectors
from outputs import Narrow, Normed

import fxrank
from fxrank import oneshot
from fxrank.policies import outputs

LOADER = [vectors(40, seed) for seed in range(4)]
X = LOADER[0][0]


def kept(small, model):
    with torch.no_grad():
        wanted, got = (torch.cat([one(x) for x, _ in LOADER]).double() for one in (model, small))
    return 1 - float((got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("form", ["channel", "gauge", "auto"])
def test_the_fewest_parameters_that_keep_the_share(form):
    model = Narrow().eval()
    shares = (0.5, 0.9, 0.99)
    found = [fxrank.factorize(model, X, keep=share, calibration=LOADER, form=form) for share in shares]
    for share, small in zip(shares, found, strict=True):
        assert kept(small, model) >= share
        plan = fxrank.plan_of(small)
        (said,) = re.findall(r"the model kept (0\.\d+|1\.0000) of its outputs in 4 of the batches", plan.note)
        assert float(said) >= share
        assert plan.R and all(f"the model keeps {share:g} of its outputs" in plan.layer(n).reason for n in plan.R)
    assert sorted(map(size, found)) == [*map(size, found)] and size(found[0]) < size(found[-1])
    assert size(found[-1]) < size(model)  # three directions are all that there is


class Drawn:
    """Other batches in each pass, as of a loader that shuffles, or changes what it yields at random."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([vectors(40, 10 * self.passes + seed) for seed in range(4)])


@pytest.mark.parametrize("recalibrate", [False, True])
def test_a_loader_may_have_other_batches_in_each_pass(recalibrate):
    model = Narrow().eval()
    small = fxrank.factorize(model, X, keep=0.9, calibration=Drawn(), recalibrate=recalibrate)
    assert fxrank.plan_of(small).R
    assert kept(small, model) >= 0.88  # on vectors not seen


def test_a_model_may_write_into_what_it_is_given():
    class Writes(Narrow):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    plan = fxrank.plan_of(fxrank.factorize(Narrow().eval(), X, keep=0.9, calibration=LOADER))
    twice = [(2 * x, y) for x, y in LOADER]
    written = fxrank.plan_of(fxrank.factorize(Writes().eval(), 2 * X, keep=0.9, calibration=twice))
    assert written.R == plan.R and written.note == plan.note
    assert all(torch.equal(given, 2 * x) for (given, _), (x, _) in zip(twice, LOADER, strict=True))


@pytest.mark.parametrize(("most", "count"), [(1, 1), (X.nbytes, 2), (2**28, 4)])
def test_no_more_batches_are_held_than_fit(monkeypatch, most, count):
    monkeypatch.setattr(oneshot, "TRIED_BYTES", most)
    plan = fxrank.plan_of(fxrank.factorize(Narrow().eval(), X, keep=0.9, calibration=LOADER))
    assert f"in {count} of the batches" in plan.note


def test_what_data_of_all_directions_need_stays_dense():
    with pytest.warns(fxrank.NothingFactorizedWarning, match="no pairs that were tried keep 0.999999 of the model's"):
        plan = fxrank.plan_of(fxrank.factorize(mlp().eval(), X, keep=0.999999, calibration=LOADER))
    assert not plan.R
    assert plan.layer("2").reason == "worth its parameters where the model keeps 0.999999 of its outputs"


def test_batchnorms_are_compared_as_they_will_be_measured_again():
    """What it takes to measure statistics anew that are a little off is no loss of the pairs'."""
    model = Normed().train()
    model.frozen.train()
    with torch.no_grad():
        for x, _ in LOADER * 20:
            model(x)
        model.eval().norm.running_mean += 0.5
    for recalibrate in (True, False):
        options = {"keep": 0.999, "calibration": LOADER, "recalibrate": recalibrate}
        small = fxrank.factorize(model, X, **options)
        assert fxrank.plan_of(small).R.keys() == {"second", "third"}
        assert (kept(small, model) > 0.999) == (not recalibrate)


def test_the_original_is_untouched_and_a_plan_repeats_it():
    model = Narrow().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = fxrank.factorize(model, X, keep=0.9, calibration=LOADER)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    again = fxrank.factorize(model, X, fxrank.plan_of(small), calibration=LOADER)
    assert torch.equal(again(X), small(X))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"keep": 0.9}, ValueError, "keep=0.9 is a share of what the model gives on data; got no calibration=."),
        ({"keep": 1.0, "calibration": LOADER}, ValueError, "keep is the share of the model's outputs"),
        ({"keep": True, "calibration": LOADER}, TypeError, "in (0, 1); got bool."),
        ({"keep": 0.9, "rank": 2}, ValueError, "got keep=0.9 and rank=. Leave all but one out."),
        ({"keep": 0.9, "target_macs": 0.5}, ValueError, "got target_macs=0.5 and keep=0.9."),
    ],
)
def test_what_is_wrong_is_said(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        fxrank.factorize(Narrow().eval(), X, **options)


def test_outputs_that_never_vary_are_refused():
    model = Narrow().eval()
    torch.nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match=r"the same whatever it is called with\. Give a rank, or a target_…, instead"):
        fxrank.factorize(model, X, keep=0.9, calibration=LOADER)


def test_no_more_outputs_are_kept_than_fit(monkeypatch):
    monkeypatch.setattr(outputs, "KEPT_BYTES", 1)
    plan = fxrank.plan_of(fxrank.factorize(Narrow().eval(), X, keep=0.9, calibration=LOADER))
    assert "in 1 of the batches" in plan.note
