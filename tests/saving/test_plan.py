import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxrank import Budget, FxrankError, LayerDecision, Plan, PlanMismatchError

numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 10**12)


@st.composite
def decisions(draw):
    full = draw(st.integers(1, 4096))
    return LayerDecision(
        name=draw(st.text()),
        kind=draw(st.sampled_from(["linear", "conv2d", "Embedding"])),
        weight_shape=tuple(draw(st.lists(st.integers(0, 512), min_size=2, max_size=4))),
        full_rank=full,
        rank=draw(st.none() | st.integers(1, full)),
        reason=draw(st.text()),
        extra_bn=draw(st.booleans()),
        parameters=draw(counts),
        pair_parameters=draw(st.none() | counts),
        macs=draw(counts),
        pair_macs=draw(st.none() | counts),
        stable_rank=draw(st.none() | numbers),
        xi=draw(st.none() | numbers),
        speedup=draw(st.none() | numbers),
        truncation_error=draw(st.none() | numbers),
    )


plans = st.builds(
    Plan,
    policy=st.text(),
    layers=st.lists(decisions(), max_size=4).map(tuple),
    switch_step=st.none() | counts,
    switch_epoch=st.none() | numbers.map(abs),
    note=st.text(),
    budget=st.none()
    | st.builds(
        Budget,
        st.sampled_from(["params", "macs", "step_time", "latency"]),
        st.floats(0, 1, exclude_min=True),
        numbers,
        st.none() | numbers,
        st.none() | st.text(),
    ),
)

EXAMPLE = Plan(
    policy="Cuttlefish",
    layers=(
        LayerDecision("stem", "conv2d", (8, 3, 3, 3), 8, None, "first layer of the graph, left dense by default"),
        LayerDecision("mid", "linear", (16, 16), 16, None, "rank 12 of 16 would not save anything", speedup=1.25),
        LayerDecision("deep", "linear", (16, 32), 16, 4, "as asked", truncation_error=0.25, speedup=2.0),
        LayerDecision("head", "linear", (4, 32), 4, None, "last layer of the graph, left dense by default"),
    ),
    switch_step=30,
    switch_epoch=3.0,
    note="the ranks of all 2 eligible layers have settled",
)


