"""The records that a run works on: its options, checked once, and where it is."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from autos import Endless
from nets import batches, mlp

import fxrank
from fxrank.distributed.team import Team
from fxrank.session.state import FULL, LOW
from fxrank.training.options import RunOptions
from fxrank.training.progress import Totals
from fxrank.training.run_state import RunState


def test_the_options_are_those_of_the_one_call():
    given = inspect.signature(fxrank.auto_lowrank).parameters
    assert [*inspect.signature(RunOptions.of).parameters.values()] == [*given.values()]
    fields = {field.name for field in dataclasses.fields(RunOptions)}
    assert fields == {*given} - {"output_dir"} | {"output", "epochs_by_default"}


def test_defaults_are_in_place_and_stay():
    options = RunOptions.of(mlp(), batches())
    assert (options.epochs, options.epochs_by_default, options.steps_per_epoch) == (30, True, 4)
    assert options.total_steps == 120 and options.policy == fxrank.Cuttlefish()
    assert options.device_for(Team.of(options.model)).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.epochs = 3


def test_what_is_given_is_taken_in_the_form_in_which_it_is_used(tmp_path):
    options = RunOptions.of(
        mlp(),
        Endless(),
        epochs=2,
        steps_per_epoch=5,
        amp="bfloat16",
        policy="full-rank",
        include="2",
        exclude=iter(["4"]),
        device="cpu",
        output_dir=str(tmp_path),
        resume=True,
        checkpoint_every=3,
    )
    assert (options.total_steps, options.epochs_by_default, options.amp) == (10, False, torch.bfloat16)
    assert (options.include, options.exclude, options.policy) == (("2",), ("4",), fxrank.FullRank())
    assert (options.device, options.output) == (torch.device("cpu"), Path(tmp_path))


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"resume": True, "epochs": 0}, ValueError, "checkpoints take both output_dir= and resume=True"),
        ({"policy": "none", "epochs": 0}, ValueError, "policy must be one of"),
        ({"epochs": 0, "scheduler_per": "day"}, ValueError, "epochs must be at least 1; got 0"),
        ({"scheduler_per": "day", "amp": "half"}, ValueError, "scheduler_per must be one of"),
        ({"scheduler": object(), "amp": "half"}, ValueError, "a scheduler drives one optimizer"),
        ({"optimizer": object(), "amp": "half"}, TypeError, "auto_lowrank steps one torch optimizer; got object"),
        ({"amp": "half", "loader": []}, ValueError, "amp must be one of"),
        ({"loader": []}, ValueError, "the loader must yield at least one batch; it is empty"),
    ],
)
def test_the_first_that_is_wrong_is_named(given, error, text):
    with pytest.raises(error, match=text):
        RunOptions.of(**({"model": mlp(), "loader": batches()} | given))


def test_where_a_run_is():
    state = RunState(Totals(torch.device("cpu")))
    assert state.memory == {FULL: None, LOW: None} and state.at_switch.keys() == {"before_switch", "after_switch"}
    state.taken, before = 4, state.totals
    state.totals.add(torch.tensor(2.0), 8, torch.tensor(4), 8)
    state.next_epoch()
    assert (state.epoch, state.taken) == (1, 0) and state.totals is not before and state.totals.examples == 0
    state.seconds_before = 100.0
    assert 100 <= state.seconds < 200
    other = RunState(Totals(torch.device("cpu")))
    assert other.memory is not state.memory and other.history is not state.history
