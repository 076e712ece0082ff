"""Batches: what is input and what target, the loss that is inferred, and moving them."""

import re
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from nets import Net, clusters, mlp, vectors
from torch import nn

from fxrank.training.batches import loss_of, model_inputs, run_batch, split_batch, to_device

X, Y = vectors()


TWO = "the loss can be inferred for batches (inputs, targets) with tensor outputs, or for models that return .loss; got a batch "


class Returns(nn.Module):
    """A model that returns what it is told to, from its logits."""

    def __init__(self, build):
        super().__init__()
        self.net, self.build = mlp(), build

    def forward(self, x):
        return self.build(self.net(x))


@pytest.mark.parametrize(
    ("batch", "inputs", "targets"),
    [
        ((X, Y), X, Y),
        ([X, Y], X, Y),
        ((X, 1, Y), (X, 1), Y),
        ([{"a": X}, Y], {"a": X}, Y),
    ],
)
def test_the_last_of_several_is_the_target(batch, inputs, targets):
    assert split_batch(batch) == (inputs, targets)


@pytest.mark.parametrize("batch", [X, {"x": X}, OrderedDict(x=X), [X], (X,)])
def test_a_batch_without_a_target_is_all_input(batch):
    inputs, targets = split_batch(batch)
    assert inputs is targets


def test_moving_keeps_the_nest():
    Pair = namedtuple("Pair", "x y")
    batch = {"pair": Pair(X, [Y, "name", None]), "more": (1.5, OrderedDict(z=X))}
    moved = to_device(batch, torch.device("meta"))
    assert type(moved["pair"]) is Pair
    assert moved["pair"].x.device.type == moved["pair"].y[0].device.type == moved["more"][1]["z"].device.type == "meta"
    assert moved["pair"].y[1:] == ["name", None]
    assert type(moved["more"][1]) is OrderedDict


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # (logits, labels) of one image, a segmentation, a language model (classes last), a single position
        (lambda: (torch.randn(8, 4), torch.randint(4, (8,))), lambda o, t: F.cross_entropy(o, t)),
        (lambda: (torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))), lambda o, t: F.cross_entropy(o, t)),
        (
            lambda: (torch.randn(2, 7, 4), torch.randint(4, (2, 7))),
            lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()),
        ),
        (lambda: (torch.randn(8, 4), torch.randn(8, 4)), lambda o, t: F.mse_loss(o, t)),
        (lambda: (torch.randn(8), torch.randn(8)), lambda o, t: F.mse_loss(o, t)),
    ],
)
def test_losses_that_are_inferred(make, expected):
    outputs, targets = make()
    found = run_batch(nn.Identity(), (outputs, targets), None)
    assert torch.equal(found.loss, expected(outputs, targets))
    assert found.examples == len(outputs)


def test_torch_order_wins_where_both_orders_fit():
    outputs, targets = torch.randn(2, 4, 4), torch.randint(4, (2, 4))
    assert torch.equal(run_batch(nn.Identity(), (outputs, targets), None).loss, F.cross_entropy(outputs, targets))


@pytest.mark.parametrize(
    "build",
    [
        lambda z: {"loss": z.square().mean(), "logits": z},
        lambda z: OrderedDict(logits=z, loss=z.square().mean()),
        lambda z: SimpleNamespace(loss=z.square().mean(), logits=z),
    ],
)
def test_the_models_own_loss_comes_first(build):
    model = Returns(build)
    z = model.net(X)
    for batch in ((X, Y), {"x": X}, X, (X,)):
        outcome = run_batch(model, batch, None)
        assert torch.equal(outcome.loss, z.square().mean())
    found = run_batch(model, (X, Y), None)
    assert (int(found.correct), found.predictions) == (int((z.argmax(1) == Y).sum()), 8)


