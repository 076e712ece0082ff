import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import ConvNet, Tied, images, sgd, snapshot, vectors
from torch import nn

import fxrank
from fxrank.passes.tracing.compare import output_difference
from fxrank.training.measure import planned_macs


def net():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 2))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def test_ranks_by_ratio_number_and_name():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    by_ratio = fxrank.factorize(model, X, rank=0.25)
    assert fxrank.plan_of(by_ratio).R == {"2": 3, "4": 2}
    assert fxrank.plan_of(by_ratio).layer("2").reason == "rank 3, 0.25 of full rank as given"
    assert fxrank.plan_of(fxrank.factorize(model, X, rank=2)).R == {"2": 2, "4": 2}
    named = fxrank.plan_of(fxrank.factorize(model, X, rank={"0": 1, "4": 0.5}))
    assert named.R == {"0": 1, "4": 4}
    assert named.layer("2").reason == "not named in rank="
    assert fxrank.plan_of(fxrank.factorize(model, X, rank=named)).R == named.R
    assert type(by_ratio) is type(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="only a model that fxrank has rewritten has a plan; this Sequential has none"):
        fxrank.plan_of(model)


@pytest.mark.parametrize(
    ("rank", "error", "text"),
    [
        (0, fxrank.RankError, "the rank of '2' must be in 1 … 12, its full rank; got 0."),
        (9, fxrank.RankError, "the rank of '4' must be in 1 … 8, its full rank; got 9."),
        (0.0, fxrank.RankError, "a rank ratio must be above 0 and at most 1.0; got 0.0 for '2'"),
        (1.5, fxrank.RankError, "got 1.5"),
        (True, TypeError, "a rank is an int (rank) or a float (ratio of the full rank); got bool for '2'"),
        ("8", TypeError, "got str"),
        (
            {"7": 1},
            ValueError,
            "each name in rank= must be a layer of the model; '7' is none. Layers that can be factorized: 0, 2, 4, 5.",
        ),
        ({"2": 13}, fxrank.RankError, "the rank of '2' must be in 1 … 12"),
    ],
)
def test_rank_errors(rank, error, text):
    with pytest.raises(error, match=re.escape(text)):
        fxrank.factorize(net(), X, rank=rank)


def test_naming_a_layer_that_cannot_be_factorized():
    class Halved(nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight / self.weight.sum())

    model = nn.Sequential(Halved(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    text = "layer '0.weight' cannot be factorized: no layer multiplies with it; it is read by sum_1, truediv. Leave it out of rank=."
    with pytest.raises(ValueError, match=re.escape(text)):
        fxrank.factorize(model, torch.randn(2, 4), rank={"0.weight": 1})


def test_one_warning_lists_ranks_above_break_even():
    with pytest.warns(UserWarning, match="ranks at or above break-even") as caught:
        fxrank.factorize(net(), X, rank=1.0, include="*")
    assert len(caught) == 1
    assert "0 (rank 6, break-even 4.0)" in str(caught[0].message)


def test_non_finite_weights_are_named_and_nothing_changes():
    model = net()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.inf
    plan = fxrank.plan_of(fxrank.factorize(net(), X, rank=0.25))
    kinds = [type(m) for m in model.modules()]
    from fxrank.switch.apply_plan import apply_plan

    with pytest.raises(
        fxrank.NonFiniteWeightError, match=re.escape("'4' holds 1 NaN or infinite value of 96. Lower the learning rate")
    ):
        apply_plan(model, plan)
    assert [type(m) for m in model.modules()] == kinds


def test_a_plan_for_another_model_names_the_first_mismatch():
    plan = fxrank.plan_of(fxrank.factorize(net(), X, rank=0.25))
    with pytest.raises(
        fxrank.PlanMismatchError,
        match=re.escape("'2' is Linear with weight (6, 12), the plan has linear with (12, 12)"),
    ):
        fxrank.factorize(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)), X, rank=plan)
    with pytest.raises(fxrank.PlanMismatchError, match=re.escape("Sequential has no '2'")):
        fxrank.factorize(nn.Sequential(nn.Linear(6, 12)), X, rank=plan)
    with pytest.raises(fxrank.PlanMismatchError, match="is already a factor pair"):
        fxrank.factorize(fxrank.factorize(net(), X, rank=0.25), X, rank=plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "a plan must have each weight once; '4' and '4' are one in this Sequential. Use the plan of"),
        ({"rank": None}, "a plan must have each weight once; '4' and '4' are one in this Sequential."),
        ({"name": "4_again"}, "a plan must have each weight once; '4' and '4_again' are one in this Sequential."),
    ],
)
def test_a_plan_with_a_weight_twice(change, message):
    def made():
        model = net()
        model.register_module("4_again", model[4])
        return model

    plan = fxrank.plan_of(fxrank.factorize(net(), X, rank={"2": 3, "4": 2}))
    plan = replace(plan, layers=(*plan.layers, replace(plan.layer("4"), **change)))
    model = made()
    before = snapshot(model)
    for call in (
        lambda: fxrank.factorize(model, X, plan),
        lambda: fxrank.switch.apply_plan.apply_plan(model, plan),
        lambda: fxrank.LowRankSession.attach(model, sgd(model), example_inputs=X, total_steps=4, policy=plan),
    ):
        with pytest.raises(fxrank.PlanMismatchError, match=re.escape(message)):
            call()
        assert snapshot(model) == before