@given(plans)
def test_json_round_trip(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


@given(plans)
def test_k_and_r_say_the_same_as_the_layers(plan):
    assert 0 <= plan.K <= len(plan.layers)
    assert not any(layer.factorized for layer in plan.layers[: plan.K])
    assert len(plan.layers) == plan.K or plan.layers[plan.K].factorized
    assert set(plan.R) == {layer.name for layer in plan.layers if layer.factorized}
    assert all(layer.ratio is None or 0 < layer.ratio <= 1 for layer in plan.layers)


def test_files(tmp_path):
    EXAMPLE.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == EXAMPLE
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "other.json")
    (tmp_path / "weights.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(PlanMismatchError, match=r"a plan must be UTF-8 JSON; .*weights.json is not: "):
        Plan.load(tmp_path / "weights.json")


def test_e_k_and_r():
    assert EXAMPLE.E == 3.0
    assert EXAMPLE.K == 2
    assert EXAMPLE.R == {"deep": 4}
    nothing = EXAMPLE.with_layers([LayerDecision("deep", "linear", (16, 32), 16, None, "kept")])
    assert (nothing.K, nothing.R) == (4, {})
    assert Plan("p", ()).K == 0
    assert Plan("p", ()).E is None


def test_layers_by_name():
    assert EXAMPLE.layer("deep").rank == 4
    assert EXAMPLE.layer("deep").ratio == 0.25
    assert EXAMPLE.layer("mid").ratio is None
    with pytest.raises(KeyError, match="'deeper'"):
        EXAMPLE.layer("deeper")


def test_with_layers_replaces_by_name_and_keeps_the_order():
    changed = LayerDecision("mid", "linear", (16, 16), 16, 2, "changed")
    plan = EXAMPLE.with_layers([changed])
    assert [layer.name for layer in plan.layers] == ["stem", "mid", "deep", "head"]
    assert plan.layer("mid") is changed
    assert plan.K == 1
    assert EXAMPLE.layer("mid").rank is None


def test_the_table():
    assert str(EXAMPLE).splitlines() == [
        "layer    kind    weight    full    rank    ratio    error    speed-up    reason",
        "-------  ------  --------  ------  ------  -------  -------  ----------  -----------------------------------------------",
        "stem     conv2d  8x3x3x3   8       -       -        -        -           first layer of the graph, left dense by default",
        "mid      linear  16x16     16      -       -        -        1.25x       rank 12 of 16 would not save anything",
        "deep     linear  16x32     16      4       0.25     0.250    2.00x       as asked",
        "head     linear  4x32      4       -       -        -        -           last layer of the graph, left dense by default",
    ]


def with_plan(**changes):
    return json.dumps(json.loads(EXAMPLE.to_json()) | changes)


def with_training(**changes):
    whole = {"frobenius_decay": "auto", "lr_scale": 1.0, "rewarmup": 0.0, "freeze": []}
    return with_plan(training=whole | changes)


def with_layer(**changes):
    data = json.loads(EXAMPLE.to_json())
    data["layers"][2] |= changes
    return json.dumps(data)


KNOWN = sorted(LayerDecision.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a plan must be JSON; Expecting value: line 1 column 1 (char 0). Use the file that Plan.save wrote."),
        ('{"format": "fxrank-plan"', "a plan must be JSON; Expecting ',' delimiter"),
        ("[" * 100_000, "a plan must be JSON; maximum recursion depth exceeded"),
        ("[]", 'a plan must be a JSON object with "format": "fxrank-plan"; this one is not. Use the file that'),
        ("{}", 'a plan must be a JSON object with "format": "fxrank-plan"; this one is not.'),
        (with_plan(format="onnx"), 'a plan must be a JSON object with "format": "fxrank-plan"; this one is not.'),
        (
            with_plan(version=4),
            "this fxrank reads plans up to version 3; got version 4. Install the fxrank that wrote it.",
        ),
        (with_plan(version=None), "this fxrank reads plans up to version 3; got version None."),
        (
            with_plan(training={"lr_scale": 1.0}),
            "the plan's training must be an object with frobenius_decay, lr_scale,",
        ),
        (
            with_training(lr_scale=0),
            "lr_scale above 0, rewarmup in [0, 1) and no negative frobenius_decay; got 0.0, 0.0 and auto.",
        ),
        (with_training(rewarmup=1.0), "rewarmup in [0, 1) and no negative frobenius_decay; got 1.0, 1.0 and auto."),
        (with_training(frobenius_decay=-1), "got 1.0, 0.0 and -1.0."),
        (
            with_training(frobenius_decay="much"),
            "the plan's training: frobenius_decay must be float or null; got 'much'.",
        ),
        (with_training(freeze="0.*"), "the plan's training: freeze must be a list of globs; got '0.*'."),
        (with_plan(layers={}), "a plan's layers must be a list; got dict."),
        (with_plan(policy=3), "plan: policy must be str; got 3."),
        (with_plan(note=None), "plan: note must be str; got None."),
        (with_plan(switch_step="30"), "plan: switch_step must be int or null; got '30'."),
        (with_plan(switch_step=True), "plan: switch_step must be int or null; got True."),
        (with_plan(switch_step=-3), "plan: switch_step must be at least 0, or null; got -3."),
        (with_plan(switch_epoch=-0.5), "plan: switch_epoch must be at least 0, or null; got -0.5."),
        (with_plan(switch_step=1.5), "plan: switch_step must be int or null; got 1.5."),
        (with_plan(switch_epoch="3"), "plan: switch_epoch must be float or null; got '3'."),
        (with_plan(switch_epoch=float("nan")), "plan: switch_epoch must be float or null; got nan."),
        (with_plan(switch_epoch=10**400), "plan: switch_epoch must be float or null; got inf."),
        (with_plan(layers=[1]), "layer 0 of the plan must be an object; got int."),
        (with_layer(colour="red"), f"layer 2 of the plan has unknown fields ['colour']; known are {KNOWN}."),
        (
            with_layer(weight_shape="16x32"),
            "layer 2 of the plan: weight_shape must be a list of whole numbers; got '16x32'.",
        ),
        (with_layer(weight_shape=[16, 32.0]), "weight_shape must be a list of whole numbers; got [16, 32.0]."),
        (with_layer(weight_shape=[16, True]), "weight_shape must be a list of whole numbers; got [16, True]."),
        (with_layer(name=None), "layer 2 of the plan: name must be str; got None."),
        (with_layer(full_rank=True), "layer 2 of the plan: full_rank must be int; got True."),
        (with_layer(extra_bn=1), "layer 2 of the plan: extra_bn must be bool; got 1."),
        (with_layer(xi=float("inf")), "layer 2 of the plan: xi must be float or null; got inf."),
        (with_layer(rank="4"), "layer 2 of the plan: rank must be int or null; got '4'."),
        (with_layer(rank=0), "layer 2 of the plan (deep): rank must be in 1 … 16; got 0."),
        (with_layer(rank=17), "layer 2 of the plan (deep): rank must be in 1 … 16; got 17."),
    ],
)
def test_the_first_fault_is_named(text, message):
    with pytest.raises(PlanMismatchError, match=re.escape(message)):
        Plan.from_json(text)


def test_whole_numbers_are_floats_too():
    assert Plan.from_json(with_plan(switch_epoch=3)) == EXAMPLE


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from(["format", "version", "layers", "policy", "switch_step", "switch_epoch", "note", "training"])
    | st.sampled_from(KNOWN),
    json_values,
)
def test_no_json_value_does_anything_but_read_or_be_refused(field, value):
    text = with_layer(**{field: value}) if field in KNOWN else with_plan(**{field: value})
    try:
        plan = Plan.from_json(text)
    except FxrankError:
        return
    assert Plan.from_json(plan.to_json()) == plan


def test_a_budget_of_version_2_is_read_and_a_damaged_one_refused():
    data = json.loads(with_plan(budget={"of": "macs", "target": 0.5, "reached": 0.49}))
    assert Plan.from_json(json.dumps(data | {"version": 2})).budget == Budget("macs", 0.5, 0.49)
    for change, text in [
        (
            {"of": "bytes"},
            "the plan's budget: a budget's quantity must be one of 'latency', 'macs', 'params', 'step_time'; got 'bytes'",
        ),
        ({"target": 0}, "the plan's budget: target_macs is a share in (0, 1]; got 0.0. 0.5 halves them."),
        ({"spread": "wide"}, "the plan's budget: spread must be float or null; got 'wide'."),
        ({"device": 7}, "the plan's budget: device must be str or null; got 7."),
        ({"colour": 1}, "the plan's budget must be an object with of, target, reached, spread, device; got {"),
    ]:
        with pytest.raises(PlanMismatchError, match=re.escape(text)):
            Plan.from_json(json.dumps(data | {"budget": data["budget"] | change}))
