"""Forms of pairs through whole runs: killed and resumed, in one call, and by the spectra."""

import pytest
import torch
from interrupted import Killed, run
from nets import SOON, ConvNet, images

import fxrank
from fxrank.passes.pairs.convolution import LowRankSpatialConv2d
from fxrank.passes.pairs.gauge import LowRankGaugeConv2d

FORMS = {"spatial": LowRankSpatialConv2d, "gauge": LowRankGaugeConv2d}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("die", [7, 16], ids=["before", "after"])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, die, form):
    options = {"make": ConvNet, "policy": fxrank.Pufferfish(E=2, K=0, ratio=0.25, form=form)}
    whole = run(tmp_path / "whole", **options)
    assert type(whole.model.conv3) is FORMS[form]
    with pytest.raises(Killed):
        run(tmp_path / "killed", die=die, **options)
    again = run(tmp_path / "killed", **options)
    state = whole.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in again.model.state_dict().items())
    assert again.plan == whole.plan


@pytest.mark.parametrize("form", FORMS)
def test_the_one_call(tmp_path, form):
    torch.manual_seed(0)
    model = ConvNet()
    policy = fxrank.Pufferfish(E=1, K=0, ratio=0.25, form=form)
    data = [images(seed=i) for i in range(4)]
    result = fxrank.auto_lowrank(
        model, data, epochs=3, policy=policy, device="cpu", progress=False, output_dir=tmp_path, seed=0
    )
    assert {d.name: d.form for d in result.plan.layers if d.factorized} == {"conv2": form, "conv3": form}
    assert result.report.parameters_after < result.report.parameters_before
    assert result.report.parameters_after == sum(p.numel() for p in model.parameters())
    x = images()[0]
    model.eval()
    again = fxrank.load(ConvNet(seed=1), tmp_path).eval()
    assert torch.equal(again(x), model(x))
    repeated = fxrank.factorize(ConvNet(), x, rank=fxrank.Plan.load(tmp_path / "plan.json"))
    assert type(repeated.conv2) is FORMS[form]
    dense = fxrank.merge(model)
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)  # float32
    ConvNet().load_state_dict(dense.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_switching_half_way_by_the_spectra(form):
    data = [images(seed=i) for i in range(4)]
    policy = fxrank.Cuttlefish(**{f: getattr(SOON, f) for f in ("speedup_threshold", "rank_metric", "ratio", "round_to")}, form=form)  # fmt: skip
    result = fxrank.auto_lowrank(ConvNet(), data, epochs=4, policy=policy, device="cpu", progress=False, seed=0)
    assert {d.form for d in result.plan.layers if d.factorized} == {form}