def test_merge_gives_a_checkpoint_for_the_untouched_class():
    model = net()
    small = fxrank.factorize(model, X, rank=0.4)
    dense = fxrank.merge(small)
    net().load_state_dict(dense.state_dict(), strict=True)
    assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]
    assert output_difference(small, dense, X) <= 1e-5  # float32
    with pytest.raises(ValueError, match="has none"):
        fxrank.plan_of(dense)


def test_hooks_on_other_modules_stay():
    model = net()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    fxrank.factorize(model, X, rank=0.25)(X)
    assert len(seen) >= 1


# -- plans


def test_plan_json_round_trip_and_counts():
    plan = fxrank.plan_of(fxrank.factorize(net(), X, rank=0.25))
    assert fxrank.Plan.from_json(plan.to_json()) == plan
    assert plan.K == 1
    assert plan.E is None
    assert plan.layer("2").ratio == 0.25
    assert plan.layer("0").ratio is None
    assert planned_macs(plan) == (3 * (72 + 144 + 96 + 16), 3 * (72 + 3 * 24 + 2 * 20 + 16))
    assert "rank 3, 0.25 of full rank as given" in str(plan)
    with pytest.raises(KeyError):
        plan.layer("nowhere")


@given(
    name=st.text(max_size=5),
    full=st.integers(1, 99),
    share=st.floats(0, 1),
    numbers=st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False), min_size=4, max_size=4),
    step=st.none() | st.integers(0, 10**9),
)
def test_any_plan_survives_json(name, full, share, numbers, step):
    rank = None if share < 0.2 else max(1, int(share * full))
    decision = fxrank.LayerDecision(
        name, "linear", (full, full), full, rank, "because", "channel", False, 1, 2, 3, None, *numbers
    )
    plan = fxrank.Plan("it", (decision,), step, None if step is None else step / 7, "note")
    assert fxrank.Plan.from_json(plan.to_json()) == plan


def broken(**changes):
    data = json.loads(fxrank.plan_of(fxrank.factorize(net(), X, rank=0.25)).to_json())
    for key, value in changes.items():
        if key in data:
            data[key] = value
        else:
            data["layers"][1][key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a plan must be JSON"),
        ("[1]", '"format": "fxrank-plan"'),
        (broken(version=4), "this fxrank reads plans up to version 3; got version 4"),
        (broken(layers=3), "a plan's layers must be a list; got int"),
        (broken(rank=0), "layer 1 of the plan (2): rank must be in 1 … 12; got 0"),
        (broken(rank=13), "got 13"),
        (broken(rank=True), "rank must be int or null; got True"),
        (broken(name=None), "name must be str; got None"),
        (broken(weight_shape="x"), "weight_shape must be a list of whole numbers; got 'x'"),
        (broken(colour=1), "layer 1 of the plan has unknown fields ['colour']"),
        (broken(policy=3), "policy must be str; got 3"),
    ],
)
def test_plan_errors(text, message):
    with pytest.raises(fxrank.PlanMismatchError, match=re.escape(message)):
        fxrank.Plan.from_json(text)


