"""What is compared of a model's outputs, and what becomes of the ranks where a copy with pairs cannot be tried, or not be believed."""

from dataclasses import replace

import pytest
import torch
from live import attached
from nets import train, vectors
from outputs import KEEP, Narrow, Normed, to_the_switch, told

from fxrank.policies import outputs
from fxrank.session import live_data

# -- where the model cannot be tried


class Shy(Narrow):
    """Not to be copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError("there is only one")


class Fickle(Narrow):
    """As many outputs as it likes."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)[: None if self.training else 40 - type(self).calls % 7]


class Mute(Narrow):
    def forward(self, x):
        out = super().forward(x)
        return out if self.training else out.argmax(1)


class Compiled(Narrow):
    """With a function that is not copied with it."""

    def __init__(self):
        super().__init__()
        original = super().forward
        self.forward = lambda x: original(x)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Compiled, "ValueError: a copy of it calls the layers of the model itself."),
        (Shy, "RuntimeError: there is only one"),
        (Fickle, "ValueError: outputs of shapes"),
        (Mute, "ValueError: it must give floating-point tensors of more than one number; it gave Tensor."),
    ],
)
def test_else_the_losses_of_the_layers_may_add_up_to_it(make, why):
    session = to_the_switch(make())
    note = next(note for note in session.notes if "could not be tried" in note)
    assert note.startswith(
        "the losses of all layers add up to 0.1 at most, as the model could not be tried with its pairs: "
    )
    assert why in note
    lost = sum(d.output_error**2 for d in session.plan.layers if d.factorized)
    assert session.plan.R and lost <= 0.1 + 1e-6


def test_a_copy_that_loses_nothing_at_all_is_not_believed(monkeypatch):
    """As that of one whose function reads the weights of the model that it was made of."""
    monkeypatch.setattr(outputs, "apply_plan", lambda *args, **options: [])
    notes = to_the_switch(Narrow()).notes
    assert any("ValueError: a copy of it computes without its own pairs." in note for note in notes)


class NotInEvaluation(Narrow):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("only in training\nand so on")
        return super().forward(x)


class WithForces(Narrow):
    """The gradient by its input is what it gives."""

    def forward(self, x):
        x = x.requires_grad_()
        return torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)[0][:, :4]


@pytest.mark.parametrize("make", [NotInEvaluation, WithForces])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_a_model_that_cannot_be_called_once_more_goes_on_with_what_its_weights_tell(make, batchnorm):
    class Model(make, Normed if batchnorm else Narrow):
        pass

    model = Model()
    optimizer, session = attached(model, replace(KEEP, keep=0.1), total_steps=400)
    step = 0
    while session.plan is None:
        x = vectors(40, step)[0]
        optimizer.zero_grad()
        model(x.clone()).square().mean().backward()
        optimizer.step()
        step += 1
    notes = " ".join(session.notes)
    assert "ranks were chosen by the weights alone: RuntimeError: " in notes
    assert "factors were made of the weights alone: RuntimeError: " in notes
    assert "and so on" not in notes
    assert session.plan.R and all(d.output_error is None for d in session.plan.layers)


def test_where_no_layer_pays_nothing_is_looked_at():
    model = NotInEvaluation()
    _, session = attached(model, replace(KEEP, speedup_threshold=1e9), total_steps=400)
    assert not session.plan.R and not session.notes


def test_hooks_that_look_on_see_none_of_it():
    model, seen = Narrow(), []
    model.head.register_forward_hook(lambda module, args, out: seen.append(module.training))
    optimizer, session = attached(model, KEEP, total_steps=400)
    seen.clear()
    step = 0
    while session.plan is None:
        train(model, optimizer, 1, vectors(40, step))
        step += 1
    assert told(session) >= 0.9
    # Its own calls, and those that find out whether a hook looks on.
    assert len(seen) <= step + 3


def test_a_model_may_write_into_what_it_is_given():
    class Writes(Narrow):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    model, (x, y) = Writes(), vectors(40)
    before = x.clone()
    optimizer, session = attached(model, KEEP, x, total_steps=400)
    while session.plan is None:
        train(model, optimizer, 1, (before.clone(), y))
    assert torch.equal(x, before)
    assert session.plan.R and any("of its outputs in the example" in note for note in session.notes)


def test_objects_of_which_nobody_knows_how_much_they_hold_are_kept_of_the_last_step_alone():
    class Graph:
        def __init__(self, x):
            self.x = x

    class OfGraphs(Narrow):
        def forward(self, graph):
            return super().forward(graph.x)

    calls, model = live_data.LastCalls(16), OfGraphs()
    calls.watch(model)
    for step in range(3):
        model(Graph(vectors(4, step)[0]))
        assert len(calls) == 1
        calls.step_made()


def test_numbers_that_are_not_finite_leave_the_weights():
    model = Narrow()
    optimizer, session = attached(model, KEEP, total_steps=400)
    for step in range(3):
        x, y = vectors(40, step)
        train(model, optimizer, 1, (x, y))
        if session.plan is None:
            model(torch.full_like(x, torch.nan))
    assert any("ranks were chosen by the weights alone" in note for note in session.notes)