def test_a_loss_function_of_ones_own_comes_before_everything():
    model = Returns(lambda z: {"loss": z.mean(), "logits": z})
    outcome = run_batch(model, {"x": X}, lambda outputs, batch: outputs["logits"].sum() + batch["x"].sum())
    assert torch.equal(outcome.loss, model.net(X).sum() + X.sum())
    assert outcome.correct is None


@pytest.mark.parametrize(
    ("model", "batch", "error", "message"),
    [
        (
            mlp(),
            X,
            TypeError,
            TWO + "Tensor(8, 12) float32 and outputs Tensor(8, 4) float32. Pass loss_fn(outputs, targets).",
        ),
        (mlp(), (X,), TypeError, TWO + "tuple(Tensor(8, 12) float32) and outputs Tensor(8, 4) float32."),
        (nn.Identity(), [X], TypeError, TWO + "list(Tensor(8, 12) float32) and outputs Tensor(8, 12) float32."),
        (
            Returns(lambda z: [z]),
            (X, Y),
            TypeError,
            TWO + "tuple(Tensor(8, 12) float32, Tensor(8,) int64) and outputs list(Tensor(8, 4) float32).",
        ),
        (mlp(), (X, "label"), TypeError, TWO + "tuple(Tensor(8, 12) float32, str) and outputs Tensor(8, 4) float32."),
        (
            mlp(),
            (X, torch.zeros(8, 1)),
            ValueError,
            "float targets take the mean squared error, with outputs of their shape; got outputs (8, 4) and targets (8, 1). Pass",
        ),
        (
            mlp(),
            (X, torch.zeros(8, 4, dtype=torch.long)),
            ValueError,
            "integer targets take the cross-entropy, with one more output dimension (classes); got outputs (8, 4) and targets (8, 4).",
        ),
        (
            mlp(),
            (X, torch.zeros(7, dtype=torch.long)),
            ValueError,
            "got outputs (8, 4) and targets (7,). Pass loss_fn(outputs, targets).",
        ),
    ],
)
def test_what_cannot_be_inferred_is_refused(model, batch, error, message):
    with pytest.raises(error, match=re.escape(message)):
        run_batch(model, batch, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "NoneType"),
        (1.0, "float"),
        (torch.zeros(8), "Tensor(8,) float32"),
        ((torch.zeros(()),), "tuple(Tensor() float32)"),
    ],
)
def test_a_loss_function_must_return_a_scalar(value, text):
    with pytest.raises(TypeError, match=re.escape(f"loss_fn must return a scalar tensor; got {text}.")):
        run_batch(mlp(), (X, Y), lambda outputs, targets: value)


def test_a_batch_that_does_not_fit_the_model():
    message = "the batch must fit Bilinear.forward"
    with pytest.raises(TypeError, match=re.escape(message)) as caught:
        run_batch(nn.Bilinear(1, 1, 1), {"pixels": X, "size": Y}, None)
    assert "got {'pixels': Tensor(8, 12) float32, 'size': Tensor(8,) int64}. Pass a tensor, a tuple of" in str(
        caught.value
    )


def test_accuracy_has_a_meaning_only_for_classes():
    assert run_batch(mlp(), (X, torch.zeros(8, 4)), None).correct is None
    outcome = run_batch(mlp(), (X, Y), None)
    assert (outcome.predictions, outcome.correct.requires_grad) == (8, False)


def test_a_detectors_losses_are_summed_and_it_gets_its_targets():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 1)

        def forward(self, images, targets=None):
            scores = torch.stack([self.a(x).mean() for x in images])
            if targets is None:
                return [{"scores": s} for s in scores]
            return {"loss_box": scores.square().mean(), "loss_class": (scores - len(targets)).abs().mean()}

    batch = ([torch.rand(3, 4), torch.rand(5, 4)], [{"labels": torch.tensor([1])}, {"labels": torch.tensor([2])}])
    model = Detector()
    outcome = run_batch(model, batch, None)
    losses = model(*batch)
    assert torch.equal(outcome.loss, losses["loss_box"] + losses["loss_class"])
    assert outcome.correct is None
    assert set(model_inputs(model, batch)) == {"images", "targets"}