# -- checkpoints


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.body = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.again = self.body
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.head(self.norm(self.again(self.body(self.stem(x)))).mean((2, 3)))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("extra_bn", [False, True])
def test_save_and_load(tmp_path, extra_bn):
    small = fxrank.factorize(Shared().eval(), IMAGES, rank=0.5, extra_bn=extra_bn)
    fxrank.save(small, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]
    fresh = fxrank.load(Shared().eval(), tmp_path)
    assert torch.equal(fresh(IMAGES), small(IMAGES))
    assert fresh.again is fresh.body
    assert fxrank.plan_of(fresh) == fxrank.plan_of(small)
    keys = set(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert keys <= set(small.state_dict())


def test_load_in_another_process(tmp_path):
    small = fxrank.factorize(net(), X, rank=0.25)
    fxrank.save(small, tmp_path / "saved")
    torch.save({"x": X, "y": small(X).detach()}, tmp_path / "io.pt")
    program = (
        "import sys, torch, fxrank; from torch import nn; folder = sys.argv[1]\n"
        "m = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 2))\n"
        "io = torch.load(folder + '/io.pt', weights_only=True); torch.set_num_threads(1)\n"
        "assert torch.equal(fxrank.load(m, folder + '/saved')(io['x']), io['y'])\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=300)


def test_checkpoint_errors_leave_the_model_alone(tmp_path):
    good = tmp_path / "good"
    fxrank.save(fxrank.factorize(net(), X, rank=0.25), good)
    weights, plan = (good / "model.safetensors").read_bytes(), (good / "plan.json").read_text()

    def refused(error, text, *, model=None, weights=weights, plan=plan):
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        for name, content in (
            ("model.safetensors", weights),
            ("plan.json", plan.encode() if isinstance(plan, str) else plan),
        ):
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        model = net() if model is None else model
        state = {k: v.clone() for k, v in model.state_dict().items()}
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(error, match=re.escape(text)):
            fxrank.load(model, folder)
        assert [type(m) for m in model.modules()] == kinds
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    refused(fxrank.CheckpointError, "plan.json is missing", plan=None)
    refused(fxrank.CheckpointError, "model.safetensors is missing", weights=None)
    refused(fxrank.CheckpointError, "must be a whole safetensors file", weights=weights[:100])
    refused(fxrank.CheckpointError, "must be a whole safetensors file", weights=weights[:-8])
    refused(fxrank.CheckpointError, "plan.json must be UTF-8 JSON", plan=b"\xff\xfe")
    refused(fxrank.PlanMismatchError, "a plan must be JSON", plan=plan[:50])
    refused(fxrank.PlanMismatchError, "has no '2'", model=nn.Sequential(nn.Linear(6, 12)))
    foreign = safetensors.torch.save({"alien": torch.zeros(1)})
    refused(
        fxrank.PlanMismatchError,
        "every stored tensor must have a place in the model; 'alien' has none",
        weights=foreign,
    )
    partial = safetensors.torch.save({"0.bias": torch.zeros(12)})
    refused(
        fxrank.PlanMismatchError,
        "every tensor of the model must be stored; '0.weight' is not in the file",
        weights=partial,
    )
    other = safetensors.torch.save(dict(fxrank.factorize(net(), X, rank=0.4).state_dict()))
    refused(
        fxrank.PlanMismatchError,
        "stored shapes must fit the model; '2.u.weight' is (4, 12) in the file and (3, 12) in the model",
        weights=other,
    )
    with pytest.raises(ValueError, match="has none"):
        fxrank.save(net(), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


# -- shared weights, repeated calls, the way back


def test_tied_layers_share_their_factors_and_keep_their_biases():
    model = Tied()
    before = snapshot(model)
    small = fxrank.factorize(model, vectors()[0], rank=0.25)
    assert snapshot(model) == before
    assert fxrank.plan_of(small).R == {"a": 4, "twice": 4}
    assert small.a.u.weight is small.b.u.weight
    assert small.a.v.weight is small.b.v.weight
    assert not torch.equal(small.a.bias, small.b.bias)
    assert torch.equal(small.b.bias, model.b.bias)
    dense = fxrank.merge(small)
    assert torch.equal(dense.a.weight, dense.b.weight)
    assert output_difference(small, dense, vectors()[0]) <= 1e-5  # float32


def test_a_tied_layer_can_be_named_by_either_name():
    small = fxrank.factorize(Tied(), vectors()[0], rank={"b": 3})
    assert fxrank.plan_of(small).R == {"a": 3}
    assert small.b.rank == 3


def test_factorizing_again_adds_to_what_is_there():
    first = fxrank.factorize(net(), X, rank={"2": 3})
    second = fxrank.factorize(first, X, rank={"4": 2})
    assert fxrank.plan_of(first).R == {"2": 3}
    assert fxrank.plan_of(second).R == {"2": 3, "4": 2}
    assert torch.equal(second[2].u.weight, first[2].u.weight)
    message = "layer '2' cannot be factorized: already a factor pair, of rank 3. Leave it out of rank=."
    with pytest.raises(ValueError, match=re.escape(message)):
        fxrank.factorize(first, X, rank={"2": 2})
    assert fxrank.plan_of(fxrank.factorize(second, X, rank=0.25)) == fxrank.plan_of(second)


@pytest.mark.parametrize("extra_bn", [False, True])
def test_merge_folds_a_norm_in(extra_bn):
    model, (x, _) = ConvNet().eval(), images()
    small = fxrank.factorize(model, x, rank=0.5, extra_bn=extra_bn)
    if extra_bn:  # as training would leave it
        for pair in (small.conv2, small.conv3):
            nn.init.uniform_(pair.norm.weight, 0.5, 2.0)
            nn.init.uniform_(pair.norm.bias)
    before = snapshot(small)
    dense = fxrank.merge(small)
    assert snapshot(small) == before
    assert not any(isinstance(m, fxrank.FactorPair) for m in dense.modules())
    assert output_difference(small, dense, x) <= 1e-5  # float32


def test_a_full_ratio_gives_exact_pairs():
    model = ConvNet().double().eval()
    x = images()[0].double()
    with pytest.warns(UserWarning, match="ranks at or above break-even make a layer no smaller: conv2") as caught:
        small = fxrank.factorize(model, x, rank=1.0)
    assert len(caught) == 1
    assert output_difference(model, small, x) <= 1e-12  # float64


def test_selection_errors():
    with pytest.raises(
        ValueError, match=re.escape("each selector in include must match at least one layer; '3' matches none of 4.")
    ):
        fxrank.factorize(net(), X, include="3")
    with pytest.raises(
        TypeError,
        match=re.escape("exclude takes names, globs, regular expressions, module classes or modules; got int."),
    ):
        fxrank.factorize(net(), X, exclude=[2])
    with pytest.raises(
        ValueError,
        match=re.escape(
            "form must be one of 'channel', 'gauge', 'qkv', 'spatial', 'stack'; got 'chanel'. Did you mean 'channel'?"
        ),
    ):
        fxrank.factorize(net(), X, form="chanel")
    with pytest.raises(
        fxrank.NothingToFactorizeError, match=re.escape("Name layers to take in with include=… ('*' takes everything).")
    ):
        fxrank.factorize(nn.Sequential(nn.Linear(6, 2)), X)
