"""What `auto_lowrank` refuses, before it has touched anything, and what an error on the way leaves."""

import copy
import re

import pytest
import torch
from autos import Endless, run, shuffled_clusters
from nets import HALFWAY, ConvNet, Net, batches, clusters, images, mlp, settings_of, snapshot, vectors
from torch import nn

import fxrank

X, Y = vectors()


class Empty:
    def __iter__(self):
        return iter(())


class OncePerLoader(list):
    """Spent after two passes: the first look and the first epoch."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return list.__iter__(self) if self.passes <= 2 else iter(())


REFUSED = {
    "empty list": (
        [],
        {},
        ValueError,
        "the loader must yield at least one batch; it is empty (length 0). Check the data set,",
    ),
    "empty iterable": (
        Empty(),
        {"steps_per_epoch": 3},
        ValueError,
        "the loader must yield at least one batch; it is empty. Check",
    ),
    "generator": (
        (b for b in batches()),
        {"steps_per_epoch": 4},
        TypeError,
        "the loader must be iterable again for every epoch; got a one-pass generator. Pass a DataLoader or a list of batches.",
    ),
    "generator without length": (
        (b for b in batches()),
        {},
        TypeError,
        "the loader must have a length, so that schedule and switch can be placed; generator has none. Pass steps_per_epoch=.",
    ),
    "batch of another width": (
        [(torch.randn(8, 13), Y)],
        {},
        fxrank.TraceError,
        "every operation of a traced model must be a graph node; Sequential failed in '0' (Linear)",
    ),
    "batch with a strange key": ([{"pixels": X, "n": Y}], {}, fxrank.TraceError, "Sequential failed in '0' (Linear)"),
    "nothing to factorize": (
        None,
        {"exclude": ["2", "4"]},
        fxrank.NothingToFactorizeError,
        "at least one layer must be factorizable; 0 of 4 are:\n  0 (linear): first layer of the graph, left dense by default",
    ),
    "unknown layer": (
        None,
        {"include": "layer9"},
        ValueError,
        "each selector in include must match at least one layer; 'layer9' matches none of 4.",
    ),
    "epochs": (None, {"epochs": 0}, ValueError, "epochs must be at least 1; got 0."),
    "steps per epoch": (
        None,
        {"steps_per_epoch": 0},
        ValueError,
        "total_steps and steps_per_epoch must be at least 1; got 0 and 0.",
    ),
    "amp": (None, {"amp": "fp16"}, ValueError, "amp must be one of 'bfloat16', 'float16'; got 'fp16'."),
    "amp of another type": (
        None,
        {"amp": torch.float64},
        ValueError,
        "amp must be one of 'bfloat16', 'float16'; got torch.float64.",
    ),
    "scheduler_per": (
        None,
        {"scheduler_per": "step"},
        ValueError,
        "scheduler_per must be one of 'batch', 'epoch'; got 'step'.",
    ),
    "policy": (None, {"policy": "auto"}, ValueError, "policy must be one of 'cuttlefish', 'cuttlefish-paper'"),
    "policy type": (None, {"policy": 0.25}, TypeError, "policy must be a fxrank policy, a Plan or a name; got float."),
    "plan of another model": (
        None,
        {"policy": fxrank.plan_of(fxrank.factorize(ConvNet(), images()[0], rank=0.25))},
        fxrank.PlanMismatchError,
        "every layer of a plan must exist in the model; Sequential has no 'conv2'. Use the plan of this very architecture.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    loader, options, error, message = REFUSED[name]
    model = mlp()
    model[3].eval()  # a mode of its own
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, settings, random = snapshot(model), settings_of(optimizer), torch.get_rng_state()
    with pytest.raises(error, match=re.escape(message)):
        run(model, loader, **({"optimizer": optimizer, "seed": None} | options))
    assert snapshot(model) == before
    assert settings_of(optimizer) == settings
    assert torch.equal(torch.get_rng_state(), random)


def test_refused_optimizers():
    model = mlp()
    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "the optimizer must hold the model's parameters; SGD holds 8, none of them of Sequential. Build it from model.parameters()"
        ),
    ):
        run(model, optimizer=other)
    with pytest.raises(
        TypeError, match=re.escape("LBFGS evaluates the model several times inside one step, so its parameters")
    ):
        run(model, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"auto_lowrank steps one torch optimizer; got list\. For several, attach a"):
        run(model, optimizer=[torch.optim.SGD(model.parameters(), lr=0.1)])
    with pytest.raises(
        ValueError, match=re.escape("got a scheduler without optimizer=. Pass the optimizer it was built with.")
    ):
        run(model, scheduler=torch.optim.lr_scheduler.ExponentialLR(other, 0.5))
    with pytest.raises(ValueError, match=re.escape("the model must have parameters to train; ReLU has none.")):
        run(nn.ReLU())
    assert snapshot(model) == before


def test_refusals_leave_model_and_optimizer_alone():
    def refused(error, text, batches=None, model=None, **options):
        model = Net().eval() if model is None else model
        state = copy.deepcopy(model.state_dict())
        batches = shuffled_clusters() if batches is None else batches
        with pytest.raises(error, match=re.escape(text)):
            fxrank.auto_lowrank(
                model, batches, **({"epochs": 2, "progress": False, "policy": HALFWAY, "device": "cpu"} | options)
            )
        assert not model.training
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    x, y = clusters()
    mismatched = [(x, torch.zeros(48, 2))]
    refused(ValueError, "Pass loss_fn(outputs, targets).", batches=mismatched, policy="spectral-init")
    refused(ValueError, "the loader must yield at least one batch; it is empty (length 0)", batches=[])
    refused(
        TypeError,
        "the loader must have a length, so that schedule and switch can be placed; Endless has none. Pass steps_per_epoch=.",
        batches=Endless(),
    )
    refused(TypeError, "got a one-pass generator", batches=(b for b in [(x, y)]), steps_per_epoch=1)
    refused(fxrank.TraceError, "Net failed in 'stem' (Conv2d)", batches=[(x[:, :1], y)])
    refused(
        fxrank.TraceError, "Net failed in 'stem' (Conv2d) with TypeError: conv2d() received", batches=[{"y": x, "z": y}]
    )
    refused(ValueError, "amp must be one of 'bfloat16', 'float16'; got 'half'", amp="half")
    refused(ValueError, "epochs must be at least 1; got 0", epochs=0)
    refused(ValueError, "scheduler_per must be one of 'batch', 'epoch'", scheduler_per="day")
    refused(ValueError, "a scheduler drives one optimizer; got a scheduler without optimizer=", scheduler=object())
    refused(ValueError, "none of them of Net", optimizer=torch.optim.SGD(Net().parameters(), lr=0.1))
    refused(ValueError, "the model must have parameters to train; ReLU has none", model=nn.ReLU().eval())
    refused(fxrank.NothingToFactorizeError, "at least one layer must be factorizable", exclude="body")


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        (
            [(X, torch.zeros(8, 3))],
            {},
            ValueError,
            "got outputs (8, 4) and targets (8, 3). Pass loss_fn(outputs, targets).",
        ),
        ([X], {}, TypeError, "the loss can be inferred for batches (inputs, targets) with tensor outputs"),
        (
            None,
            {"loss_fn": lambda o, t: o},
            TypeError,
            "loss_fn must return a scalar tensor; got Tensor(8, 4) float32.",
        ),
        (
            OncePerLoader(batches()),
            {},
            ValueError,
            "the loader must yield batches in every epoch; epoch 1 had none. A generator is spent after one pass: pass a DataLoader or list.",
        ),
    ],
)
def test_an_error_on_the_way_leaves_no_hooks(loader, options, error, message):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = settings_of(optimizer)
    with pytest.raises(error, match=re.escape(message)):
        run(model, loader, optimizer=optimizer, **options)
    assert settings_of(optimizer)["hooks"] == settings["hooks"] == (0, 0)
    assert settings_of(optimizer)["groups"] == settings["groups"]
