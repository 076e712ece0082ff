"""Models whose parts are wrapped, by `torch.compile` or by torch's `checkpoint_wrapper`: plans, files and merged models have
the names of the user's own class, and fit it wrapped or not.
"""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from interrupted import Killed, run
from nets import SOON, sgd, train, vectors
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.optim.swa_utils import AveragedModel

import fxrank
from fxrank.saving.model_files import WEIGHTS

# Torch's own, where the input of a compiled part comes out of one that is not.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X, Y = vectors()
HALFWAY = fxrank.Pufferfish(E=5, ratio=0.25)
NAMES = [f"blocks.{i}.{name}" for i in range(3) for name in ("a", "b", "w")]


class Block(nn.Module):
    """Two layers and a raw weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.w = nn.Parameter(torch.randn(16, 16) / 4)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x + torch.relu(self.b(torch.relu(self.a(x)))) @ self.w)


class Net(nn.Module):
    """The blocks are held in a plain list as well; the last block's `a` has the first one's weight."""

    def __init__(self, seed=0, tied=False):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        if tied:
            self.blocks[2].a.weight = self.blocks[0].a.weight

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def compiled(module):
    return torch.compile(module, backend="eager")


def each_block(wrap):
    def wrapped(model):
        for i in range(3):
            model.blocks[i] = wrap(model.blocks[i])
        return model

    return wrapped


def each_layer(wrap):
    def wrapped(model):
        for block in model.blocks:
            block.a, block.b = wrap(block.a), wrap(block.b)
        return model

    return wrapped


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return model


WRAPPINGS = {
    "plain": lambda model: model,
    "checkpointed": checkpointed,
    "compiled": each_block(compiled),
    "checkpointed layers": each_layer(checkpoint_wrapper),
    "compiled layers": each_layer(compiled),
    "compiled around checkpointed": each_block(lambda block: compiled(checkpoint_wrapper(block))),
    "all of it": lambda model: checkpoint_wrapper(each_block(compiled)(model)),
}
WRAPPED = [name for name in WRAPPINGS if name != "plain"]
_BOTH = ("plain", "checkpointed", "compiled")
PAIRS = [
    *itertools.product(_BOTH, _BOTH),
    *((name, "plain") for name in WRAPPINGS if name not in _BOTH),
    *(("plain", name) for name in WRAPPINGS if name not in _BOTH),
]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(wrapping, policy=HALFWAY, tied=False, average=None, **options):
    """Ten steps with a switch; the model, its plan, and the average."""
    model = WRAPPINGS[wrapping](Net(tied=tied))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    average = None if average is None else average(model)
    session = fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=X,
        total_steps=10,
        steps_per_epoch=1,
        policy=policy,
        followers=() if average is None else (average,),
        **options,
    )
    for _ in range(10):
        train(model, optimizer, 1, (X, Y))
        if average is not None:
            average.update_parameters(model)
    return model, session.finish(), average


def same(mine, theirs):
    mine, theirs = list(mine.parameters()), list(theirs.parameters())
    assert len(mine) == len(theirs)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPED)
def test_the_switch_is_that_of_the_unwrapped_twin(wrapping, tied):
    model, plan, _ = trained(wrapping, tied=tied)
    twin, expected, _ = trained("plain", tied=tied)
    assert plan == expected
    assert list(plan.R) == [name for name in NAMES if not (tied and name == "blocks.2.a")]
    same(model, twin)
    assert torch.equal(model(X), twin(X))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_files_fit_wrapped_or_not(before, after, tmp_path):
    model, plan, _ = trained(before, tied=True)
    fxrank.save(model, tmp_path)
    assert "_orig_mod" not in (text := (tmp_path / "plan.json").read_text()) and "_wrapped" not in text
    header = (tmp_path / WEIGHTS).read_bytes()
    stored = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert not [name for name in stored if "_orig_mod" in name or "_wrapped" in name]
    target = WRAPPINGS[after](Net(1, tied=True))
    assert fxrank.load(target, tmp_path) is target
    assert fxrank.plan_of(target) == plan
    assert torch.equal(target(X), model(X))
    assert wrappers(target) == wrappers(WRAPPINGS[after](Net()))
    assert sum(1 for _ in target.parameters()) == sum(1 for _ in model.parameters())  # the tie is still one


def wrappers(model):
    return sorted(
        kind for m in model.modules() if (kind := type(m).__name__) in ("OptimizedModule", "CheckpointWrapper")
    )


@pytest.mark.parametrize(("before", "after"), PAIRS[1:9])
def test_a_plan_is_a_policy_wrapped_or_not(before, after):
    first, plan, _ = trained(before)
    second, again, _ = trained(after, policy=fxrank.Plan.from_json(plan.to_json()))
    assert again.R == plan.R
    same(first, second)


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_merged_model_fits_the_plain_class(wrapping):
    model, _, _ = trained(wrapping)
    before = copy.deepcopy([*map(type, model.modules())])
    dense = fxrank.merge(model)
    assert [*map(type, model.modules())] == before
    assert not [m for m in dense.modules() if type(m).__name__ == "OptimizedModule"]
    plain = Net(1)
    plain.load_state_dict(dense.state_dict())
    assert torch.equal(plain(X), dense(X))
    torch.testing.assert_close(plain(X), model(X), rtol=1e-4, atol=1e-5)  # float32: V (U x) and (V U) x


def test_a_merged_model_has_no_compiled_part_in_plain_lists():
    class Aside(Net):
        def __init__(self):
            super().__init__()
            self.order = [compiled(block) for block in self.blocks]
            for i, block in enumerate(self.order):
                self.blocks[i] = block

        def forward(self, x):
            x = self.first(x)
            for block in self.order:
                x = block(x)
            return self.last(x)

    small = fxrank.factorize(Aside(), X, rank=0.25)
    assert list(fxrank.plan_of(small).R) == NAMES
    dense = fxrank.merge(small)
    for model in (small, dense):
        assert all(mine is theirs for mine, theirs in zip(model.order, model.blocks, strict=True))
        assert {type(block) for block in model.order} == {Block}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("checkpointed", "checkpointed"),
        ("checkpointed", "plain"),
        ("compiled", "compiled"),
        ("compiled", "plain"),
        pytest.param("plain", "compiled around checkpointed", marks=pytest.mark.slow),
        pytest.param("compiled layers", "checkpointed", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_resumed_wrapped_or_not(before, after, tmp_path):
    def make(name):
        return lambda seed: WRAPPINGS[name](Net(seed))

    whole = run(tmp_path / "whole", make=make("plain"), optimizer=sgd)
    for die in (7, 16):  # before the switch and after it
        with pytest.raises(Killed):
            run(tmp_path / str(die), die=die, make=make(before))
        resumed = run(tmp_path / str(die), make=make(after))
        again = run(tmp_path / str(die), make=make(before))  # of a run that is over
        for result in (resumed, again):
            assert result.plan.R == whole.plan.R and whole.plan.R
            assert [h["loss"] for h in result.history] == [h["loss"] for h in whole.history]
            same(result.model, whole.model)


def test_a_session_state_goes_on_in_another_wrapping():
    def attach(wrapping):
        model = WRAPPINGS[wrapping](Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session = fxrank.LowRankSession.attach(
            model, optimizer, example_inputs=X, total_steps=40, steps_per_epoch=4, policy=SOON
        )
        return model, optimizer, session

    first, optimizer, session = attach("compiled")
    train(first, optimizer, 9, (X, Y))
    state, weights = session.state_dict(), [p.detach().clone() for p in first.parameters()]
    train(first, optimizer, 31, (X, Y))
    second, optimizer, other = attach("checkpointed")
    other.load_state_dict(state)
    with torch.no_grad():
        for mine, theirs in zip(second.parameters(), weights, strict=True):
            mine.copy_(theirs)
    train(second, optimizer, 31, (X, Y))
    assert other.finish() == session.finish() and other.plan.R
    same(first, second)


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_averages_follow(wrapping):
    _, _, expected = trained("plain", average=AveragedModel)
    same(trained(wrapping, average=AveragedModel)[2], expected)
    bare = trained(wrapping, average=lambda model: AveragedModel(Net()))[2]  # an average of the plain class
    same(bare, expected)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_layers_are_selected_by_own_names(wrapping):
    policy = fxrank.Pufferfish(E=5, ratio=0.25, freeze=("blocks.0.a.weight", "blocks.1.norm.*"))
    model, plan, _ = trained(
        wrapping, policy, include=["last"], exclude=["blocks.2.*", r"re:^blocks\.1\.b$", "blocks.1._orig_mod.w"]
    )
    assert list(plan.R) == ["blocks.0.a", "blocks.0.b", "blocks.0.w", "blocks.1.a", "last"]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert len(frozen) == 4  # two factors, weight and bias of the norm

    small = fxrank.factorize(WRAPPINGS[wrapping](Net()), X, rank={"blocks.0.a": 3, "blocks.1._orig_mod.w": 0.25})
    assert fxrank.plan_of(small).R == {"blocks.0.a": 3, "blocks.1.w": 4}
    # What is factorized already is known by its own name too.
    assert fxrank.plan_of(fxrank.factorize(small, X, rank={"blocks.2.b": 2})).R["blocks.2.b"] == 2


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_modules_and_classes_select_what_is_inside(wrapping):
    model = WRAPPINGS[wrapping](Net())
    small = fxrank.factorize(model, X, exclude=[nn.Linear])
    assert list(fxrank.plan_of(small).R) == ["blocks.0.w", "blocks.1.w", "blocks.2.w"]
    session = fxrank.LowRankSession.attach(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        example_inputs=X,
        total_steps=4,
        policy=fxrank.SpectralInit(ratio=0.25),
        exclude=[model.blocks[0], model.blocks[1].a],
    )
    assert list(session.plan.R) == ["blocks.1.b", "blocks.1.w", "blocks.2.a", "blocks.2.b", "blocks.2.w"]


@pytest.mark.parametrize("wrapping", ["checkpointed", "compiled", "compiled layers"])
def test_a_file_of_another_model_is_refused_by_own_names(wrapping, tmp_path):
    model, _, _ = trained(wrapping)
    fxrank.save(model, tmp_path)
    other = WRAPPINGS[wrapping](Net())
    other.blocks[1].register_buffer("extra", torch.zeros(1))
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(fxrank.PlanMismatchError, match=r"'blocks\.1\.extra' is not in the file"):
        fxrank.load(other, tmp_path)
    assert all(map(torch.equal, before, other.parameters()))


@pytest.mark.parametrize("wrapping", ["checkpointed", "compiled", "compiled layers"])
def test_an_extra_norm_is_saved_too(wrapping, tmp_path):
    class Convs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(12, 8 * 16), nn.Linear(8 * 16, 4)
            self.blocks = nn.ModuleList(Part() for _ in range(3))

        def forward(self, x):
            x = self.first(x).reshape(-1, 8, 16)
            for block in self.blocks:
                x = block(x)
            return self.last(x.flatten(1))

    class Part(Block):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x):
            return x + F.relu(self.b(F.relu(self.a(x)))) @ self.w

    small = fxrank.factorize(Convs(), X, rank=3, extra_bn=True)
    fxrank.save(small, tmp_path)
    target = fxrank.load(WRAPPINGS[wrapping](Convs()), tmp_path)
    assert any("norm" in name for name in target.state_dict())
    fxrank.save(target, tmp_path / "again")
    last = fxrank.load(Convs(), tmp_path / "again")
    assert all(torch.equal(value, last.state_dict()[name]) for name, value in small.state_dict().items())
    assert torch.equal(target.eval()(X), small.eval()(X))
