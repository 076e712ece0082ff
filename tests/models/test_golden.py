"""Numbers of the reference implementations and of the papers, to the digit (tests/data/golden.json says where they come from)."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from places import DATA

import fxrank
from benchmarks.subjects.models import handwritten_lowrank_resnet18, resnet18, vgg19_bn
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.spectra.exact import Spectrum, accumulative, energy, singular_values, stable
from fxrank.policies.monitor import ReferenceDetector, moving_average
from fxrank.policies.ranks import Evidence, rank_rule, whole_rank
from fxrank.switch.apply_plan import Replacement
from fxrank.switch.later_steps import FactorRegime
from fxrank.training.measure import parameter_count, planned_macs

GOLDEN = json.loads((DATA / "golden.json").read_text())
IMAGE = torch.zeros(1, 3, 32, 32)
SHORTCUTS_DENSE = {"exclude": "*shortcut*"}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (resnet18, "cifar_resnet18_full"),
        (lambda: resnet18(100), "cifar_resnet18_full_100cls"),
        (lambda: resnet18(stem_bn=False), "pufferfish_resnet18_full_original_repo"),
        (vgg19_bn, "cifar_vgg19_full_cuttlefish"),
        (lambda: vgg19_bn(100), "cifar_vgg19_full_cuttlefish_100cls"),
        (lambda: vgg19_bn(hidden_layers=2), "pufferfish_vgg19_full_original_repo"),
    ],
)
def test_dense_models_have_the_papers_sizes(model, name):
    net = model()
    assert parameter_count(net) == GOLDEN["models"][name]["parameters"]
    plan = fxrank.plan_of(fxrank.factorize(net, IMAGE, rank=0.25))
    assert planned_macs(plan)[0] == GOLDEN["models"][name]["macs"]


@pytest.mark.parametrize(
    ("model", "leading", "options", "name"),
    [
        (resnet18, 3, {"extra_bn": True}, "pufferfish_resnet18_in_cuttlefish_repo"),
        (lambda: resnet18(stem_bn=False), 3, {}, "pufferfish_resnet18_original_repo"),
        (vgg19_bn, 9, {}, "pufferfish_vgg19_in_cuttlefish_repo"),
        (lambda: vgg19_bn(hidden_layers=2), 9, {}, "pufferfish_vgg19_original_repo"),
    ],
)
def test_pufferfish_models_have_the_papers_sizes(model, leading, options, name):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    session = fxrank.LowRankSession.attach(
        net,
        optimizer,
        example_inputs=torch.randn(2, 3, 32, 32),
        total_steps=10,
        policy=fxrank.Pufferfish(E=0, K=leading, ratio=0.25, **options),
        exclude="*shortcut*" if name.startswith("pufferfish_resnet") else (),
    )
    assert session.plan is not None
    assert parameter_count(net) == GOLDEN["models"][name]["parameters"]
    assert planned_macs(session.plan)[1] * 1 == GOLDEN["models"][name]["macs"] * 2  # batch of two
    assert leading == session.plan.K


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("extra_bn", [False, True])
@pytest.mark.parametrize(("name", "model"), [("LowrankResNet18Adapt", resnet18), ("LowRankVGG19Adapt", vgg19_bn)])
def test_random_rank_lists_have_the_reference_sizes(name, model, extra_bn, case):
    golden = GOLDEN[name]["cases"][case]
    ranks = dict(zip(GOLDEN[name]["layers"], golden["ranks"], strict=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ranks at or above break-even")
        small = fxrank.factorize(model(), IMAGE, rank=ranks, extra_bn=extra_bn)
    variant = f"frob_decay=False,extra_bns={extra_bn}"
    assert parameter_count(small) == golden["parameters"][variant]
    assert planned_macs(fxrank.plan_of(small))[1] == golden["macs"][variant]


def test_the_handwritten_model_of_the_benchmark_is_the_same_model():
    case = GOLDEN["LowrankResNet18Adapt"]["cases"][0]
    assert (
        parameter_count(handwritten_lowrank_resnet18(case["ranks"]))
        == case["parameters"]["frob_decay=False,extra_bns=False"]
    )


def tensors():
    rng = np.random.RandomState(0)
    init = np.float32(rng.standard_normal((96, 64))) * np.float32(0.1)
    trained = np.float32(
        0.5 * init + np.float32(rng.standard_normal((96, 4)) @ rng.standard_normal((4, 64))) * np.float32(0.08)
    )
    yield "A_linear_96x64", init, trained
    rng = np.random.RandomState(1)
    init = np.float32(rng.uniform(-1, 1, (64, 128)) * np.sqrt(3 / 128))
    yield "B_linear_64x128", init, np.float32(init * np.exp(-np.arange(128) / 20)[None, :])


@pytest.mark.parametrize(("name", "init", "trained"), list(tensors()), ids=lambda v: v if isinstance(v, str) else "")
def test_rank_metrics(name, init, trained):
    golden = GOLDEN["tensors"]["cases"][name]
    for kind, weight in (("initial", init), ("trained", trained)):
        numbers = golden[kind]
        sigma = singular_values(torch.from_numpy(weight)[None])[0]
        # The reference works in float32 in places; 1e-6 is its rounding, not ours.
        assert stable(sigma) == pytest.approx(numbers["stable_rank"], rel=1e-6)
        assert fxrank.stable_rank(torch.from_numpy(weight)) == pytest.approx(numbers["stable_rank"], rel=1e-6)
        assert float(sigma[0]) == pytest.approx(numbers["sigma_max"], rel=1e-6)
        assert accumulative(sigma, 0.8) == numbers["accumulative_rank_p0.8"]
        assert accumulative(sigma, 0.9) == numbers["accumulative_rank_p0.9"]
        assert energy(sigma, 0.8) == numbers["energy_rank_p0.8(sigma^2)"]
    sigma = singular_values(torch.from_numpy(trained)[None])
    xi = golden["initial"]["full_rank"] / golden["initial"]["stable_rank"]
    assert xi == pytest.approx(golden["paper"]["xi"], rel=1e-6)
    evidence = Evidence(Spectrum(torch.from_numpy(trained)[None]), xi, 0.8, 0.25)
    assert rank_rule("scaled_stable_rank")(evidence) == pytest.approx(golden["paper"]["scaled_stable_rank"], rel=1e-6)
    assert rank_rule("max_scaled_accumulative")(evidence) == pytest.approx(
        golden["paper"]["max_with_accumulative_p0.8"]
    )


def test_moving_average():
    golden = GOLDEN["ema"]
    average = moving_average(golden["signal"], golden["points"])
    np.testing.assert_allclose(average, golden["ema"], rtol=1e-15)
    np.testing.assert_allclose(np.abs(np.gradient(average)), golden["np_gradient_abs"], rtol=1e-14)


@pytest.mark.parametrize("name", GOLDEN["detector"])
def test_detector_statistic(name):
    golden = GOLDEN["detector"][name]
    sequence = [float(x) for x in golden["sequence"]]
    for epoch, expected in enumerate(golden["statistic"]):
        found = ReferenceDetector().statistic(sequence[: epoch + 1])
        assert found == (math.inf if expected is None else pytest.approx(expected, rel=1e-12, abs=1e-12))


@pytest.mark.parametrize(
    ("preset", "detector", "others"),
    [
        ("cifar(window15,thr0.1,remaining=10)", ReferenceDetector(), 9),
        ("cifar(window15,thr0.1,remaining=2)", ReferenceDetector(), 1),
        ("cifar(window15,thr0.1,remaining=1)", ReferenceDetector(), 0),
        ("imagenet_cnn(window5,thr0.33,remaining=30)", ReferenceDetector(0.33, 5, 5, ((3, 5.0), (6, 2.5))), 29),
        ("imagenet_cnn(window5,thr0.33,remaining=6)", ReferenceDetector(0.33, 5, 5, ((3, 5.0), (6, 2.5))), 5),
        ("deit(window5,thr0.411,remaining=3)", ReferenceDetector(0.411, 5, 5, ((4, 5.0), (9, 2.5))), 2),
    ],
)
@pytest.mark.parametrize("name", GOLDEN["detector"])
def test_first_verdict(name, preset, detector, others):
    golden = GOLDEN["detector"][name]
    moving = [float(i % 2) * 1000 for i in range(60)]  # never settles, so that the number of layers left stays
    for epoch in range(len(golden["sequence"])):
        curves = {"it": [float(x) for x in golden["sequence"][: epoch + 1]]}
        curves |= {f"other{i}": moving[: epoch + 1] for i in range(others)}
        if "it" in detector.settled(curves, {}, frozenset()):
            assert epoch == golden["first_true"][preset]
            return
    assert golden["first_true"][preset] is None


@pytest.mark.parametrize("name", GOLDEN["switch"])
def test_switch_epoch_of_many_layers(name):
    golden = GOLDEN["switch"][name]
    tracked = {n: [float(x) for x in golden["traces"][n]] for n in golden["settled_at"]}
    detector, before, at = ReferenceDetector(), frozenset(), {}
    for epoch in range(len(next(iter(tracked.values())))):
        now = detector.settled({n: c[: epoch + 1] for n, c in tracked.items()}, {}, before)
        at |= dict.fromkeys(now - before, epoch)
        before = now
        if len(before) == len(tracked):
            assert epoch + 1 == golden["switch_epoch"]
            break
    else:
        assert golden["switch_epoch"] is None
    assert {n: at.get(n) for n in tracked} == golden["settled_at"]


@pytest.mark.parametrize("width", [*GOLDEN["overflow_widths"], 64, 512])
def test_rounding_never_exceeds_full_rank(width):
    for initial in range(1, width + 1):
        assert whole_rank(initial * (width / initial), width) == width


def test_frobenius_decay_gradient():
    golden = GOLDEN["frobenius"]
    rng = np.random.RandomState(11)
    u, v = rng.standard_normal((3, 4, 3, 3)), rng.standard_normal((6, 3, 1, 1))
    pair = make_pair(torch.nn.Conv2d(4, 6, 3, bias=False), 3)
    with torch.no_grad():
        pair.u.weight.copy_(torch.from_numpy(u))
        pair.v.weight.copy_(torch.from_numpy(v))
    for p in pair.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1)
    FactorRegime(optimizer, [Replacement("it", torch.nn.Parameter(torch.empty(0)), pair)], golden["lambda"]).decay()
    # float32 on both sides
    assert float(pair.u.weight.grad.norm()) == pytest.approx(golden["ref_grad_u_norm"], rel=1e-6)
    assert float(pair.v.weight.grad.norm()) == pytest.approx(golden["ref_grad_v_norm"], rel=1e-6)
    assert float(pair.u.weight.grad.sum()) == pytest.approx(golden["ref_grad_u_sum"], rel=1e-5)
    np.testing.assert_allclose(pair.v.weight.grad[:, :, 0, 0].numpy(), golden["ref_grad_v"], rtol=1e-5, atol=1e-7)
