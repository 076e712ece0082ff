"""Runs whose weights become NaN or infinite: they stop, and what was good stays."""

import re

import pytest
import torch
import torch.nn.functional as F
from autos import run
from nets import SOON, batches, mlp, vectors
from torch import nn

import fxrank
from fxrank.resume.grown import read_whole
from fxrank.training.finite import FiniteWeights, not_finite

CHECKPOINT, BEFORE = "checkpoint.safetensors", "checkpoint.before.safetensors"


class Bad:
    """A loss that is spoiled at one step, counted over the whole run of four epochs of four."""

    def __init__(self, step, value=float("nan")):
        self.left, self.value = step, value

    def __call__(self, outputs, targets):
        loss = F.cross_entropy(outputs, targets)
        if torch.is_grad_enabled():
            self.left -= 1
        return loss * self.value if self.left == 0 else loss


def diverged(folder, step, value=float("nan"), policy="full-rank", **options):
    with pytest.raises(fxrank.NonFiniteWeightError) as caught:
        run(mlp(), loss_fn=Bad(step, value), policy=policy, output_dir=folder, resume=True, **options)
    return str(caught.value)


def finite(tree):
    return all(bool(value.isfinite().all()) for value in tree["model"].values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("policy", "step"), [("full-rank", 6), (SOON, 6), (SOON, 11), (SOON, 16)])
def test_the_last_finite_checkpoint_and_the_one_before_it_stay(policy, step, value, tmp_path):
    text = diverged(tmp_path, step, value, policy)
    epoch = (step - 1) // 4
    assert (
        f"{tmp_path / CHECKPOINT} holds the run after 0 batches of epoch {epoch}, when all weights were finite" in text
    )
    last, before = read_whole(tmp_path / CHECKPOINT), read_whole(tmp_path / BEFORE)
    assert finite(last) and finite(before)
    assert (last["epoch"], last["taken"]) == (epoch, 0)
    assert (before["epoch"], before["taken"]) < (epoch, 0)
    assert not (tmp_path / "model.safetensors").exists()
    # The same call on clean data goes on from there, to the end of a run that was never spoiled.
    resumed = run(mlp(1), loss_fn=Bad(0), policy=policy, output_dir=tmp_path, resume=True)
    clean = run(mlp(), loss_fn=Bad(0), policy=policy)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in clean.history]
    assert not (tmp_path / BEFORE).exists()


def test_a_checkpoint_inside_an_epoch_is_not_written_either(tmp_path):
    text = diverged(tmp_path, 7, checkpoint_every=1)
    assert "holds the run after 2 batches of epoch 1" in text and "after step 7 " in text
    assert read_whole(tmp_path / BEFORE)["taken"] == 1


def test_a_run_that_keeps_nothing_stops_too_and_says_so():
    with pytest.raises(
        fxrank.NonFiniteWeightError, match="Nothing of this run is kept to go on from: output_dir= and resume=True"
    ):
        run(mlp(), loss_fn=Bad(11), policy=SOON)


def test_a_long_epoch_is_not_waited_for():
    steps = []

    def loss_fn(outputs, targets):
        steps.append(1)
        return F.cross_entropy(outputs, targets) * float("nan")

    with pytest.raises(fxrank.NonFiniteWeightError, match="after step 100 "):
        run(mlp(), batches(150), loss_fn=loss_fn, policy="full-rank", epochs=1)
    assert len(steps) == 100


def test_a_result_that_diverged_in_the_last_epoch_says_so(tmp_path):
    with pytest.warns(
        UserWarning, match="'0.weight' and 7 more parameters of the one that is saved hold NaN or infinity"
    ):
        result = run(mlp(), loss_fn=Bad(14), policy="full-rank", output_dir=tmp_path)
    assert any(note.startswith("THE WEIGHTS ARE NOT FINITE: '0.weight' and 7 more") for note in result.report.notes)
    assert "THE WEIGHTS ARE NOT FINITE" in (tmp_path / "report.txt").read_text()


def test_saving_a_model_that_is_not_finite_says_so(tmp_path):
    small = fxrank.factorize(mlp(), vectors()[0], rank={"2": 4})
    with torch.no_grad():
        small[2].v.weight[0, 0] = float("inf")
    with pytest.warns(UserWarning, match=re.escape("'2.v.weight' and 0 more parameters")):
        fxrank.save(small, tmp_path)


def test_what_was_infinite_from_the_start_is_no_fault():
    class Masked(nn.Sequential):
        def __init__(self):
            super().__init__(*mlp())
            self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    model = Masked()
    watch = FiniteWeights(model)
    assert not_finite(model) == ["mask"] and watch.broken() == []
    model.register_buffer("other", torch.tensor([float("nan")]))  # as what comes at the switch
    assert watch.broken() == ["other"]
    assert run(Masked(), policy=SOON).plan.R


def test_the_last_checkpoint_that_cannot_be_written_does_not_cost_the_result(tmp_path):
    class Spoiler:
        def __call__(self, outputs, targets):
            if torch.is_grad_enabled() and read_whole(tmp_path / CHECKPOINT)["epoch"] == 3:
                (tmp_path / f"{CHECKPOINT}.partial").mkdir(exist_ok=True)
            return F.cross_entropy(outputs, targets)

    with pytest.warns(UserWarning, match="the last checkpoint could not be written, the one before it stays"):
        result = run(mlp(), loss_fn=Spoiler(), output_dir=tmp_path, resume=True)
    assert result.plan.R and read_whole(tmp_path / CHECKPOINT)["epoch"] == 3


def test_one_in_the_middle_is_an_error(tmp_path):
    class Spoiler:
        def __call__(self, outputs, targets):
            (tmp_path / f"{CHECKPOINT}.partial").mkdir(exist_ok=True)
            return F.cross_entropy(outputs, targets)

    with pytest.raises(IsADirectoryError):
        run(mlp(), loss_fn=Spoiler(), output_dir=tmp_path, resume=True)