@pytest.mark.parametrize("kind", [dict, namedtuple("Outputs", ["logits", "aux_logits"])], ids=["dict", "namedtuple"])
def test_the_main_output_counts_where_there_are_others(kind):
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    outputs = {"out": logits, "aux": logits + 1} if kind is dict else kind(logits, logits + 1)
    assert torch.equal(loss_of(outputs, labels, (None, labels), None), nn.functional.cross_entropy(logits, labels))


def test_losses_are_inferred():
    x, y = clusters()
    net = Net()
    outcome = run_batch(net, (x, y), None)
    assert torch.equal(outcome.loss, F.cross_entropy(net(x), y))
    assert outcome.examples == outcome.predictions == 48
    assert outcome.correct == (net(x).argmax(1) == y).sum()
    target = torch.randn(48, 3)
    assert torch.equal(run_batch(net, [x, target], None).loss, F.mse_loss(net(x), target))
    assert run_batch(net, [x, target], None).correct is None
    tokens = torch.randint(0, 5, (2, 7))
    model = nn.Embedding(5, 5)
    found = run_batch(model, (tokens, tokens), None)
    assert torch.equal(found.loss, F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
    assert found.predictions == 14
    assert torch.equal(run_batch(net, (x, y), lambda out, t: out.sum() * 0 + t.sum()).loss, y.sum().float())


class OwnLoss(nn.Module):
    def __init__(self, attribute):
        super().__init__()
        self.net, self.attribute = Net(), attribute

    def forward(self, pixels, labels=None):
        logits = self.net(pixels["image"])
        out = {"loss": F.cross_entropy(logits, labels), "logits": logits}
        return SimpleNamespace(**out) if self.attribute else out


@pytest.mark.parametrize("attribute", [False, True])
def test_models_with_their_own_loss(attribute):
    x, y = clusters()
    outcome = run_batch(OwnLoss(attribute), {"pixels": {"image": x}, "labels": y}, None)
    assert outcome.loss.requires_grad
    assert outcome.predictions == 48


@pytest.mark.parametrize(
    ("batch", "loss_fn", "error", "text"),
    [
        (clusters()[0], None, TypeError, "the loss can be inferred for batches (inputs, targets)"),
        (
            (clusters()[0], torch.zeros(48, 2)),
            None,
            ValueError,
            "got outputs (48, 3) and targets (48, 2). Pass loss_fn(outputs, targets).",
        ),
        (
            (clusters()[0], torch.zeros(48, 2, dtype=torch.long)),
            None,
            ValueError,
            "one more output dimension (classes); got outputs (48, 3)",
        ),
        (clusters(), lambda out, t: out, TypeError, "loss_fn must return a scalar tensor; got Tensor(48, 3) float32."),
        ((clusters()[0], clusters()[0], clusters()[1]), None, TypeError, "the batch must fit Net.forward(x); got"),
    ],
)
def test_batch_errors(batch, loss_fn, error, text):
    if error is TypeError and "must fit" in text:
        batch = ((batch[0], batch[1]), batch[2])

        class Three(Net):
            def forward(self, a, b, c):
                return a

        with pytest.raises(error, match=re.escape("the batch must fit Three.forward(a, b, c)")):
            run_batch(Three(), batch, loss_fn)
        return
    with pytest.raises(error, match=re.escape(text)):
        run_batch(Net(), batch, loss_fn)


def test_splitting_and_moving():
    assert split_batch((1, 2)) == (1, 2)
    assert split_batch((1, 2, 3)) == ((1, 2), 3)
    assert split_batch([1]) == (1, 1)
    moved = to_device({"a": [torch.ones(1), "text"]}, torch.device("cpu"))
    assert moved["a"][1] == "text"