# -- what is compared


def test_of_large_outputs_one_call_is_enough(monkeypatch):
    often = replace(KEEP, samples=1600)
    session = to_the_switch(Narrow(), often, total_steps=1600)
    assert any(f"in {session.plan.switch_step} of its last calls" in note for note in session.notes)
    monkeypatch.setattr(outputs, "KEPT_BYTES", 1)
    session = to_the_switch(Narrow(), often, total_steps=1600)
    assert any("in 1 of its last calls" in note for note in session.notes)


def test_losses_among_the_outputs_do_not_count_beside_others():
    class WithLoss(Narrow):
        def forward(self, x):
            out = super().forward(x)
            return {"loss": out.square().mean(), "logits": out}

    with pytest.raises(ValueError, match="must give floating-point tensors of more than one number; it gave Tensor"):
        outputs._numbers(torch.tensor(2.0))  # of a loss so small a share may be much
    found = outputs._numbers(WithLoss()(vectors(40)[0]))
    assert [t.shape for t in found] == [(40, 4)]


@pytest.mark.parametrize("shape", [(7,), (7, 3), (5, 4, 3), (6, 3, 4, 4), (6, 3, 2, 4, 4)])
def test_outputs_vary_about_the_mean_of_each_feature_over_all_calls(shape):
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
    over = {1: 0, 2: 0, 3: (0, 1), 4: (0, 2, 3), 5: (0, 2, 3, 4)}[len(shape)]
    expected = float((given - given.mean(over, keepdim=True)).square().sum())
    for parts in ([given], given.split(1), given.split(2)):  # batches of one image too
        moments = [outputs._Output.of(part).moments() for part in parts]
        assert outputs._about_the_mean(moments) == pytest.approx(expected, rel=1e-5)


def test_outputs_that_never_vary_cannot_be_compared():
    moments = [outputs._Output.of(torch.full((4, 3), 2.0)).moments()]
    with pytest.raises(ValueError, match="the same whatever it is called with"):
        outputs._about_the_mean(moments)
    (only,) = [outputs._Output.of(torch.tensor([[3.0, 4.0]])).moments()]  # of one position the mean is not known
    assert outputs._about_the_mean([only]) == pytest.approx(25)


@pytest.mark.parametrize("mask", [-torch.inf, torch.inf, torch.nan, -1e9, torch.finfo(torch.float32).min])
def test_what_is_masked_is_not_compared(mask):
    class Masked(Narrow):
        def forward(self, x):
            out = super().forward(x)
            return out.masked_fill(torch.arange(4) == 1, mask)

    def masked_loss(model, optimizer, step):
        x = vectors(40, step)[0]
        optimizer.zero_grad()
        model(x)[:, [0, 2, 3]].square().mean().backward()
        optimizer.step()

    found = {}
    for make in (Narrow, Masked):
        model = make()
        optimizer, session = attached(model, replace(KEEP, keep=0.95), total_steps=400)
        step = 0
        while session.plan is None:
            masked_loss(model, optimizer, step)
            step += 1
        found[make] = session.plan.R, told(session)
    assert found[Masked][0] and found[Masked][1] >= 0.95
    assert max(found[Masked][0].values()) > 1  # as the others need


def test_what_is_not_a_number_any_more_is_lost_altogether():
    wanted = outputs._Output.of(torch.ones(3, 2))
    assert wanted.off(torch.full((3, 2), torch.nan)) == torch.inf
    assert wanted.off(torch.full((3, 2), torch.inf)) == torch.inf
    some = outputs._Output.of(torch.tensor([[1.0, -torch.inf]]))
    assert some.off(torch.tensor([[3.0, 7.0]])) == 4.0


@pytest.mark.parametrize(
    ("values", "compared"),
    [
        (torch.tensor([[1.0, 1e-9, 1e-12, 1e-15]]).repeat(40, 1), 1.0),  # probabilities of a confident classifier
        (torch.eye(32), 1.0),  # mostly zeros
        (torch.tensor([[3.0, -1e9, -1e9, -1e9, -1e9, -1e9]]).repeat(40, 1), 1 / 6),  # mostly masked
        (torch.tensor([[20.0, -30.0, 25.0 - 1e4, -5.0 - 1e4]]).repeat(40, 1), 0.5),  # a mask that is added
        (torch.tensor([[2e5, 3e5, -1e5]]).repeat(40, 1), 1.0),  # prices, say
        (torch.zeros(4, 3), 1.0),
    ],
)
def test_large_numbers_are_left_out_only_beside_usual_ones(values, compared):
    kept = outputs._Output.of(values).kept
    assert (1.0 if kept is None else float(kept.float().mean())) == pytest.approx(compared)


def test_of_a_large_output_some_numbers_say_what_is_usual():
    values = torch.randn(2**19, generator=torch.Generator().manual_seed(0))
    values[5] = -1e9
    kept = outputs._Output.of(values).kept
    assert not kept[5] and kept.sum() == len(values) - 1
